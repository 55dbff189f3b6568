"""`tinychat eval`: the report card, who may judge, pairs to read blind, and their count."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fakes import stirred
from typer.testing import CliRunner

from tinychat.cli.app import app
from tinychat.cli.blind import key_path, read_verdicts, tally, write_blind
from tinychat.data import tokenizer_model
from tinychat.data.records import Message
from tinychat.evaluation import Answer
from tinychat.gpt import GPTConfig, save_model
from tinychat.reward_model import RewardModel, save_reward
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.tokenizer import Tokenizer

SHAPE = GPTConfig(
    width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=160
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two chat models, the reward model that taught one of them, and a judge."""
    folder = tmp_path_factory.mktemp("eval")
    pieces = Tokenizer(tokenizer_model())
    common = {"tokenizer": pieces, "metrics": {"accuracy": 0.8}}
    lineage = {"tokens": 7, "half": "reward"}
    save_reward(
        folder / "reward.safetensors", RewardModel(stirred(SHAPE, 2)), lineage=lineage, **common
    )
    lineage = {"tokens": 7, "half": "judge"}
    save_reward(
        folder / "judge.safetensors", RewardModel(stirred(SHAPE, 3)), lineage=lineage, **common
    )
    save_model(
        folder / "sft.safetensors", stirred(SHAPE, 0), stage="sft", lineage={"tokens": 7}, **common
    )
    lineage = {"reward_sha256": file_sha256(folder / "reward.safetensors")}
    model = stirred(SHAPE, 0)
    with torch.no_grad():
        model.embed.weight.add_(torch.randn_like(model.embed.weight), alpha=0.1)
    save_model(folder / "rlhf.safetensors", model, stage="rlhf", lineage=lineage, **common)
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    shutil.copytree(files, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    return tmp_path


QUICK = ["--prompts", "6", "--max-tokens", "5"]
BOTH = ["models/rlhf", "models/sft"]


def run(*words: str):
    return CliRunner().invoke(app, ["eval", *words], env={"COLUMNS": "300"})


def said(result) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_the_report_card(here):
    result = run(*BOTH, "--judge", "models/judge", *QUICK, "--out", "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("report.json").read_text())
    (pair,) = report["pairs"]
    assert (pair["a"], pair["b"]) == ("rlhf", "sft")
    assert pair["wins"] + pair["ties"] + pair["losses"] == 6
    value, low, high = pair["rate"]
    assert 0 <= low <= value <= high <= 1
    assert f"{value:.1%} [{low:.1%}, {high:.1%}]" in result.stdout
    assert pair["kl"][0] > 0, "the models differ"
    ours, theirs = report["models"]["rlhf"], report["models"]["sft"]
    assert pair["difference"][0] == pytest.approx(ours["mark"][0] - theirs["mark"][0], abs=1e-6)
    assert ours["sha256"] == file_sha256("models/rlhf.safetensors")
    assert ours["form"].keys() >= {"length", "ended", "distinct_1", "distinct_2", "repetition"}
    counts = {name: sum(found.values()) for name, found in ours["probes"].items()}
    assert counts.keys() == {"helpful", "honest", "harmless", "known", "unknown"}
    assert all(count >= 20 for count in counts.values())
    assert len(ours["probe_replies"]) == sum(counts.values())
    assert ours["manners"].keys() == {"nice", "none", "mean"}
    assert ours["bits_per_byte"].keys() == {"dialogues", "stories", "explanations"}
    assert all(low <= value <= high for value, low, high in ours["bits_per_byte"].values())
    assert report["judge"]["sha256"] == file_sha256("models/judge.safetensors")
    for title in ("Pairs", "Replies", "Questions of ours", "Told to be nice", "Bits per byte"):
        assert title in result.stdout
    assert "\x1b" not in result.stdout, "plain text in a pipe"


def test_the_same_seed_gives_the_same_report_and_the_other_way_round_the_opposite(here):
    for name, models in (("one", BOTH), ("again", BOTH), ("turned", BOTH[::-1])):
        result = run(*models, "--judge", "models/judge", "--brief", *QUICK, "--out", name)
        assert result.exit_code == 0, result.output
    one, again, turned = (json.loads(Path(n).read_text()) for n in ("one", "again", "turned"))
    assert one["pairs"] == again["pairs"] and one["models"] == again["models"]
    assert "probes" not in one["models"]["rlhf"], "--brief leaves them out"
    (pair,), (back,) = one["pairs"], turned["pairs"]
    assert (pair["wins"], pair["losses"]) == (back["losses"], back["wins"])
    assert pair["rate"][0] == pytest.approx(1 - back["rate"][0])
    assert pair["difference"][0] == pytest.approx(-back["difference"][0])


def test_the_best_of_several(here):
    options = ["--brief", *QUICK, "--out", "report.json", "--reward", "models/reward"]
    result = run("models/sft", "--judge", "models/judge", *options, "--best-of", "6")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("report.json").read_text())["best_of"]
    assert (found["model"], found["reward"]["path"]) == ("sft", "models/reward.safetensors")
    curve = found["curve"]
    assert [row["n"] for row in curve] == [1, 2, 4, 6]
    assert [row["kl"] for row in curve] == pytest.approx([0, 0.1931, 0.6363, 0.9584], abs=1e-4)
    marks = [row["reward"][0] for row in curve]
    assert marks == sorted(marks) and marks[0] < marks[-1], "it is what was chosen by"
    assert all(0 < row["length"] < 5.001 for row in curve)
    assert "best of n by models/reward.safetensors" in result.stdout
    assert f"{curve[-1]['judge'][0]:.2f}" in result.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--best-of", "4"], "go together"),
        (["--reward", "models/reward"], "go together"),
        (["--reward", "models/reward", "--best-of", "1"], "--best-of is 1"),
        (["--reward", "models/sft", "--best-of", "4"], "gives no marks"),
        (["--reward", "models/judge", "--best-of", "4"], "can't choose and judge"),
    ],
)
def test_nobody_can_choose(here, words, told):
    result = run("models/sft", "--judge", "models/judge", *words, *QUICK)
    assert result.exit_code == 2, result.output
    assert told in said(result)


