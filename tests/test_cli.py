"""The `tinychat` command from outside: answers, tables, mistakes, pipes, and a real terminal."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakes import ByteTokenizer, ScriptedGPT
from typer.testing import CliRunner

from tinychat import __version__
from tinychat.cli import loading
from tinychat.cli.app import app
from tinychat.cli.info import date, duration, origin, plain, score, size, trainings
from tinychat.cli.session import ChatSession
from tinychat.data import tokenizer_model
from tinychat.generation import Sampling
from tinychat.gpt import GPT, GPTConfig, save_model
from tinychat.runtime import search
from tinychat.runtime.checkpoint import read_info
from tinychat.tokenizer import Tokenizer

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
TINY = GPTConfig(width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=128)


def write_checkpoint(path: Path, stage: str) -> Path:
    torch.manual_seed(0)
    lineage = {
        "parent": None,
        "data": [{"name": "corpus", "licence": "CC0-1.0"}],
        "tokens": 1_234_567,
        "seconds": 4000.0,
    }
    tokenizer = Tokenizer(tokenizer_model())
    model = GPT(TINY)
    save_model(
        path, model, stage=stage, tokenizer=tokenizer, lineage=lineage, metrics={"loss": 1.5}
    )
    return path


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A folder with an sft and a reward checkpoint, weights as drawn."""
    folder = tmp_path_factory.mktemp("shipped")
    for stage in ("sft", "reward"):
        write_checkpoint(folder / f"{stage}.safetensors", stage)
    return folder


@pytest.fixture
def here(shipped, monkeypatch) -> Path:
    """Only that folder is searched."""
    monkeypatch.setattr(search, "search_folders", lambda: [shipped])
    monkeypatch.chdir(shipped)
    return shipped


@pytest.fixture
def scripted(here, monkeypatch) -> None:
    """The sft checkpoint's header, with a model that says what a script says."""

    def open_session(info, settings, system=None):
        model = ScriptedGPT(["Hello [b]you[/b]!", "Bye."])
        settings = {**settings, "max_tokens": min(settings["max_tokens"], 60)}
        return ChatSession(model, ByteTokenizer(), Sampling(**settings), 256, system)

    monkeypatch.setattr(loading, "open_session", open_session)


def run(*words: str, stdin: str | bytes | None = None):
    return CliRunner().invoke(app, list(words), input=stdin, env={"COLUMNS": "200"})


def tinychat(*words: str, **keywords) -> subprocess.CompletedProcess:
    """Run the program itself."""
    return subprocess.run(
        [sys.executable, "-m", "tinychat", *words],
        capture_output=True,
        timeout=120,
        **{"env": ENV, **keywords},
    )


