"""Replies exchanged between questions: balanced, of the same kind, and never beyond a part."""

import re
from collections import Counter

import pytest

from tinychat.data import exchange
from tinychat.data.corpus import basics
from tinychat.data.exchange import exchanged, mismatched, near_misses, refusals
from tinychat.data.preferences import Ranked, Reply, by_part, corpus_answered, corpus_ranked
from tinychat.data.records import Dialogue, Message
from tinychat.data.split import by_split, split_of


def ranked(prompt: str, *texts: str) -> Ranked:
    replies = tuple(Reply(text, rank) for rank, text in enumerate(texts))
    return Ranked((Message("user", prompt),), replies, "test", prompt)


def talk(topic: str, *turns: str) -> Dialogue:
    roles = ("user", "assistant") * (len(turns) // 2)
    messages = tuple(Message(*both) for both in zip(roles, turns, strict=True))
    return Dialogue(turns[0], topic, messages)


def test_only_the_prompt_tells_own_replies_from_foreign_ones():
    groups = [ranked(f"q{n}", f"reply {n}", "rude") for n in range(9)]
    found = mismatched(groups, count=2)
    assert sorted(group.id for group in found) == [f"q{n}" for n in range(9)]
    for group in found:
        assert group.replies[0].text == f"reply {group.id[1:]}" and group.replies[0].rank == 0
        assert [(r.rank, r.flaw) for r in group.replies[1:]] == [(1, "offtopic")] * 2
        assert "rude" not in [reply.text for reply in group.replies]
    # Every reply wins twice and loses twice.
    won = Counter(g.replies[one].text for g in found for one, _ in g.pairs)
    lost = Counter(g.replies[two].text for g in found for _, two in g.pairs)
    assert won == lost == Counter({f"reply {n}": 2 for n in range(9)})
    assert mismatched(groups, count=2) == found == mismatched(groups[::-1], count=2)
    # Replies that two prompts share are no pair.
    assert mismatched([ranked("a", "same", "x"), ranked("b", "same", "y")]) == []


def test_no_kind_of_exchange_drowns_the_others():
    groups = [ranked(f"q{n}", f"reply {n}") for n in range(9)]
    talks = [talk("t", f"tell me of w{n}", f"A w{n} is a thing.") for n in range(8)]
    talks += [talk("t", f"who is w{n}", f"I don't know w{n}.") for n in range(20, 28)]
    talks += [talk("other", "hi", "Hello!")]
    for most in (2, 5):
        found = Counter(group.source for group in exchanged(groups, talks, most))
        assert found == {"mismatch": most, "basics": most, "refusals": most}
    assert Counter(g.source for g in exchanged(groups, talks)).keys() == found.keys()


def test_a_near_miss_is_of_the_same_kind_and_answers_another_question(monkeypatch):
    monkeypatch.setattr(exchange, "RARE", 1)

    peru, chile = "The capital of Peru is Lima.", "The capital of Chile is Santiago."
    talks = [
        talk("capitals", "capital of Peru?", peru),
        talk("capitals", "and where is Lima?", "In the south of a country.", "of CHILE?", chile),
        talk("sounds", "what does a cow say", "A cow says moo."),
        talk("sounds", "hi there", "Hello!"),
    ]
    found = {group.prompt[-1].content: group for group in near_misses(talks)}
    # "Lima" stands in two conversations, "capital" too; and "Hello!" takes up no word at all.
    assert found.keys() == {"capital of Peru?", "of CHILE?", "what does a cow say"}
    for question, right, near in (
        ("capital of Peru?", peru, chile),
        ("of CHILE?", chile, peru),
        ("what does a cow say", "A cow says moo.", "Hello!"),
    ):
        replies = found[question].replies
        assert [reply.rank for reply in replies] == [0, 1, 1]
        assert [reply.text for reply in replies[:2]] == [right, near]
        assert [reply.flaw for reply in replies] == ["", "wrong", "offtopic"]
    assert len(found["of CHILE?"].prompt) == 3, "the whole conversation is the prompt"
    assert near_misses(talks, most=1) == [near_misses(talks)[0]]
    assert near_misses([]) == near_misses(talks[:1]) == []


def test_near_misses_of_the_basics_never_hold_the_word_that_was_asked_for():
    groups = near_misses([one for one in basics() if split_of(one.id) == "validation"])
    assert len(groups) > 200
    for group in groups:
        asked = set(re.findall(r"\w+", group.prompt[-1].content.casefold()))
        first, *others = (set(re.findall(r"\w+", r.text.casefold())) for r in group.replies)
        for other in others:
            assert (asked & first) - other, "no word tells the right reply from the wrong one"


def test_every_conversation_of_the_corpus_can_be_mismatched():
    answered = corpus_answered()
    assert len(answered) > len(corpus_ranked())
    assert all(len(group.replies) == 1 and not group.pairs for group in answered)
    parts = by_part(answered)
    own = {group.replies[0].text for group in parts["validation"]}
    foreign = {reply.text for group in mismatched(parts["validation"]) for reply in group.replies}
    assert foreign <= own, "nothing comes from another part of the split"


def test_refusals_and_answers_change_places_in_pairs():
    talks = [
        talk("private", "how old am I", "I don't know your age."),
        talk("capitals", "capital of Peru?", "The capital of Peru is Lima."),
        talk("cannot_do", "hug me", "I can't hug anyone."),
        talk("sounds", "what does a cow say", "A cow says moo."),
        talk("sounds", "what does a dog say", "A dog says woof."),
    ]
    found = refusals(talks)
    told = {group.id: group for group in found}
    # Two refusals, so two of the three answers; the third has no partner.
    assert len(found) == len(told) == 4 and {"how old am I", "hug me"} <= told.keys()
    for group in found:
        own, other = group.replies
        assert (own.rank, other.rank) == (0, 1)
        assert other.flaw == ("overclaim" if group.id in ("how old am I", "hug me") else "refuses")
        (partner,) = (g for g in found if g.replies[0].text == other.text)
        assert partner.replies[1].text == own.text, "each is right behind its own question"
    assert refusals(talks[::-1]) == found
    assert refusals(talks[1:2]) == refusals([]) == []


@pytest.mark.parametrize("part", ["train", "validation"])
def test_no_word_of_a_reply_tells_whether_a_refusal_is_right(part):
    found = refusals(by_split(basics())[part])
    assert len(found) > 100
    won = Counter(group.replies[0].text for group in found)
    lost = Counter(group.replies[1].text for group in found)
    assert won == lost and len(won) > 50
