"""Ranked replies made by exchanging written ones: each is right behind its own question alone.

A reward model that looks at the reply and not at the question likes "I don't know. Tell me what
you'd like." everywhere. So it learns from pairs in which only the question can tell.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

from tinychat.data.preferences import Ranked, Reply, digest
from tinychat.data.records import Dialogue
from tinychat.data.words import words

RARE = 40  # conversations that a word stands in; one that stands in more says little of the topic
NEAR_MISSES = 2500  # groups of the basics, at most
REFUSES = re.compile(r"\bI (can't|cannot|could not|don't know|won't|have no)\b")


def mismatched(groups: Sequence[Ranked], count: int = 2) -> list[Ranked]:
    """Rank each prompt's best reply above the best ones of `count` other prompts.

    Every reply is as often the better as the worse one, so that nothing but the prompt can tell:
    whoever ranks them must have read it (Henderson et al. 2017 train a whole ranker of replies on
    such pairs). Give groups of one part of the split, and of one half.
    """
    order = sorted(groups, key=lambda group: digest("mismatch", group.id))
    found = []
    for place, group in enumerate(order):
        best = group.replies[0].text
        others = [order[(place + step) % len(order)] for step in range(1, count + 1)]
        texts = [other.replies[0].text for other in others]
        worse = tuple(Reply(text, 1, "offtopic") for text in texts if text != best)
        if worse:
            replies = (Reply(best, 0), *worse)
            found.append(Ranked(group.prompt, replies, "mismatch", group.id, group.weight))
    return found


def near_misses(answered: Sequence[Dialogue], most: int = NEAR_MISSES) -> list[Ranked]:
    """Rank a written reply above one of the same kind that answers another question.

    "The capital of Peru is Lima." against "The capital of Chile is Santiago.": only who reads the
    question can tell. Conversations count in which the reply takes up a rare word of its question;
    the worse replies, one of the same topic and one of another, don't hold that word. Give
    conversations of one part of the split, and of one half; a hash decides which `most` are taken.
    """
    said_in = [[set(words(message.content)) for message in one.messages] for one in answered]
    seen_in = Counter(word for turns in said_in for word in set().union(*turns))
    order = sorted(range(len(answered)), key=lambda n: digest("near", answered[n].id))
    place = {n: at for at, n in enumerate(order)}
    same: dict[str, list[int]] = defaultdict(list)
    for n in order:
        same[answered[n].topic].append(n)

    def groups() -> Iterator[Ranked]:
        for n in sorted(order, key=lambda n: digest("cap", answered[n].id)):
            one, (*_, asked, said) = answered[n], said_in[n]
            rare = {word for word in asked & said if seen_in[word] <= RARE}
            if not rare:
                continue
            kin = same[one.topic]
            strangers = (m for m in _others(order, place[n]) if answered[m].topic != one.topic)
            replies = [Reply(one.messages[-1].content, 0)]
            for some, flaw in ((_others(kin, kin.index(n)), "wrong"), (strangers, "offtopic")):
                free = (m for m in some if not rare & said_in[m][-1])
                texts = (answered[m].messages[-1].content for m in islice(free, 1))
                replies += (Reply(text, 1, flaw) for text in texts)
            if len(replies) == 3:
                yield Ranked(one.messages[:-1], tuple(replies), "basics", one.id)

    return list(islice(groups(), most))


def _others(places: Sequence[int], at: int) -> Iterator[int]:
    """All but the one at `at`, beginning behind it, once around."""
    return (places[(at + step) % len(places)] for step in range(1, len(places)))


def refusals(answered: Sequence[Dialogue]) -> list[Ranked]:
    """Exchange a refusal and an answer, and rank each above the other behind its own question.

    "I can't know your age." is right behind "how old am I", and wrong behind "what is the capital
    of Peru?". Each text is once the better and once the worse, so that no word of the reply tells.
    Give conversations of one part of the split, and of one half.
    """
    refusing: list[Dialogue] = []
    answering: list[Dialogue] = []
    for one in sorted(answered, key=lambda one: digest("refusal", one.id)):
        refuses = REFUSES.search(one.messages[-1].content)
        (refusing if refuses else answering).append(one)
    found = []
    for refusal, answer in zip(refusing, answering, strict=False):
        for one, other, flaw in ((refusal, answer, "overclaim"), (answer, refusal, "refuses")):
            replies = (
                Reply(one.messages[-1].content, 0),
                Reply(other.messages[-1].content, 1, flaw),
            )
            found.append(Ranked(one.messages[:-1], replies, "refusals", one.id))
    return found


def exchanged(
    answered: Sequence[Ranked], simple: Sequence[Dialogue], most: int = NEAR_MISSES
) -> list[Ranked]:
    """At most `most` of each of the three kinds; give conversations of one part and one half."""
    kinds = (mismatched(answered), near_misses(simple, most), refusals(simple))
    return [one for kind in kinds for one in kind[:most]]
