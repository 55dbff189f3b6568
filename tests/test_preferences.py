"""Ranked replies: readers, the split by prompt, the judge's half, votes, rules for samples."""

import json
import statistics
from collections import defaultdict

import pytest
import torch
from fakes import ByteTokenizer, ScriptedGPT, UniformGPT

from tinychat.data import corpus, preferences
from tinychat.data.groups import GroupBatches, tokenize_group, tokenize_groups
from tinychat.data.onpolicy import (
    flaw_of,
    is_made_up,
    known_words,
    rank_samples,
    repeated_share,
    sample_ranked,
)
from tinychat.data.preferences import (
    Ranked,
    Reply,
    by_part,
    corpus_flawed,
    corpus_graded,
    corpus_ranked,
    for_judge,
    prompt_key,
    public_ranked,
    read_ranked,
    read_rated,
    read_votes,
    write_ranked,
)
from tinychat.data.records import Message
from tinychat.data.split import split_of
from tinychat.data.unseen import prompts_of
from tinychat.generation import Sampling
from tinychat.runtime.errors import DataError

TOKENIZER = ByteTokenizer()


def ask(*texts: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(roles[n % 2], text) for n, text in enumerate(texts))


def ranked(prompt: str, *texts: str, id: str = "", ranks: tuple[int, ...] = ()) -> Ranked:
    ranks = ranks or tuple(range(len(texts)))
    replies = tuple(Reply(text, rank) for text, rank in zip(texts, ranks, strict=True))
    return Ranked(ask(prompt), replies, "test", id or prompt)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Pairs


def test_pairs_and_ties_by_hand():
    group = ranked("hi", "a", "b", "c", "d", ranks=(0, 1, 1, 2))
    assert group.pairs == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert group.ties == [(1, 2)]


def test_the_corpus_is_ranked_with_the_flaw_of_each_worse_reply():
    groups = corpus_ranked()
    assert len(groups) > 1000
    for group in groups:
        assert [reply.rank for reply in group.replies] == list(range(len(group.replies)))
        assert not group.replies[0].flaw and all(reply.flaw for reply in group.replies[1:])
        assert group.prompt[-1].role == "user"
        assert len(group.pairs) == len(group.replies) * (len(group.replies) - 1) // 2


def test_flawed_replies_to_the_basics_stand_behind_the_written_one():
    known = {one.id: one for one in corpus.basics()}
    groups = corpus_flawed()
    assert len(groups) > 1000
    for group in groups:
        assert group.source == "everyday" and group.prompt == known[group.id].messages[:-1]
        good, *worse = group.replies
        assert good.text == known[group.id].messages[-1].content and not good.flaw
        assert len({reply.text for reply in group.replies}) == 4
        assert [reply.rank for reply in group.replies] == [0, 1, 1, 1]
        assert len(group.pairs) == 3 and all(reply.flaw for reply in worse)
        assert not any("\n" in reply.text for reply in group.replies), "no line break may tell"
    # But for the two that are about it, no flaw shows in the length.
    ratios: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        good, *worse = group.replies
        for reply in worse:
            ratios[reply.flaw].append(len(reply.text.split()) / len(good.text.split()))
    named = {reply.flaw for group in corpus_ranked() for reply in group.replies[1:]}
    assert ratios.keys() == named, "the same flaws by the same names"
    for flaw in named - {"toolong", "tooshort"}:
        assert 0.8 < statistics.median(ratios[flaw]) < 1.2, flaw


def test_graded_replies_stay_in_their_prompts_part_and_differ():
    groups = corpus_graded()
    assert len(groups) > 4000 and len({group.id for group in groups}) == len(groups)
    known = {one.id: one for one in (*corpus.dialogues(), *corpus.basics())}
    for group in groups:
        assert group.source == "graded" and group.weight == 1
        assert group.pairs and 2 <= len(group.replies) <= 4
        assert len({reply.text for reply in group.replies}) == len(group.replies)
        # In the second round, a story was also asked for behind a greeting.
        greeted = group.prompt[:1] == (Message("user", "hi"),)
        prompts = {group.prompt, group.prompt[2:] if greeted else group.prompt}
        if group.id in known:  # a prompt of a written conversation that fine-tuning may read
            assert prompts & set(prompts_of(known[group.id]))
        else:  # one that two writers made up
            assert group.id.startswith("d15_fresh-") and len(group.prompt) == 1
        assert split_of(group.id) == "train" or group.id.startswith("d15_fresh-")
    unseen = [group for group in groups if split_of(group.id) != "train"]
    assert len(unseen) > 100