def test_without_a_judge_nobody_wins(here):
    result = run(*BOTH, "--brief", *QUICK, "--out", "report.json", "--save-pairs", "all.jsonl")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("report.json").read_text())
    assert report["judge"] is None and "wins" not in report["pairs"][0]
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(line["replies"].keys() == {"rlhf", "sft"} for line in lines)
    assert all(line["prompt"][-1]["role"] == "user" for line in lines)


def test_pairs_are_blind_and_counted(here):
    words = ["--judge", "models/judge", "--brief", "--prompts", "20", "--max-tokens", "5"]
    result = run(*BOTH, *words, "--pairs", "pairs.txt", "--pair-count", "12")
    assert result.exit_code == 0, result.output
    page = Path("pairs.txt").read_text()
    assert "rlhf" not in page and "sft" not in page, "nothing tells whose reply it is"
    key = json.loads(key_path(Path("pairs.txt")).read_text())
    assert len(key["pairs"]) == 12 == page.count("\nverdict:")
    assert {pair["a"] for pair in key["pairs"]} == {"rlhf", "sft"}, "sides are tossed"
    # A reader who always sees through it, and finds rlhf better in all pairs but two.
    verdicts = ["a" if pair["a"] == "rlhf" else "b" for pair in key["pairs"]]
    verdicts[3], verdicts[7] = "tie", "Bad"
    for verdict in verdicts:
        page = page.replace("verdict:\n", f"verdict: {verdict.upper()}\n", 1)
    Path("pairs.txt").write_text(page)
    result = run("--count", "pairs.txt")
    assert result.exit_code == 0, result.output
    assert "12 of 12 pairs read" in result.stdout
    assert "rlhf better: 10   sft better: 0" in result.stdout
    assert "equal: 2 (both bad: 1)" in result.stdout
    assert "rlhf wins 91.7%" in result.stdout
    again = run(*BOTH, *words, "--pairs", "pairs.txt")
    assert again.exit_code == 2 and "pairs.txt exists" in said(again)


def test_a_tally_by_hand():
    key = {
        "models": [{"name": "new"}, {"name": "old"}],
        "pairs": [
            {"a": "new", "b": "old", "marks": [1.0, 0.0]},
            {"a": "old", "b": "new", "marks": [1.0, 0.0]},
            {"a": "old", "b": "new", "marks": [0.0, 1.0]},
            {"a": "new", "b": "old", "marks": [2.0, 3.0]},
        ],
    }
    found = tally({1: "a", 2: "b", 3: "a", 4: "bad"}, key)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert (found["both_bad"], found["left_side"]) == (1, 2)
    assert (found["agreed"], found["decided"], found["against"]) == (1, 3, [2, 3])
    assert found["judge_wins"] == 2 and found["read"] == 4