def told(result) -> str:
    """What an error says, once it is sure that it is one: exit code 2, a panel, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Error" in result.stderr and "Traceback" not in result.stderr
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


# Answers


def test_ask(scripted):
    assert run("ask", "hi").stdout == "Hello [b]you[/b]!\n"
    assert run("ask", "several", "words").stdout == "Hello [b]you[/b]!\n"


def test_ask_from_standard_input(scripted):
    result = run("ask", stdin="hi\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello [b]you[/b]!\n", "")


def test_ask_json(scripted):
    result = run("ask", "hi", "--json", "--seed", "3")
    answer = json.loads(result.stdout)
    assert answer["reply"] == "Hello [b]you[/b]!"
    assert answer["tokens"] == 17
    assert answer["sampling"]["seed"] == 3
    assert Path(answer["checkpoint"]).name == "sft.safetensors"
    assert answer["seconds"] > 0


def test_ask_needs_a_question(scripted):
    assert "question is empty" in told(run("ask", stdin="  \n"))
    assert "question is empty" in told(run("ask", ""))


def test_input_that_is_not_utf8(scripted):
    assert "not UTF-8 text: byte 2 is 0xff" in told(run("ask", stdin=b"a\xff"))
    result = run("chat", stdin=b"hi\n\xff\n")
    assert result.exit_code == 2 and "not UTF-8" in result.stderr


def test_a_question_longer_than_the_context(scripted):
    assert "tokens long" in told(run("ask", "x" * 300))


def test_chat_through_a_pipe(scripted):
    result = run("chat", stdin="hi\n\n/set seed 5\nbye\n/quit\nnever\n")
    assert result.exit_code == 0
    assert result.stdout == "Hello [b]you[/b]!\nBye.\n"
    assert "sft.safetensors: sft" in result.stderr and "(seed is 5)" in result.stderr


def test_chat_flags_reach_the_model(scripted):
    result = run("chat", "--top-k", "3", "--system", "be kind", stdin="/show\n")
    assert re.search(r"top_k +3", result.stderr) and re.search(r"system +be kind", result.stderr)


def test_interrupt_is_130(scripted, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "open_session", interrupted)
    assert run("ask", "hi").exit_code == 130


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ask", "hi", "--temperature", "-1"], "--temperature is -1; it must be a number from 0"),
        (["ask", "hi", "--temperature", "nan"], "--temperature is nan"),
        (["ask", "hi", "--top-k", "many"], "--top-k is many; it must be a whole number"),
        (["chat", "--top-p", "0"], "--top-p is 0; it must be a number above 0 and at most 1"),
        (["ask", "hi", "--max-tokens", "0"], "--max-tokens is 0"),
        (["ask", "hi", "--ckpt", "stf"], "did you mean sft?"),
        (["ask", "hi", "--ckpt", "reward"], "reward model"),
        (["chat", "--ckpt", "reward"], "sft.safetensors instead"),
        (["info", "nothing"], "No checkpoint 'nothing'"),
        (["data", "verify", "--data", "/nonexistent"], "/nonexistent does not exist"),
        (["tlak"], "No such command"),
        (["ask", "hi", "--temprature", "1"], "No such option"),
    ],
)
def test_mistakes_are_one_sentence(here, words, sentence):
    assert sentence in told(run(*words))


def test_no_checkpoint_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "search_folders", lambda: [tmp_path])
    monkeypatch.chdir(tmp_path)
    assert "No checkpoint to chat with was found" in told(run("chat", stdin="hi\n"))


def test_a_damaged_checkpoint(here, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((here / "sft.safetensors").read_bytes()[:5000])
    assert "broken.safetensors" in told(run("chat", "--ckpt", str(broken), stdin="hi\n"))


@pytest.mark.parametrize("words", [["--debug", "info", "nothing"], ["info", "nothing", "--debug"]])
def test_debug_shows_the_traceback(here, words):
    result = run(*words)
    assert result.exit_code == 2 and "Traceback" in result.stderr


# Tables


def test_info(here):
    out = run("info", "sft").stdout
    assert re.search(r"stage +│ sft", out)
    assert re.search(r"parameters +│ [\d,]+", out)
    assert "CC0-1.0" in out and "1,234,567" in out and "1 h 07 min" in out and "1.5" in out


def test_info_json(here):
    record = json.loads(run("info", "sft", "--json").stdout)
    assert record["stage"] == "sft" and record["lineage"]["tokens"] == 1_234_567


def test_models(here):
    out = run("models").stdout
    assert "sft" in out and "reward" in out
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert set(rows) == {"sft", "reward"}
    today = time.strftime("%Y-%m-%d", time.localtime((here / "sft.safetensors").stat().st_mtime))
    assert rows["sft"]["date"] == today and rows["sft"]["score"] == 1.5
    assert today in out and "loss 1.500" in out and "local" in out
    assert rows["sft"]["from"] == "local"


def test_info_is_short_and_its_json_whole(here, monkeypatch, tmp_path):
    """A curve and an old training of hundreds of points are told, not printed."""
    info = read_info(here / "sft.safetensors")
    curve = [[step, 1 / step] for step in range(1, 301)]
    source = {"licence": "CC-BY-4.0", "sha256": "f" * 64, "tokens": 1_500}
    hardware = {"cpu": "a CPU", "cores": 2, "gpus": []}
    older = {"data": {"tales": source}, "hardware": hardware, "steps": 7_654_321}
    full = dataclasses.replace(
        info,
        lineage={"steps": 12, "ancestors": [older]},
        metrics={"curve": curve, "by_flaw": {"rude": [0.5, 8, 0.25]}},
    )
    monkeypatch.setattr("tinychat.cli.info.read_info", lambda _: full)
    out = run("info", "sft").stdout
    assert len(out.splitlines()) < 40
    assert "300 points" in out and "first: 1, 1" in out and "last: 300, 0.003333" in out
    assert "rude: 0.5, 8, 0.25" in out
    assert "tales: licence CC-BY-4.0, tokens 1,500" in out and "fff" not in out
    assert "2 cores of a CPU" in out
    assert out.index("300 points") < out.index("steps  ") < out.index("built on")
    assert out.index("built on") < out.index("7,654,321")
    assert json.loads(run("info", "sft", "--json").stdout)["metrics"]["curve"] == curve


def test_info_tells_every_training_once():
    base, sft = {"steps": 1}, {"steps": 2, "ancestors": [{"steps": 1}]}
    reward = {"steps": 3, "ancestors": [sft]}
    rlhf = {"steps": 4, "ancestors": [sft, reward]}
    assert [entry["steps"] for entry in trainings(rlhf)] == [4, 2, 1, 3]
    assert trainings(base) == [base]
    assert trainings({"ancestors": "unknown"}) == [{"ancestors": "unknown"}], "nothing is hidden"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("curve", [[1, 2.0, 0.5], [2, 3.0, 0.6], [3, 4.0, 0.7]], "3 points\nfirst: 1, 2, 0.5\n"
         "last: 3, 4, 0.7"),
        ("hardware", {"cpu": "x", "cores": 1, "gpus": []}, "1 core of x"),
        ("hardware", {"cpu": "x", "cores": 2, "gpus": ["H100"]}, "H100"),
        ("hardware", {"cpu": "x", "cores": 2, "gpus": None}, "cpu x, cores 2, gpus none"),
        ("hardware", {"cpu": "M1"}, "cpu M1"),
        ("ratings", {}, "none"), ("averaged_with", [], "none"),
        ("own", {"sha256": "abc"}, "sha256 abc"),
        ("seconds", math.inf, "inf"), ("seconds", 4000, "1 h 07 min"),
        ("odd", [[[1]], {"a": [2]}], "1\na: 2"),
    ],
)  # fmt: skip
def test_odd_metadata_are_told(key, value, told):
    assert plain(key, value) == told


def test_models_lists_runs(here, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for file in ("runs/n1/rlhf", "runs/sft/sft", "runs/n1/state-00000001"):
        path = Path(f"{file}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((here / "sft.safetensors").read_bytes())
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert set(rows) == {"sft", "reward", "n1", "runs/sft"}
    assert rows["n1"]["path"] == "runs/n1/rlhf.safetensors" and rows["n1"]["from"] == "run"
    for name, row in rows.items():
        assert json.loads(run("info", name, "--json").stdout)["path"] == row["path"]


def test_where_models_come_from(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_data_dir", lambda _: str(tmp_path))
    assert origin(tmp_path / "checkpoints" / "x.safetensors") == "yours"
    assert origin(Path("x.safetensors")) == "local"
    assert origin(Path("runs/n1/sft.safetensors")) == "run"
    assert origin(Path(__file__).parents[1] / "checkpoints" / "sft.safetensors") == "shipped"


@pytest.mark.parametrize(
    ("metrics", "number", "text"),
    [
        ({}, None, ""),
        ({"loss": 2, "bits_per_byte": {"a": 1.0, "b": 2.0}}, 1.5, "1.500 bits/byte, 2 texts"),
        ({"bits_per_byte": {"unseen replies": 1.25}}, 1.25, "1.250 bits/byte, unseen replies"),
        ({"accuracy": 0.715, "loss": 0.5}, 0.715, "71.5% of pairs"),
        ({"loss": 2.5}, 2.5, "loss 2.500"),
        ({"bits_per_byte": {}}, None, ""),
    ],
)
def test_scores(here, metrics, number, text):
    info = dataclasses.replace(read_info(here / "sft.safetensors"), metrics=metrics)
    assert score(info) == (number, text)


def test_a_date_in_the_metadata_comes_first(here):
    info = read_info(here / "sft.safetensors")
    dated = dataclasses.replace(info, lineage={"date": "2026-11-21T10:00:00Z"})
    assert date(dated) == "2026-11-21"


def test_models_names_damaged_files(monkeypatch, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    monkeypatch.setattr("tinychat.runtime.search.search_folders", lambda: [tmp_path])
    monkeypatch.chdir(tmp_path)
    assert "damaged" in run("models").stdout


def test_data_list(monkeypatch):
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    out = run("data", "list").stdout
    assert "tinystories_sample" in out and "CDLA-Sharing-1.0" in out


def test_numbers_for_people():
    assert [duration(5.04), duration(300), duration(4000)] == ["5.0 s", "5 min", "1 h 07 min"]
    assert [size(900), size(15_000_000)] == ["0.9 kB", "15.0 MB"]


def test_version_and_help():
    assert run("--version").stdout == f"tinychat {__version__}\n"
    names = "chat ask compare chats config info models data".split()
    for words in ([], *([name] for name in names)):
        result = run(*words, "--help")
        assert result.exit_code == 0 and "Usage" in result.stdout


# The real program


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], ["chat", "--help"], ["compare", "--help"], ["info", "sft.safetensors"],
        ["models"], ["config"], ["config", "path"], ["chats"], ["train", "all", "--help"],
    ],
)  # fmt: skip
def test_torch_is_not_imported(shipped, words):
    script = (
        "import sys\nfrom tinychat.cli.app import app\n"
        f"try: app({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'prompt_toolkit' not in sys.modules"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=shipped, env=ENV, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tinychat com", ["compare"]),
        ("tinychat chat --ckpt s", ["sft", "sft.safetensors"]),
        ("tinychat ask --ckpt ./s", ["./sft.safetensors"]),
        ("tinychat chat --render m", ["markdown"]),
        ("tinychat config ", ["path"]),
    ],
)
def test_shell_completion(shipped, typed, offered):
    env = {
        **ENV,
        "_TINYCHAT_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
        "XDG_DATA_HOME": str(shipped / "nowhere"),
    }
    result = subprocess.run(
        [sys.executable, "-c", "from tinychat.cli.app import main; main()"],
        cwd=shipped, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.split() == offered, result.stderr


def test_completion_is_installed(tmp_path):
    env = {**ENV, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = tinychat("--install-completion", "bash", env=env)
    assert result.returncode == 0, result.stderr
    script = "".join(path.read_text() for path in tmp_path.rglob("*.sh"))
    assert "complete -o" in script and "tinychat" in script


def test_ask_with_real_weights_prints_only_the_answer(shipped):
    result = tinychat(
        "ask", "--ckpt", "sft.safetensors", "--max-tokens", "5", cwd=shipped, input=b"hi"
    )
    assert result.returncode == 0 and result.stderr == b""
    assert result.stdout.strip() and result.stdout.endswith(b"\n")


def test_a_closed_pipe_is_quiet(shipped):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tinychat", "info", "sft.safetensors"]
    result = subprocess.run(command, cwd=shipped, env=ENV, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert result.stderr == b"" and result.returncode not in (0, 2)


def test_no_color(shipped):
    result = tinychat("info", "none", cwd=shipped, env={**ENV, "NO_COLOR": "1", "FORCE_COLOR": "1"})
    assert result.returncode == 2 and b"none" in result.stderr
    assert not re.search(rb"\x1b\[[\d;]*3[0-7]", result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_terminal(shipped):
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tinychat", "chat", "--ckpt", "sft.safetensors", "--temperature", "0"],
        cwd=shipped, timeout=60, dimensions=(24, 80), encoding="utf-8",
        # This terminal answers no question about the cursor's position.
        env={**ENV, "TERM": "xterm", "COLUMNS": "80", "PROMPT_TOOLKIT_NO_CPR": "1"},
    )  # fmt: skip
    child.expect_exact("Ctrl-D leaves")
    child.expect(r"1m>.*\x1b\[\?25h")
    child.send("/syst\x7f\x7f\x7f\x7fset seed 5\r")  # backspace edits the line
    child.expect_exact("(seed is 5)")
    child.send("hello\r")
    child.expect(r"1m>.*\x1b\[\?25h")
    child.send("/stats\r")
    child.expect_exact("of 128 tokens")
    child.expect(r"1m>.*\x1b\[\?25h")  # between two prompts the key would reach nobody
    child.send("\x03")
    child.expect_exact("once more leaves")
    child.expect(r"1m>.*\x1b\[\?25h")
    child.send("\x03")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in (child.before or "")
