"""The file of votes: durable lines, torn ends, the tally and its interval."""

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tinychat.cli.tally import tally, wilson
from tinychat.cli.votes import Maker, Vote, append, check_file, records, voted
from tinychat.data.preferences import prompt_key, read_votes
from tinychat.data.records import Message
from tinychat.runtime.errors import DataError

SFT = Maker("sft.safetensors", "sft", "5" * 64, 7, "end")
RLHF = Maker("rlhf.safetensors", "rlhf", "9" * 64, 8, "length")


def vote(winner="a", left="a", a=SFT, b=RLHF, question="hi", **more) -> Vote:
    return Vote(
        (Message("user", question),), "One.", "Two.", winner, left, {"a": a, "b": b},
        {"temperature": 0.8, "seed": None}, **more,
    )  # fmt: skip


def fill(path: Path, *votes: Vote) -> Path:
    for one in votes:
        append(path, one)
    return path


# The file


def test_a_vote_is_one_private_line_that_training_reads(tmp_path):
    path = tmp_path / "new" / "votes.jsonl"
    system = Message("system", "Be kind.")
    one = Vote(
        (system, Message("user", "Grüße \ud83d 漢字")), "A\nb", "“c”", "b", "b",
        {"a": SFT, "b": RLHF}, {"temperature": 0.8, "seed": 3},
    )  # fmt: skip
    fill(path, one, vote("tie"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 3 and lines[2] == b""
    record = json.loads(lines[0])
    assert record["winner"] == record["left"] == "b"
    assert record["made"]["b"] == {
        "name": "rlhf.safetensors", "stage": "rlhf", "sha256": "9" * 64, "seed": 8,
        "ended": "length",
    }  # fmt: skip
    assert record["sampling"] == {"temperature": 0.8}  # each reply has its own seed
    assert record["time"].endswith("Z") and record["tinychat"]
    first, second = read_votes(path)
    assert first.prompt[0] == system and [r.text for r in first.replies] == ["“c”", "A\nb"]
    assert [r.rank for r in first.replies] == [0, 1] and [r.rank for r in second.replies] == [0, 0]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b'{"prompt": [{"role": "us', 1),  # a crash
        (b"x" * 200_000, 1),
        (b'{"prompt": [], "a": "", "b": "", "winner": "tie"}', 2),  # an editor
        (b"", 1),
    ],
    ids=["torn", "torn and long", "whole", "closed"],
)
def test_the_next_vote_mends_the_end_of_the_file(tmp_path, tail, kept):
    path = fill(tmp_path / "votes.jsonl", vote())
    with path.open("ab") as file:
        file.write(tail)
    assert len(list(records(path))) == kept
    append(path, vote("b"))
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [one["winner"] for one in found] == ["a", *["tie"] * (kept - 1), "b"]


def test_training_reads_what_duel_reads(tmp_path):
    path = fill(tmp_path / "votes.jsonl", vote())
    with path.open("ab") as file:
        file.write(b'{"prompt": [{"role": "us')
    assert len(read_votes(path)) == len(list(records(path))) == 1


def test_a_file_of_which_nothing_is_whole(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_bytes(b'{"prom')
    assert list(records(path)) == []
    append(path, vote())
    assert len(path.read_bytes().splitlines()) == 1


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "votes.jsonl"
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\nfrom test_votes import vote\n"
        "from tinychat.cli.votes import append\n"
        "for _ in range(30): append(Path(sys.argv[1]), vote(question='x' * 9000))"
    )
    here = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", script, str(path), here]
    writers = [subprocess.Popen(command, env=env) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(list(records(path))) == 60


def test_a_file_that_cannot_take_votes(tmp_path):
    path = tmp_path / "notes.jsonl"
    check_file(path)
    assert not path.exists()  # nothing is left behind by asking
    path.write_text('{"text": "a diary"}\n')
    with pytest.raises(DataError, match=r"notes\.jsonl:1 is no vote .* name another file"):
        check_file(path)
    path.write_text("a diary\n")
    with pytest.raises(DataError, match="is not a JSON object"):
        check_file(path)
    with pytest.raises(OSError, match=r"[Dd]irectory"):
        check_file(tmp_path)
    with pytest.raises(OSError, match=r"[Dd]irectory|exists"):
        check_file(path / "below")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "a": "x", "b": "y", "winner": "a"},
        {"prompt": [{"role": "user"}], "a": "x", "b": "y", "winner": "a"},
        {"prompt": [], "a": 1, "b": "y", "winner": "a"},
        {"prompt": [], "a": "x", "b": "y", "winner": "left"},
    ],
)
def test_lines_that_are_no_votes(tmp_path, record):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=r"votes\.jsonl:1 is no vote"):
        tally(path)