# The split


def test_prompt_key_forgets_what_does_not_matter():
    assert prompt_key(ask("Hi,  THERE!")) == prompt_key(ask("hi there")) == "hi there"
    assert prompt_key((Message("system", "Be kind."), *ask("hi"))) == prompt_key(ask("hi"))
    assert prompt_key(ask("a", "b", "c")) != prompt_key(ask("a", "x", "c"))
    assert prompt_key(ask("?!")) != prompt_key(ask("..."))


def test_no_prompt_on_two_sides():
    groups = corpus_ranked()
    # The same prompts again, written otherwise and under ids that fall on other sides.
    copies = [
        Ranked(
            ask(*(f" {m.content.upper()}  " for m in g.prompt)), g.replies, "copy", f"copy-{g.id}"
        )
        for g in groups[:600]
        if g.prompt[0].role == "user"
    ]
    parts = by_part([*groups, *copies])
    keys = [{prompt_key(group.prompt) for group in part} for part in parts.values()]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert set.union(*keys) == {prompt_key(group.prompt) for group in groups}
    for part, found in parts.items():
        assert all(split_of(group.id) == part for group in found)
    # Order of the input changes nothing.
    backwards = by_part([*groups, *copies][::-1])
    assert {g.id for g in backwards["test"]} == {g.id for g in parts["test"]}


def test_the_judges_half_is_about_half_and_disjoint():
    train = by_part(corpus_ranked())["train"]
    halves = {True: set(), False: set()}
    for group in train:
        halves[for_judge(group.prompt)].add(prompt_key(group.prompt))
    assert not halves[True] & halves[False]
    assert 0.45 < len(halves[True]) / sum(map(len, halves.values())) < 0.55
    assert for_judge(ask("Hi,  THERE!")) == for_judge(ask("hi there"))
    # Another hash than the split's: each part has its half.
    test = by_part(corpus_ranked())["test"]
    assert 0.3 < sum(for_judge(group.prompt) for group in test) / len(test) < 0.7


# Files


def test_pairs_and_scores_from_files(tmp_path):
    pair = {"prompt": said("hi"), "chosen": "Hello!", "rejected": "No.", "neg": "rude"}
    scores = {
        "prompt": said("bye"),
        "responses": [
            {"text": "what", "score": 0, "by": "off_topic"},
            {"text": "See you", "score": 3},
            {"text": "Bye", "score": 3},
            {"text": "ok", "score": 1.5},
        ],
    }
    nothing = {"prompt": said("x"), "responses": [{"text": "a", "score": 1}]}
    same = {"prompt": said("y"), "chosen": "a", "rejected": "a"}
    silent = {"prompt": said("z"), "chosen": " ", "rejected": "a"}
    path = write(tmp_path / "some.jsonl", pair, scores, nothing, same, silent)
    one, two = read_ranked(path, "some", 0.3)
    assert [(r.text, r.rank, r.flaw) for r in one.replies] == [
        ("Hello!", 0, ""),
        ("No.", 1, "rude"),
    ]
    assert [(r.text, r.rank) for r in two.replies] == [
        ("See you", 0),
        ("Bye", 0),
        ("ok", 1),
        ("what", 2),
    ]
    assert two.replies[3].flaw == "off_topic"
    assert (one.weight, one.source) == (0.3, "some")
    assert one.id != two.id


def test_a_turn_in_two_pieces_becomes_one(tmp_path):
    prompt = [*said("one"), *said("two"), {"role": "assistant", "content": "x"}, *said("three")]
    path = write(tmp_path / "r.jsonl", {"prompt": prompt, "chosen": "a", "rejected": "b"})
    (group,) = read_ranked(path, "r")
    assert group.prompt == ask("one\ntwo", "x", "three")
    assert tokenize_group(group, TOKENIZER, sequence=80) is not None


def test_written_and_read_again(tmp_path):
    group = Ranked(ask("hi"), (Reply("a", 0), Reply("b", 1, "echo", False)), "mine", "id-7", 0.5)
    write_ranked(tmp_path / "deep" / "on_policy.jsonl", [group])
    assert read_ranked(tmp_path / "deep" / "on_policy.jsonl", "mine", 0.5) == [group]


