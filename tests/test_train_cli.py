"""`tinychat train` from outside: real small runs, Ctrl-C, resuming, and every kind of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import TORCHRUN
from typer.testing import CliRunner

from tinychat.cli.app import app
from tinychat.cli.lineage import tokens_read
from tinychat.cli.processes import check_shared_alike
from tinychat.cli.progress import SAMPLE_PROMPTS, clock
from tinychat.cli.runs import (
    check_as_begun,
    data_as_begun,
    make_mix,
    override,
    run_folder,
    settings_of,
    write_record,
)
from tinychat.data import tokenizer_model
from tinychat.gpt import GPT, GPTConfig, load_model, save_model
from tinychat.pretraining import TrainConfig
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.runtime.errors import ConfigError
from tinychat.runtime.metrics import read_metrics
from tinychat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ["--set", "batch=2", "--set", "compiled=false", "--set", "precision=fp32"]
BASE = ["--preset", "nano", "--minutes", "1", *PLAIN, "--set", "sequence=32"]
SFT = [*PLAIN, "--set", "sequence=128", "--set", "batch=16"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path, monkeypatch, cache) -> Path:
    """An empty folder to work in, without public data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYCHAT_CACHE", str(cache))
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    return tmp_path


def environment(cache: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TINYCHAT_DATA"}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "TINYCHAT_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> Path:
    """A folder in which the program itself has trained a base for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, "-m", "tinychat", "train", "base", *BASE, "--set", "steps=2"],
        cwd=folder,
        env=environment(cache),
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def run(*words: str):
    return CliRunner().invoke(app, ["train", *words], env={"COLUMNS": "300"})


def told(result) -> str:
    """What an error says, once it is sure that it is one sentence and no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert text.startswith("Error") or "Error " in text, text
    return text


def picture(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: what must not change."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_model(path: Path, stage: str, context: int = 512) -> Path:
    torch.manual_seed(0)
    shape = GPTConfig(
        width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=context
    )
    save_model(
        path,
        GPT(shape),
        stage=stage,
        tokenizer=Tokenizer(tokenizer_model()),
        lineage={"tokens": 7},
        metrics={},
    )
    return path


# Runs


def test_base_offline_on_the_embedded_corpus(trained):
    folder = trained / "runs" / "base"
    info = read_info(folder / "base.safetensors")
    assert info.stage == "base"
    assert set(info.lineage["data"]) == {"stories", "explanations", "dialogues", "basics"}
    assert {source["licence"] for source in info.lineage["data"].values()} == {"CC0-1.0"}
    assert (info.lineage["tokens"], info.lineage["steps"]) == (2 * 2 * 32, 2)
    assert info.lineage["settings"]["batch"] == 2
    assert 5 < info.metrics["loss"] < 12
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    record = json.loads((folder / "run.json").read_text())
    assert record["preset"] == "nano" and "steps=2" in record["set"]
    samples = (folder / "samples.txt").read_text(encoding="utf-8")
    said = (trained / "said.txt").read_text(encoding="utf-8")
    assert all(prompt in samples for prompt in SAMPLE_PROMPTS)
    assert samples.strip() in said and "bits per byte on unseen stories" in said


def test_other_processes_must_read_as_many_rows(tmp_path):
    begun = {"processes": 2, "rows": 16}
    for world, rows in ((2, 16), (1, 16), (4, 16), (2, 8)):  # a new batch of the same is a wish
        check_shared_alike(tmp_path, begun, world, rows)
    check_shared_alike(tmp_path, {}, 8, 64)  # a run of before; nobody knows
    with pytest.raises(
        ConfigError, match="2 processes with 16 rows .* 1 with 8; add --set batch=16"
    ):
        check_shared_alike(tmp_path, begun, 1, 8)


@pytest.mark.slow
def test_sft_by_two_processes_is_sft_by_one(trained, here, cache):
    """torchrun's two with 4 rows each read what one reads with 8; one checkpoint comes of it."""
    base = str(trained / "runs" / "base" / "base.safetensors")
    for run_name, begin, batch in (("two", TORCHRUN, 4), ("one", [sys.executable, "-m"], 8)):
        given = ["--from", base, "--run", run_name, *SFT, "--set", f"batch={batch}"]
        done = subprocess.run(
            [*begin, "tinychat", "train", "sft", *given, "--set", "epochs=0.01"],
            cwd=here,
            env=environment(cache),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Talk to it") == 1
    one, two = (read_metrics(here / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    lineage = [read_info(here / "runs" / n / "sft.safetensors").lineage for n in ("one", "two")]
    assert [entry.get("processes") for entry in lineage] == [None, 2]
    # A process takes the mean over its own rows' replies, and these are not equally many.
    for key, spread in (("loss", 0.02), ("norm", 0.2)):
        assert [r[key] for r in one] == pytest.approx([r[key] for r in two], rel=spread)


def test_sft_on_that_base(trained, here):
    base = trained / "runs" / "base" / "base.safetensors"
    result = run("sft", "--from", str(base), "--preset", "nano", *SFT, "--set", "epochs=0.01")
    assert result.exit_code == 0, result.output
    assert "Talk to it: tinychat chat --ckpt" in result.output
    info = read_info("runs/sft/sft.safetensors")
    assert info.stage == "sft"
    assert info.lineage["parent"] == str(base)
    assert info.lineage["parent_sha256"] == file_sha256(base)
    assert info.lineage["ancestors"][0]["preset"] == "nano"
    assert info.metrics["bits_per_byte"]["unseen replies"] > 0
    assert "> what is your name?" in Path("runs/sft/samples.txt").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["info", "runs/sft/sft.safetensors"])
    assert "parent sha256" in shown.output and "an earlier training" in shown.output
    # It is finished, and says so instead of training again.
    before = picture(here)
    for words in ([], ["--from", str(base)]):
        again = run("sft", "--resume", *words)
        assert again.exit_code == 0 and "is finished already" in again.stdout
    # Nor does it go on with other things than it began with.
    write_model(here / "other.safetensors", "base")
    Path("mine.jsonl").touch()
    before |= picture(here)
    for words, sentence in (
        (["--longest", "9"], "was begun without --longest; leave --longest 9 out"),
        (["--data", "mine.jsonl"], "was begun without --data; leave --data mine.jsonl out"),
        (["--keep-all"], "was begun without --keep-all; leave --keep-all out"),
        (["--from", "other"], f"was begun with --from {base}; leave --from other.safetensors out"),
    ):
        assert sentence in told(run("sft", "--resume", *words))
    assert picture(here) == before


def test_a_finished_base(trained, here):
    shutil.copytree(trained / "runs", "runs")
    before = picture(here / "runs")
    result = run("base", "--resume")
    assert result.exit_code == 0 and "is finished already; give --minutes" in result.stdout
    assert picture(here / "runs") == before
    # Longer, when asked.
    longer = run("base", "--resume", "--set", "steps=3")
    assert longer.exit_code == 0, longer.output
    assert read_info("runs/base/base.safetensors").lineage["steps"] == 3
    # The next resumption knows of it. Another size can't go on with these weights.
    assert json.loads(Path("runs/base/run.json").read_text())["set"][-1] == "steps=3"
    assert "runs/base was begun with --preset nano; leave --preset mini out" in told(
        run("base", "--resume", "--preset", "mini")
    )


def test_a_longer_budget_is_remembered(trained, here):
    shutil.copytree(trained / "runs", "runs")
    assert run("base", "--resume", "--minutes", "0.01").exit_code == 0
    record = json.loads(Path("runs/base/run.json").read_text())
    assert "steps=2" not in record["set"] and record["minutes"] == 0.01
    # Stopped now, it would go on to its new end, and not be called finished after two steps.
    steps = read_info("runs/base/base.safetensors").lineage["steps"]
    Path("runs/base/base.safetensors").unlink()
    result = run("base", "--resume")
    assert result.exit_code == 0, result.output
    assert read_info("runs/base/base.safetensors").lineage["steps"] == steps > 2


def test_two_processes_never_work_in_one_folder(trained, here, holding):
    shutil.copytree(trained / "runs", "runs")
    before = picture(here)
    with holding("runs/base"):
        text = told(run("base", "--resume", "--set", "steps=3"))
    assert "Another tinychat is training in runs/base; wait until it ends" in text
    assert picture(here) == before


def test_minutes_undo_a_number_of_steps():
    record = {"set": ["batch=2", "steps=5", "epochs=3"]}
    assert settings_of(record, None, None) == record["set"]
    assert settings_of(record, ["seed=1"], 2.0) == ["batch=2", "seed=1"]


def test_killed_before_its_checkpoint_was_written(trained, here):
    shutil.copytree(trained / "runs", "runs")
    Path("runs/base/base.safetensors").unlink()
    result = run("base", "--resume")
    assert result.exit_code == 0, result.output
    first = read_info(trained / "runs/base/base.safetensors")
    again = read_info("runs/base/base.safetensors")
    assert again.metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-3)
    assert again.lineage["steps"] == 2
    one, two = (
        load_model(folder / "runs/base/base.safetensors")[0].state_dict()
        for folder in (trained, here)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_source_of_ones_own_and_a_start(trained, here, monkeypatch):
    Path("mine.txt").write_text("The fox ran. " * 200, encoding="utf-8")
    start = str(trained / "runs/base/base.safetensors")
    words = ["--source", "mine.txt", "--from", start, "--run", "own"]
    sized, unsized = [*BASE, "--set", "steps=1"], [*BASE[2:], "--set", "steps=1"]
    assert f"{start} is no mini model; leave --preset out" in told(
        run("base", "--preset", "mini", *unsized, *words)
    )
    # Of each mix of the run: how many sequences, and what was read before.
    asked: list[tuple[int, dict[str, float]]] = []

    def spy(train, sequence, seed, total, read):
        asked.append((total, read))
        return make_mix(train, sequence, seed, total, read)

    monkeypatch.setattr("tinychat.cli.train_base.make_mix", spy)
    result = run("base", *unsized, "--set", "accumulate=2", *words)
    assert result.exit_code == 0, result.output
    known = tokens_read(read_info(start).lineage, {})
    assert sum(known.values()) == pytest.approx(read_info(start).lineage["tokens"], rel=0.02)
    # The mix that is recorded is the one that was read: one step of two batches of two.
    assert len(asked) > 1 and all(one == (2 * 2, known) for one in asked)
    info = read_info("runs/own/base.safetensors")
    assert info.lineage["data"]["mine.txt"]["licence"] == "the user's"
    assert info.lineage["parent"] == start and info.lineage["preset"] == "nano"
    assert info.lineage["parent_sha256"] == file_sha256(start)
    assert info.lineage["ancestors"] == [read_info(start).lineage]
    # A resumed run keeps to what it began with.
    write_model(here / "other.safetensors", "base")
    for more, sentence in (
        (["--from", "other"], f"was begun with --from {start}; leave --from other.safetensors out"),
        (["--source", "other.txt"], "was begun with --source mine.txt; leave --source other.txt"),
        (["--tokenizer", "x.model"], "was begun without --tokenizer; leave --tokenizer x.model"),
        (["--data", "texts"], "was begun without --data (or TINYCHAT_DATA); leave --data"),
    ):
        assert sentence in told(run("base", "--resume", "--run", "own", *more))
    size = info.lineage["data"]["mine.txt"]["tokens"]
    # Resuming remembers the file, and notices that it has changed.
    asked.clear()
    longer = run("base", "--resume", *words, "--set", "steps=2")
    assert longer.exit_code == 0, longer.output
    assert len(asked) > 1 and all(read == known for _, read in asked)
    info = read_info("runs/own/base.safetensors")
    assert info.lineage["data"]["mine.txt"]["tokens"] == size
    assert info.lineage["parent"] == start
    Path("mine.txt").write_text("The snail crept. " * 400, encoding="utf-8")
    assert "mine.txt has changed since this run began" in told(
        run("base", "--resume", "--run", "own", "--set", "steps=3")
    )
    # A new run reads the new text, not the tokens of the old one.
    result = run("base", *sized, "--source", "mine.txt", "--run", "new")
    assert result.exit_code == 0, result.output
    assert read_info("runs/new/base.safetensors").lineage["data"]["mine.txt"]["tokens"] != size


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to another process")
def test_ctrl_c_saves_and_resuming_goes_on(here, cache):
    process = subprocess.Popen(
        [sys.executable, "-m", "tinychat", "train", "base", *BASE],
        cwd=here,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    metrics = here / "runs" / "base" / "metrics.jsonl"
    try:
        until = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until, "no step in two minutes"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, warned = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, warned
    assert "Traceback" not in warned and "saving" in warned
    step = int(re.search(r"Stopped and saved at step (\d+)\.", said)[1])
    assert "Go on with: tinychat train base --run base --resume" in said
    assert not (here / "runs/base/base.safetensors").exists()
    assert len(read_metrics(metrics)) == step
    result = run("base", "--resume", "--set", f"steps={step + 2}")
    assert result.exit_code == 0, result.output
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, step + 3))
    assert read_info("runs/base/base.safetensors").lineage["steps"] == step + 2


def test_sft_with_conversations_of_ones_own(here):
    write_model(here / "start.safetensors", "sft")
    talk = {
        "messages": [
            {"role": "user", "content": "ping"},
            {"role": "assistant", "content": "pong"},
        ]
    }
    Path("mine.jsonl").write_text(f"{json.dumps(talk)}\n", encoding="utf-8")
    words = ["--from", "start.safetensors", "--data", "mine.jsonl", "--set", "epochs=0.01"]
    result = run("sft", *words, *SFT)
    assert result.exit_code == 0, result.output
    lineage = read_info("runs/sft/sft.safetensors").lineage
    assert lineage["data"]["mine.jsonl"] == {"licence": "the user's"}
    assert json.loads(Path("runs/sft/run.json").read_text())["data"] == ["mine.jsonl"]
    assert "mine.jsonl: learning from 1 of 1 conversations\n" in result.output
    assert "left out" not in result.output


def test_conversations_of_ones_own_are_cleaned_and_every_removal_is_counted(here, capsys):
    from tinychat.cli.train_sft import own_dialogues

    def write(name: str, *questions: str) -> None:
        turns = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": "pong"}]
            for q in questions
        ]
        lines = [json.dumps({"messages": messages}) for messages in turns]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    write("one.jsonl", "ping", "Mail kim@example.org for me", *(f"{n}?" for n in range(300)))
    write("two.jsonl", "PING!", "pong?")
    kept = own_dialogues(["one.jsonl", "two.jsonl"], keep_all=False)
    said = capsys.readouterr().out
    asked = [dialogue.messages[0].content for dialogue in kept]
    assert asked == ["ping", *(f"{n}?" for n in range(300)), "pong?"], "and no cap for one person"
    assert "one.jsonl, two.jsonl: learning from 302 of 304 conversations" in said
    assert "left out: exact copy, 1" in said and "left out: personal data, 1" in said
    assert "--keep-all" in said
    assert len(own_dialogues(["one.jsonl", "two.jsonl"], keep_all=True)) == 304
    assert capsys.readouterr().out == "" and own_dialogues([], keep_all=False) == []
    brief = own_dialogues(["two.jsonl"], False, lambda one: one.messages[0].content != "pong?")
    assert [dialogue.messages[0].content for dialogue in brief] == ["PING!"]
    said = capsys.readouterr().out
    assert "learning from 1 of 2" in said and "left out: a reply over --longest, 1" in said


def test_train_tokenizer(here):
    result = run("tokenizer", "--vocab-size", "400", "--out", "my/tokenizer.model")
    assert result.exit_code == 0, result.output
    assert Tokenizer.from_file("my/tokenizer.model").vocab_size == 400
    assert "exists already" in told(run("tokenizer", "--out", "my/tokenizer.model"))


def interrupt(*_):
    yield "The fox ran."
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["data.sample.tokenizer_texts", "tokenizer.sentences"])
def test_ctrl_c_is_no_bad_text_for_a_tokenizer(here, monkeypatch, place):
    monkeypatch.setattr(f"tinychat.{place}", interrupt)
    result = run("tokenizer", "--vocab-size", "400")
    assert result.exit_code not in (0, 2) and "no tokenizer" not in result.output
    assert not Path("runs").exists()


@contextmanager
def full_disk():
    """No file can grow."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_of_a_tokenizer(here, monkeypatch):
    monkeypatch.setattr("tinychat.tokenizer.train_sentencepiece", lambda *_: bytes(1000))
    with full_disk():
        assert "File too large" in told(run("tokenizer"))
    assert not picture(here)


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["base", "--preset", "nanno", "--minutes", "1"], "did you mean 'nano'?"),
        (["base"], "How long? Give a budget, for instance --minutes 10."),
        (["base", "--minutes", "0"], "--minutes is 0; give a number above 0"),
        (["base", "--minutes", "-3"], "--minutes is -3"),
        (["base", "--minutes", "nan"], "--minutes is nan"),
        (["base", "--minutes", "soon"], "Invalid value for '--minutes'"),
        ([*"base --minutes 1 --set bach=2".split()], "--set bach=2 names no setting; did you mean"),
        ([*"base --minutes 1 --set zzzz=2".split()], "there are steps, batch, sequence"),
        ([*"base --minutes 1 --set batch".split()], "--set batch"),
        ([*"base --minutes 1 --set batch=two".split()], "'two' won't do; batch must be a whole"),
        ([*"base --minutes 1 --set batch=0".split()], "batch is 0; it must be at least 1"),
        ([*"base --minutes 1 --set compiled=maybe".split()], "compiled must be true or false"),
        ([*"base --minutes 1 --set matrix_lr=inf".split()], "matrix_lr must be a number"),
        ([*"base --minutes 1 --set precision=fp8".split()], "choose auto, bf16 or fp32"),
        ([*"base --minutes 1 --run ../up".split()], "'../up' can't name a folder in runs"),
        ([*"base --minutes 1 --run ..".split()], "'..' can't name a folder in runs"),
        ([*"base --minutes 1 --run a/b/c".split()], "'a/b/c' can't name a folder in runs"),
        ([*"base --minutes 1 --run a\\b".split()], "can't name a folder in runs"),
        (["base", "--minutes", "1", "--run", ""], "'' can't name a folder in runs"),
        (["base", "--resume"], "There is no run to resume in runs/base"),
        (["base", "--resume", "--run", "other"], "There is no run to resume in runs/other"),
        ([*"base --minutes 1 --data nowhere".split()], "nowhere does not exist"),
        ([*"base --minutes 1 --data hollow".split()], "none of the expected files"),
        ([*"base --minutes 1 --source gone.txt".split()], "there is no file gone.txt"),
        ([*"base --minutes 1 --source empty.txt".split()], "empty.txt is empty"),
        ([*"base --minutes 1 --source blank.txt".split()], "blank.txt holds no text"),
        ([*"base --minutes 1 --source latin.txt".split()], "latin.txt is not UTF-8 text (byte 3)"),
        ([*"base --minutes 1 --source latin.jsonl".split()], "latin.jsonl"),
        ([*"base --minutes 1 --source broken.jsonl".split()], "broken.jsonl:1"),
        ([*"base --minutes 1 --source picture.png".split()], "picture.png can't be a source"),
        ([*"base --minutes 1 --tokenizer gone.model".split()], "gone.model can't be read"),
        ([*"base --minutes 1 --tokenizer blank.txt".split()], "no SentencePiece model"),
        ([*"base --minutes 1 --from gone".split()], "No checkpoint 'gone'"),
        ([*"base --minutes 1 --device tpu".split()], "Unknown device 'tpu'"),
        (["sft", "--from", "gone"], "No checkpoint 'gone'"),
        (["sft", "--from", "blank.txt"], "blank.txt"),
        (["sft", "--from", "reward"], "reward model, which gives marks"),
        (["sft", "--from", "rlhf"], "fine-tuning would undo what its rewards taught"),
        (["sft", "--from", "start", "--minutes", "0"], "--minutes is 0"),
        (["sft", "--from", "start", "--preset", "nano"], "is no nano model"),
        (["sft", "--from", "start", "--preset", "nono"], "did you mean 'nano'?"),
        (["sft", "--from", "start", "--set", "epochs=0"], "epochs is 0"),
        (["sft", "--from", "start", "--set", "epochs=many"], "epochs must be a number"),
        (["sft", "--from", "start", "--set", "epoch=1"], "did you mean epochs?"),
        (["sft", "--from", "start", "--set", "sequence=999"], "reads at most 512 tokens"),
        (["sft", "--from", "start", "--longest", "0"], "--longest is 0"),
        (["sft", "--from", "start", "--data", "gone.jsonl"], "there is no file gone.jsonl"),
        (["sft", "--from", "start", "--data", "latin.jsonl"], "latin.jsonl"),
        (["sft", "--from", "start", "--data", "broken.jsonl"], "broken.jsonl:1"),
        (["sft", "--from", "start", "--data", "empty.jsonl"], "empty.jsonl is empty"),
        (["sft", "--from", "start", "--run", "x/.."], "can't name a folder in runs"),
        (["sft", "--resume"], "There is no run to resume in runs/sft"),
        (["tokenizer", "--vocab-size", "5"], "no tokenizer of 5 pieces"),
        (["tokenizer", "--vocab-size", "-1"], "no tokenizer of -1 pieces"),
        (["tokenizer", "--vocab-size", "many"], "Invalid value for '--vocab-size'"),
        (["tokenizer", "--vocab-size", "2000000"], "no tokenizer of 2000000 pieces"),
        (["tokenizer", "--data", "nowhere"], "nowhere does not exist"),
        (
            ["tokenizer", "--data", "partial"],
            "has no pretrain/childrens_storybooks_ccby.jsonl.zst:",
        ),
        (["tokenizer", "--out", "blank.txt/a/b"], "blank.txt/a/b can't be written to"),
        (["dance"], "No such command"),
        (["base", "--minuets", "1"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_change_nothing(here, models, words, sentence):
    shutil.copytree(models, here, dirs_exist_ok=True)
    before = picture(here)
    if words[0] == "base" and "--preset" not in words and "--resume" not in words:
        words = [*words, "--preset", "nano"]
    assert sentence in told(run(*words))
    assert picture(here) == before
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a checkpoint of each kind, and files of all bad kinds."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "checkpoints").mkdir()
    for name, stage in (("start", "base"), ("reward", "reward"), ("rlhf", "rlhf")):
        write_model(folder / "checkpoints" / f"{name}.safetensors", stage)
    (folder / "hollow").mkdir()
    (folder / "partial/pretrain").mkdir(parents=True)
    (folder / "partial/pretrain/children_classics.jsonl.zst").touch()
    for name in ("empty.txt", "empty.jsonl"):
        (folder / name).touch()
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "latin.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def test_a_used_folder_is_left_alone(trained, here):
    shutil.copytree(trained / "runs", "runs")
    shutil.copytree("runs/base", "runs/sft")
    Path("runs/notes").mkdir()
    Path("runs/notes/plan.txt").write_text("mine")
    Path("runs/notes/run.json").write_text('{"preset": "nano"}')
    before = picture(here)
    assert "runs/base already holds a run; add --resume" in told(run("base", *BASE))
    assert "runs/sft already holds a run" in told(run("sft", "--from", "runs/base/base"))
    assert "runs/notes already holds" in told(run("base", *BASE, "--run", "notes"))
    # A pretraining run is no fine-tuning run, and a record can be damaged.
    assert "no run to resume in runs/notes" in told(run("sft", "--resume", "--run", "notes"))
    assert picture(here) == before
    Path("runs/notes/run.json").write_text("[1]")
    before = picture(here)
    assert "no run to resume in runs/notes" in told(run("base", "--resume", "--run", "notes"))
    assert picture(here) == before


# Small parts


def test_a_record_is_whole_or_absent_and_never_overwritten(here):
    folder = Path("runs/x")
    with full_disk(), pytest.raises(OSError):
        write_record(folder, {"preset": "nano"})
    assert not any(folder.iterdir()) and run_folder("x", resume=False) == folder
    write_record(folder, {"preset": "nano"})
    before = picture(here)
    assert list(before) == ["runs/x/run.json"]
    with pytest.raises(ConfigError, match="runs/x already holds a run"):
        write_record(folder, {"preset": "mini"})
    assert picture(here) == before


def test_what_a_killed_writer_left_is_no_run(here):
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/.run.json.1a2b").touch()
    assert run_folder("x", resume=False) == Path("runs/x")


def test_a_resumed_run_is_as_it_was_begun(here):
    folder = Path("runs/x")
    Path("a").mkdir()
    same = {"--fit": (None, 0.0), "--samples": (0, 0), "--from": ("a/b", str(here / "a/b"))}
    check_as_begun(folder, same | {"--source": (["x", "y"], ["x", "y"])})
    with pytest.raises(ConfigError, match="begun with --fit 0.5; leave --fit 0.0 out, or start"):
        check_as_begun(folder, {"--fit": (0.0, 0.5)})
    with pytest.raises(ConfigError, match="with --source x --source y; leave --source y out"):
        check_as_begun(folder, {"--source": (["y"], ["x", "y"])})
    assert data_as_begun(folder, {"data": "a"}, here / "a") == Path("a")
    assert data_as_begun(folder, {"data": "a"}, None) == Path("a")
    assert data_as_begun(folder, {"data": "moved away"}, Path("a")) == Path("a")
    assert data_as_begun(folder, {}, None) is None
    with pytest.raises(ConfigError, match="was begun with --data .* a; leave --data .* b out"):
        data_as_begun(folder, {"data": "a"}, Path("b"))


def test_override_parses_each_kind():
    config = override(TrainConfig(), ["batch=4", "matrix_lr=1e-3", "compiled=False"])
    assert (config.batch, config.matrix_lr, config.compiled) == (4, 1e-3, False)
    with pytest.raises(ConfigError, match="true or false"):
        override(TrainConfig(), ["compiled=yes"])


def test_a_start_that_has_changed_is_noticed(trained, here):
    shutil.copy(trained / "runs/base/base.safetensors", "start.safetensors")
    begun = run("base", *BASE[2:], "--set", "steps=1", "--from", "start.safetensors")
    assert begun.exit_code == 0, begun.output
    write_model(here / "start.safetensors", "base")
    told_so = told(run("base", "--resume", "--set", "steps=2"))
    assert "start.safetensors has changed since this run began" in told_so


def test_tokens_read_counts_all_that_a_model_began_with():
    first = {"data": {"a": {"tokens": 100, "passes": 2.5}, "b": {"tokens": 10, "passes": 1}}}
    tuned = {"data": {"b": {"conversations": 7}}, "ancestors": [first]}
    third = {"data": {"b": {"tokens": 20, "passes": 0.5}, "c": {"tokens": 4, "passes": 3}}}
    third["ancestors"] = [tuned]
    assert tokens_read(third, {}) == {"a": 250, "b": 20, "c": 12}
    assert tokens_read({}, {}) == {}


def test_tokens_read_knows_a_file_by_what_is_in_it():
    one = {"data": {"mine.txt": {"tokens": 100, "passes": 2, "sha256": "a" * 64}}}
    assert tokens_read(one, {"mine.txt": "a" * 64}) == {"mine.txt": 200}
    assert tokens_read(one, {"mine.txt": "b" * 64}) == {}


@pytest.mark.parametrize(
    "strange",
    [
        {"data": ["a"]},
        {"data": {"a": 3}},
        {"data": {"a": {"tokens": 100, "passes": None}}},
        {"data": {"a": {"tokens": 100, "passes": float("nan")}}},
        {"data": {"a": {"tokens": 100, "passes": -1.0}}},
        {"data": {"a": {"tokens": "many", "passes": 1}}},
        {"ancestors": {"data": {}}},
        {"ancestors": ["base"]},
    ],
)
def test_tokens_read_of_a_foreign_lineage_are_none(strange):
    assert tokens_read(strange, {}) == {}


def test_clock():
    assert [clock(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


def test_a_public_file_is_known_by_its_contents(here, monkeypatch):
    from tinychat.cli.train_sft import records_of
    from tinychat.data import public
    from tinychat.runtime.files import file_sha256

    Path("renamed.jsonl").write_text("{}\n", encoding="utf-8")
    Path("mine.jsonl").write_text("{} \n", encoding="utf-8")
    entry = replace(public.source("story_requests"), sha256=file_sha256(Path("renamed.jsonl")))
    monkeypatch.setattr(public, "TABLE", (entry,))
    assert records_of(["mine.jsonl", "renamed.jsonl"]) == {
        "mine.jsonl": {"licence": "the user's"},
        "story_requests": {
            "licence": entry.licence, "attribution": entry.attribution, "sha256": entry.sha256
        },
    }  # fmt: skip
