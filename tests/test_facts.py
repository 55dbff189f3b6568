"""Checked answers: each judgement worked out by hand, and the basics against themselves."""

import pytest
from fakes import PERU, talk

from tinychat.data.corpus import basics
from tinychat.data.facts import KINDS, Facts, is_right
from tinychat.data.split import by_split

ITALY = ("the flag of Italy", "It is green, white and red.")
COW = ("which is bigger, a cow or an ant?", "A cow is bigger than an ant.")
PARIS = ("is Paris in Spain?", "No, Paris is in France.")
TREE = ("plural of tree", "One tree, two trees.")


@pytest.mark.parametrize(
    ("question", "written", "reply", "right"),
    [
        (*PERU, "LIMA, I think!", True),
        (*PERU, "Sure! It is the city of Lima.", True),
        (*PERU, "The capital of Peru is Quito. It lies by the sea.", False),
        (*PERU, "It is Quito. Lima is in Peru, too.", False),
        (*PERU, "Lima, Quito, Paris or Rome.", False),  # one of four is no answer
        (*PERU, "", False),
        # Of green, white and red, two of three are enough, one is not.
        (*ITALY, "green and white", True),
        (*ITALY, "white and blue", False),
        # Every word is the question's own: the same one must come first.
        (*COW, "A cow is.", True),
        (*COW, "An ant is bigger than a cow.", False),
        (*COW, "A horse is bigger than an ant.", False),
        (*PARIS, "No, it is in France.", True),
        (*PARIS, "Yes, it is in France.", False),
        (*PARIS, "It is in France.", False),
        (*TREE, "The plural of tree is trees.", True),
        (*TREE, "One church, two churches.", False),
    ],
)
def test_what_is_right(question, written, reply, right):
    assert is_right(question, written, reply) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Nine and five make fourteen.", True),
        ("The sum of 9 and 5 is 14, because 5 and 9 together make fourteen.", True),
        ("9 plus 5 is 13.", False),
        ("9 plus 5 is 13 or 14 or 15.", False),
        ("I don't know.", False),
    ],
)
def test_of_a_sum_the_numbers_count(reply, right):
    assert is_right("whats 9 + 5", "9 plus 5 is 14.", reply, counted=True) is right


def test_a_thing_may_be_explained_in_any_way_that_the_basics_know():
    tool = talk("what is a key?", "A key is a little tool for opening a door.", "objects")
    metal = talk("explain a key", "A key is a piece of metal that fits a lock.", "objects")
    rope = talk("what is a rope?", "A rope is many strings twisted together.", "objects")
    facts = Facts([tool, metal, rope, talk("write a poem", "The rain", "poems")])
    assert facts.asked == [tool, metal, rope]
    assert facts.right(tool, "A key is a piece of metal that fits into a lock.")
    assert not facts.right(rope, "A rope is a piece of metal that fits into a lock.")
    # What has one answer only has that one: two capitals share no answers.
    lima, quito = talk(*PERU), talk("capital of Ecuador?", "The capital of Ecuador is Quito.")
    assert not Facts([lima, quito]).right(lima, "The capital of Peru is Quito.")


def test_the_basics_answer_their_own_questions_and_hardly_ever_each_others():
    facts = Facts(by_split(basics())["validation"])
    assert len(facts.asked) > 500 and {one.topic for one in facts.asked} == KINDS
    answers = [one.messages[1].content for one in facts.asked]
    strangers = [*answers[7:], *answers[:7]]
    found = sum(map(facts.right, facts.asked, strangers))
    assert all(map(facts.right, facts.asked, answers)) and found < 0.01 * len(answers)