def test_public_files_are_capped_by_a_hash(tmp_path, monkeypatch):
    folder = tmp_path / "preference"
    folder.mkdir()
    records = [{"prompt": said(f"p{n}"), "chosen": "yes", "rejected": "no"} for n in range(20)]
    path = folder / "hh_harmless_test.jsonl.zst"
    zstandard = pytest.importorskip("zstandard")

    def store(some):
        text = "".join(json.dumps(record) + "\n" for record in some)
        path.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))

    monkeypatch.setattr(preferences, "PUBLIC", {"hh_harmless_test": (1.0, 5)})
    store(records)
    kept = {group.id for group in public_ranked(tmp_path, ["hh_harmless_test"])}
    store(records[::-1])
    assert {group.id for group in public_ranked(tmp_path, ["hh_harmless_test"])} == kept
    assert len(kept) == 5


def test_ratings(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "preference").mkdir()
    record = {"prompt": said("hi"), "responses": [{"text": "Hello!", "score": 4}]}
    path = tmp_path / "preference" / "topical_chat_turn_ratings_sub.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(json.dumps(record).encode()))
    (one,) = read_rated(tmp_path)
    assert (one.prompt, one.text, one.mark) == (ask("hi"), "Hello!", 4)


def test_votes(tmp_path):
    vote = {"prompt": said("hi"), "a": "Yo", "b": "Hello!"}
    path = write(tmp_path / "v.jsonl", *({**vote, "winner": w} for w in ("a", "b", "tie", "bad")))
    a, b, tie, bad = read_votes(path)
    assert [reply.text for reply in a.replies] == ["Yo", "Hello!"]
    assert [reply.text for reply in b.replies] == ["Hello!", "Yo"]
    assert a.pairs == b.pairs == [(0, 1)]
    assert tie.pairs == bad.pairs == [] and tie.ties == [(0, 1)]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"prompt": said("hi"), "a": "x", "b": "y", "winner": "c"},
            "winner.*'c'.*a, b, tie or bad",
        ),
        ({"prompt": said("hi"), "a": "x", "winner": "a"}, "needs two replies"),
        ({"a": "x", "b": "y", "winner": "a"}, "needs a list of messages"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "a": "x", "b": "y", "winner": "a"},
            "not a user's",
        ),
    ],
)
def test_votes_that_cannot_be_read(tmp_path, record, sentence):
    with pytest.raises(DataError, match=sentence):
        read_votes(write(tmp_path / "votes.jsonl", record))


def test_no_votes(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no votes"):
        read_votes(tmp_path / "blank.jsonl")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": said("hi"), "chosen": "x"}, '"responses", or texts'),
        ({"prompt": said("hi"), "responses": [{"text": "x"}]}, 'needs a "text" and a "score"'),
        ({"prompt": [], "responses": []}, "needs a list of messages"),
    ],
)
def test_ranked_files_that_cannot_be_read(tmp_path, record, sentence):
    with pytest.raises(DataError, match=sentence):
        read_ranked(write(tmp_path / "r.jsonl", record), "r")


# Rules for samples


@pytest.mark.parametrize(
    ("text", "ended", "flaw"),
    [
        ("Cats like fish, and so do I.", True, ""),
        ("No.", True, ""),
        ("", True, "empty"),
        ("?! ...", True, "empty"),
        ("Sure <|end|>", True, "broken"),
        ("Fine.\nUser: and dogs?", True, "broken"),
        ("caf\ufffd", True, "broken"),
        ("A user: that is a person.", True, ""),
        ("I like cats. I like cats. I like cats.", True, "repetition"),
        ("very very very very good", True, "repetition"),
        ("It was a very, very good day.", True, ""),
        ("Well, the thing is that", False, "unfinished"),
        ("What do cats eat for breakfast?", True, "echo"),
        ("What do cats eat for breakfast? Mostly fish and a little bit of milk.", True, ""),
    ],
)
def test_rules(text, ended, flaw):
    assert flaw_of(ask("what do cats eat for breakfast"), text, ended) == flaw


def test_the_worst_flaw_is_named():
    assert flaw_of(ask("hi"), "", False) == "empty"
    assert flaw_of(ask("hi"), "so so so so", False) == "repetition"


def test_repeated_share_by_hand():
    # a b c, b c a, c a b, a b c, b c a: two of five runs came before.
    assert repeated_share("a b c a b c a") == pytest.approx(2 / 5)
    assert repeated_share("a b") == 0