# What the file says


@pytest.mark.parametrize("count", [1, 7, 50, 300])
def test_wilson_agrees_with_chapter_13(count):
    from tinychat import evaluation

    for half_points in range(2 * count + 1):
        points = half_points / 2
        expected = evaluation.wilson(points, count)[1:]
        assert wilson(points / count, count) == pytest.approx(expected, abs=1e-9)


def test_wilson_by_hand():
    # 5 of 10 and z = 2: (0.5 + 0.2 -+ 2 sqrt(0.025 + 0.01)) / 1.4
    low, high = wilson(0.5, 10, z=2.0)
    assert low == pytest.approx((0.7 - 2 * math.sqrt(0.035)) / 1.4)
    assert high == pytest.approx((0.7 + 2 * math.sqrt(0.035)) / 1.4)
    assert wilson(0.0, 10)[0] == 0.0 and 0.2 < wilson(0.0, 10)[1] < 0.3
    assert wilson(1.0, 3)[1] == 1.0 and wilson(1.0, 3)[0] < 0.5  # three of three prove little


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_wilsons_ends_are_where_the_test_of_the_share_just_fails(rate):
    for end in wilson(rate, 40):
        assert abs(rate - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 40))


def test_a_tally_by_hand(tmp_path):
    path = fill(
        tmp_path / "votes.jsonl",
        vote("a", left="a"), vote("a", left="b"), vote("b", left="a"), vote("tie"), vote("bad"),
        vote("a", a=RLHF, b=SFT, left="a"),  # the other way round: rlhf's second win
        vote("a", b=None), vote("b", b=SFT, left="b"),
    )  # fmt: skip
    found = tally(path)
    score, itself = found.scores
    assert (score.a, score.b, score.same) == ("sft", "rlhf", False)
    assert (score.wins, score.losses, score.ties, score.bad, score.votes) == (2, 2, 1, 1, 6)
    assert score.rate == 0.5 and score.interval == wilson(0.5, 6)
    assert (itself.a, itself.b, itself.same, itself.votes) == ("sft", "sft", True, 1)
    assert found.unknown == 1
    # Decided: six; the one shown first won in votes 1, 6, 7 and 8.
    assert (found.left, found.decided) == (4, 6)
    pair = tally(path, frozenset((SFT.sha256, RLHF.sha256)))
    assert len(pair.scores) == 1 and pair.unknown == 0 and (pair.left, pair.decided) == (2, 4)


def test_two_files_of_one_name_are_told_apart(tmp_path):
    old = Maker("sft.safetensors", "sft", "1" * 64, None, "end")
    path = fill(tmp_path / "votes.jsonl", vote(), vote(a=old), vote(a=old, b=SFT))
    assert [(score.a, score.b) for score in tally(path).scores] == [
        ("sft (55555555)", "rlhf"),
        ("sft (11111111)", "rlhf"),
        ("sft (11111111)", "sft (55555555)"),
    ]


def test_votes_without_their_makers_count_as_unknown(tmp_path):
    path = tmp_path / "votes.jsonl"
    turns = [{"role": "user", "content": "hi"}]
    record = {"prompt": turns, "a": "x", "b": "y", "winner": "a"}
    odd = [{}, {"made": 3}, {"made": {"a": "sft"}}, {"made": {"a": {"name": 1, "sha256": "2"}}}]
    path.write_text("".join(json.dumps(record | more) + "\n" for more in odd))
    found = tally(path)
    assert (found.scores, found.unknown, found.decided) == ([], 4, 0)


def test_prompts_that_have_a_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    pair = frozenset((SFT.sha256, RLHF.sha256))
    assert voted(path, pair) == set()
    fill(path, vote(question="Hi!"), vote(a=RLHF, b=SFT, question="you"), vote(b=SFT, question="x"))
    assert voted(path, pair) == {prompt_key([Message("user", text)]) for text in ("hi", "you")}
    assert voted(path, frozenset((SFT.sha256,))) == {"x"}
