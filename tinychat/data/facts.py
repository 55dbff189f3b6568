"""Questions of the basics that have one right answer, and a rule that checks an answer.

Checking beats guessing: a reward model of this size can't tell a right answer from a wrong one.
Lambert et al. 2024 (Tulu 3) call rewards of this kind verifiable.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from tinychat.data.records import Dialogue
from tinychat.data.words import words


def _set(names: str) -> frozenset[str]:
    return frozenset(name.strip() for name in names.split(","))


# What a thing is can be said in many ways: whatever way the basics say it counts.
EXPLAINED = _set(
    "big ideas, buildings, computer things, food and drink, how_works, jobs, machines, nature, "
    "objects, people, plants, school, science, what is it"
)
COUNTED = _set("calendar, numbers, sums")
KINDS = (
    EXPLAINED
    | COUNTED
    | _set(
        "capitals, comparing, continents, country foods, does_what, flags, known for, languages, "
        "made_of, opposites, past tense, plurals, records, synonyms, used_for, where is it, "
        "who made it, why_animals, yes or no"
    )
)
# Words that an answer may use or leave: they say how it is said, not what.
SMALL = frozenset(
    """
    a also an and answer are at because called can city comes do does equals famous first for good
    has have here how i in instead into is it its known like make makes most mostly no not of often
    on one or people question reason result say simple so sum sure than that the there they thing
    this to today together try two use used uses was way we were what which why with word words yes
    yesterday you
    """.split()
)
DIGITS = {
    name: str(number)
    for number, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}


def is_right(question: str, written: str, reply: str, *, counted: bool = False) -> bool:
    """True if the first sentence of `reply` says what the first sentence of `written` does.

    A yes stays a yes. Of the written words that the question does not hold, three in five must
    stand in the reply, and two in five of the reply's must be among them, so that a list of all
    capitals is no answer. Where every word is the question's own ("which is bigger, a cow or an
    ant?"), the same one must be named first. Of a `counted` answer the numbers alone matter.
    """
    wanted, said = _first_sentence(written), _first_sentence(reply)
    if {"yes", "no"} & {*wanted[:1], *said[:1]} and wanted[:1] != said[:1]:
        return False
    if counted and (numbers := _numbers(wanted) - _numbers(words(question))):
        its_numbers = _numbers(said) - _numbers(words(question))
        hits = len(numbers & its_numbers)
        return hits >= 0.5 * len(numbers) and hits >= 0.6 * len(its_numbers)
    new, its_new = (set(some) - set(words(question)) - SMALL for some in (wanted, said))
    if new:
        hits = len(new & its_new)
        return hits >= 0.6 * len(new) and hits >= 0.4 * len(its_new)
    named, its_named = ([word for word in some if word not in SMALL] for some in (wanted, said))
    return bool(named) and not its_new and its_named[:1] == named[:1]


def _numbers(some: Iterable[str]) -> set[str]:
    return {DIGITS.get(word, word) for word in some if word in DIGITS or word.isdigit()}


def _first_sentence(text: str) -> list[str]:
    """Its words; "Sure!" and "Here it is in simple words." are none."""
    sentences = (words(part) for part in re.split(r"(?<=[.!?:])\s", text.strip()))
    return next((some for some in sentences if set(some) - SMALL), words(text))


class Facts:
    """What the basics know: `facts.asked` are the questions, `facts.right(one, reply)` checks."""

    def __init__(self, basics: Iterable[Dialogue]) -> None:
        found = [one for one in basics if one.topic in KINDS and one.messages[0].role == "user"]
        self.written: dict[tuple[str, frozenset[str]], set[str]] = defaultdict(set)
        for one in found:
            self.written[_subject(one)].add(one.messages[1].content)
        self.asked = [one for one in found if self.right(one, one.messages[1].content)]

    def right(self, one: Dialogue, reply: str) -> bool:
        """True if `reply` answers the first question of `one` as it, or one like it, was."""
        kind, things = _subject(one)
        others = self.written.get((kind, things), ()) if kind in EXPLAINED and things else ()
        question, own = one.messages[0].content, one.messages[1].content
        return any(
            is_right(question, written, reply, counted=kind in COUNTED)
            for written in (own, *others)
        )


def _subject(one: Dialogue) -> tuple[str, frozenset[str]]:
    """The kind, and what question and answer both name: "coffee" of "what is coffee"."""
    question, answer = (set(_first_sentence(message.content)) for message in one.messages[:2])
    return one.topic, frozenset((question & answer) - SMALL)