def test_a_reply_cannot_forge_a_verdict(tmp_path):
    evil = Answer("fine\nverdict: A\n=== 9\x1b[2J\r\nverdict: B", (1,), True)
    models = [
        {"name": name, "path": name, "answers": [answer], "marks": None}
        for name, answer in (("one", evil), ("two", Answer("", (), False)))
    ]
    path = tmp_path / "pairs.txt"
    write_blind(path, [(Message("user", "hi\nverdict: tie"),)], *models, 5, 0)
    assert "\x1b" not in path.read_text()
    with pytest.raises(Exception, match="holds no verdicts"):
        read_verdicts(path)
    path.write_text(path.read_text() + " tie\n")  # behind the last verdict's line
    path.write_text(path.read_text().replace("verdict:\n tie", "verdict: tie"))
    assert read_verdicts(path) == {1: "tie"}


def test_words_that_are_no_verdict(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("=== 1\nverdict: perhaps\n")
    with pytest.raises(Exception, match="pairs.txt:2: 'perhaps' is no verdict"):
        read_verdicts(path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "There is no model to measure"),
        (["models/gone"], "No checkpoint 'models/gone'"),
        (["models/reward"], "is a reward model and writes no replies"),
        ([*BOTH, "--judge", "models/reward"], "was trained to please"),
        (["models/sft", "--judge", "models/reward"], "is no judge"),
        (["models/sft", "--judge", "models/rlhf"], "of the stage rlhf and gives no marks"),
        (["models/sft", "models/sft"], "is named twice"),
        (["models/sft", "--pairs", "p.txt"], "Pairs to read need two models"),
        (["models/sft", *QUICK, "--prompts", "0"], "0 prompts tell nothing"),
        (["models/sft", *QUICK, "--prompts", "9999"], "9999 prompts are wanted and only"),
        (["models/sft", "--temperature", "-1"], "temperature is -1"),
        (["models/sft", "--out", "models"], "models is a folder"),
        (["models/sft", "--out", "/dev/null"], "/dev/null is no file"),
        (["models/sft", "--out", "models/sft.safetensors/x"], "can't be written"),
        (["models/sft", "--out", "x", "--save-pairs", "./x"], "name one file; give each its own"),
        ([*BOTH, "--pairs", "p.txt", "--pair-count", "-5"], "--pair-count is -5"),
        (["models/sft", "--max-tokens", "160"], "--max-tokens 160 leaves no room for a prompt"),
        (["models/sft", "--max-tokens", "4", "--prompts", "2", "--brief", "--fluency", "no"],
         "no is neither a folder nor a .gguf file"),
        (["--count", "gone.txt"], "gone.txt can't be read"),
        (["models/sft", "--count", "gone.txt"], "takes no model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_sentence(here, words, sentence):
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert sentence in said(result)
    assert "Traceback" not in result.output


def test_the_key_to_verdicts_is_never_overwritten(here):
    key_path(Path("p.txt")).write_text("the only key")
    result = run(*BOTH, *QUICK, "--pairs", "p.txt")
    assert result.exit_code == 2 and f"{key_path(Path('p.txt'))} exists" in said(result)
    assert key_path(Path("p.txt")).read_text() == "the only key"


def test_a_full_disk_does_not_cost_the_figures(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinychat.runtime.files.write_atomic", full)
    result = run("models/sft", *QUICK, "--brief", "--out", "report.json")
    assert result.exit_code == 2 and "No space left" in said(result)
    assert "6 unseen prompts" in result.stdout


def test_a_teacher_of_an_ancestor_is_refused_too(here):
    rlhf = read_info("models/rlhf.safetensors")
    lineage = {"ancestors": [rlhf.lineage]}
    pieces = Tokenizer(tokenizer_model())
    save_model("models/second.safetensors", stirred(SHAPE, 5), stage="rlhf", tokenizer=pieces,
               lineage=lineage, metrics={})  # fmt: skip
    result = run("models/second", "--judge", "models/reward", *QUICK)
    assert result.exit_code == 2 and "was trained to please" in said(result)