def test_samples_are_ranked_below_the_written_reply():
    calm = [("", True), ("Fish.", True), ("Mice, mostly.", True)]
    hot = [("Fish and", False), ("Milk.", True), ("Fish.", True), ("Fishymilk.", True)]
    group = rank_samples(ask("what do cats eat"), "Mice, mostly.", [calm, hot], "id")
    assert [(reply.text, reply.rank, reply.flaw) for reply in group.replies] == [
        ("Mice, mostly.", 0, ""),
        ("Fish.", 1, ""),  # drawn twice: the calm one counts
        ("Milk.", 2, ""),
        ("Fishymilk.", 3, "made-up word"),
        ("Fish and", 4, "unfinished"),
        ("", 5, "empty"),
    ]
    assert not group.replies[4].ended
    # Where nobody has written a reply, the calm sample is the best.
    group = rank_samples(ask("what do cats eat"), None, [calm[1:2], hot[1:2]], "id")
    assert [(reply.text, reply.rank) for reply in group.replies] == [("Fish.", 0), ("Milk.", 1)]
    assert not rank_samples(ask("hi"), None, [[("Hi.", True)], [("Hi.", True)]], "id").pairs


def test_sampling_from_a_model():
    model = ScriptedGPT(["Yes."])
    long = ranked("x" * 300, "too long", "y", id="two")
    groups = [ranked("hello", "Hi!", "no", id="one"), long]
    ways = [Sampling(max_tokens=20, seed=0), Sampling(max_tokens=20, seed=1)]
    (group,) = sample_ranked(model, TOKENIZER, groups, ways, count=2)
    assert [(r.text, r.rank, r.ended) for r in group.replies] == [
        ("Hi!", 0, True),
        ("Yes.", 1, True),
    ]
    assert (group.id, group.source) == ("one", "on-policy")


def test_a_model_that_never_ends_is_caught():
    model = UniformGPT()
    torch.manual_seed(0)
    ways = [Sampling(max_tokens=3, seed=1, temperature=1.0)]
    (group,) = sample_ranked(model, TOKENIZER, [ranked("hello", "Hi!", "no")], ways, count=4)
    assert all(reply.flaw for reply in group.replies[1:])


def test_words_of_the_corpus_and_of_the_conversation_are_known():
    known = known_words()
    assert {"fox", "monday", "tinychat", "tuesday"} <= known and "stickericky" not in known
    assert not is_made_up(ask("who is Grzegorz?"), "GRZEGORZ isn't here. 42!", True)
    assert is_made_up(ask("who is Grzegorz?"), "Grzegorzes are here.", True)
    assert not is_made_up(ask("hi"), "", True)


# Tokens


def test_tokens_of_a_group():
    group = tokenize_group(ranked("ab", "X", "YZ"), TOKENIZER, sequence=40)
    assert group is not None
    b = 7
    prompt = (2, 5, b + 97, b + 98, 3, 6)
    assert group.start == len(prompt)
    assert group.tokens == ((*prompt, b + 88, 3), (*prompt, b + 89, b + 90, 3))
    assert group.pairs == ((0, 1),) and group.weights == (1.0,)


def test_an_unfinished_reply_has_no_end():
    replies = (Reply("X", 0), Reply("Y", 1, "unfinished", ended=False))
    group = tokenize_group(Ranked(ask("a"), replies, "t", "i"), TOKENIZER, sequence=40)
    assert group is not None
    assert [tokens[-1] for tokens in group.tokens] == [3, 7 + 89]


def test_what_does_not_fit_is_left_out():
    long = "z" * 50
    assert tokenize_groups([ranked("a", "X", long)], TOKENIZER, sequence=40) == []
    assert tokenize_groups([ranked("a" * 60, "X", "Y")], TOKENIZER, sequence=40) == []
    (group,) = tokenize_groups([ranked("a", "X", long, "Y")], TOKENIZER, sequence=40)
    assert [reply.text for reply in group.ranked.replies] == ["X", "Y"]
    # Of many replies, some of all ranks stay, and their pairs weigh as much as one pair elsewhere.
    (group,) = tokenize_groups([ranked("a", *"bcdefghij")], TOKENIZER, sequence=40, most=4)
    assert [reply.text for reply in group.ranked.replies] == ["b", "e", "g", "j"]
    assert sum(group.weights) == pytest.approx(1.0)


def test_batches_are_repeatable_and_start_anywhere():
    groups = tokenize_groups(
        [ranked("p" * (1 + n % 9), "X", "Y", id=str(n)) for n in range(50)], TOKENIZER, sequence=64
    )
    stream = GroupBatches(groups, 4, seed=1)
    assert sorted(stream.order(0)) == list(range(50)) and stream.order(0) != stream.order(1)

    def first(start: int, count: int) -> list[list[str]]:
        batches = stream.batches(start)
        return [[group.ranked.id for group in next(batches)] for _ in range(count)]

    assert first(0, 30)[13:] == first(13, 17)
    with pytest.raises(DataError, match="no ranked replies"):
        GroupBatches([], 4, 0)
