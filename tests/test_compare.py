"""One prompt, several models: in columns, stacked, from a pipe and as JSON."""

import json
import re

import pytest
from fakes import ScriptedGPT, UniformGPT
from rich.console import Console
from test_cli import run, told, write_checkpoint
from test_commands import Ready, chat, said, session, turns

from tinychat.cli import loading
from tinychat.cli.compare import Contender, labelled, side_by_side
from tinychat.cli.session import Reply
from tinychat.generation import Sampling
from tinychat.runtime import search

SAYS = {"base": "Once [b]upon[/b] a time\nthere was", "sft": "Hello!", "rlhf": "Hi, friend."}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for stage in ("base", "sft", "rlhf", "reward"):
        write_checkpoint(folder / f"{stage}.safetensors", stage)
    return folder


@pytest.fixture
def asked(shipped, monkeypatch):
    """Those checkpoints, each saying its sentence; what each was asked."""
    log = []

    def open_session(info, settings, system=None):
        made = session(ScriptedGPT([SAYS[info.stage]]), Sampling(**settings), system=system)
        log.append((info.stage, settings, system, made))
        return made

    monkeypatch.setattr(loading, "open_session", open_session)
    monkeypatch.setattr(search, "search_folders", lambda: [shipped])
    monkeypatch.chdir(shipped)
    return log


def contender(name: str, text: str) -> Contender:
    return Contender(name, Ready.info, Reply(text, "end", 1, 0, 1, 0, 0.1, 0.1, 0.1))


def drawn(found, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(side_by_side(found, width))
    return [line.rstrip() for line in console.export_text().rstrip("\n").split("\n")]


def test_columns_are_equal_and_never_broken_by_long_words():
    found = [
        contender("a", "one two " * 8),
        contender("b", "x" * 50),
        contender("c", "[b] 漢字 ok"),
    ]
    lines = drawn(found, 100)
    # Three columns of 31 with gaps of 3: 31 + 3 + 31 + 3 + 31 = 99.
    assert lines[0].index("b (rlhf, 13.9 M)") == 34 and lines[0].index("c (rlhf, 13.9 M)") == 68
    assert lines[1][34:68].rstrip() == "x" * 31 and lines[2][34:68].rstrip() == "x" * 19
    assert lines[1][68:] == "[b] 漢字 ok"
    assert " ".join(line[:31].strip() for line in lines[1:]).split() == ["one", "two"] * 8


def test_narrow_columns_are_stacked():
    found = [contender("a", "one"), contender("b", "two")]
    assert len(drawn(found, 63)) == 2  # 30 + 3 + 30
    assert drawn(found, 62) == ["a (rlhf, 13.9 M)", "one", "", "b (rlhf, 13.9 M)", "two"]


def test_labelled_text_cannot_pass_for_a_label():
    text = labelled([contender("a", "one\n\nb:"), contender("b", " \x1b[1m")])
    assert text == "a:\n  one\n\n  b:\nb:\n  [1m"
    assert labelled([contender("a", " ")]) == "a:\n  (no words came)"


def test_compare_from_a_pipe(asked):
    result = run("compare", "hi", "--temperature", "0.3", "--system", "be kind")
    assert result.stdout == (
        "base:\n  Once [b]upon[/b] a time\n  there was\nsft:\n  Hello!\nrlhf:\n  Hi, friend.\n"
    )
    assert [stage for stage, *_ in asked] == ["base", "sft", "rlhf"]
    seeds = {settings["seed"] for _, settings, *_ in asked}
    assert len(seeds) == 1 and isinstance(seeds.pop(), int)
    assert all(settings["temperature"] == 0.3 for _, settings, *_ in asked)
    assert all(system == "be kind" for *_, system, _ in asked)


def test_compare_json_and_standard_input(asked):
    words = ("compare", "--json", "--seed", "7", "--ckpt", "sft", "--ckpt", "rlhf")
    record = json.loads(run(*words, stdin="hi\n").stdout)
    assert record["prompt"] == "hi" and record["settings"]["seed"] == 7
    assert [reply["name"] for reply in record["replies"]] == ["sft", "rlhf"]
    assert record["replies"][0]["reply"] == "Hello!" and record["replies"][0]["ended"] == "end"


def test_the_same_seed_throws_the_same_dice(asked, monkeypatch):
    monkeypatch.setattr(
        loading,
        "open_session",
        lambda info, settings, system=None: session(UniformGPT(), Sampling(**settings)),
    )
    words = ("compare", "hi", "--json", "--ckpt", "sft", "--ckpt", "rlhf", "--max-tokens", "12")
    one, two = (json.loads(run(*words).stdout) for _ in range(2))
    assert one["replies"][0]["reply"] == one["replies"][1]["reply"]
    assert one["settings"]["seed"] != two["settings"]["seed"]


def test_two_files_of_one_name_are_told_apart(asked, tmp_path, shipped):
    other = tmp_path / "sft.safetensors"
    other.write_bytes((shipped / "sft.safetensors").read_bytes())
    out = run("compare", "hi", "--ckpt", "sft.safetensors", "--ckpt", str(other)).stdout
    assert out.startswith("sft.safetensors:\n") and f"{other}:\n" in out


def test_mistakes(asked, monkeypatch, tmp_path):
    assert "question is empty" in told(run("compare", "", "--ckpt", "sft"))
    assert "reward model" in told(run("compare", "hi", "--ckpt", "reward", "--ckpt", "sft"))
    assert "only sft is named; name another" in told(run("compare", "hi", "--ckpt", "sft"))
    assert "No checkpoint 'stf': did you mean sft?" in told(
        run("compare", "hi", "--ckpt", "stf", "--ckpt", "sft")
    )
    monkeypatch.setattr(search, "search_folders", lambda: [tmp_path])
    monkeypatch.chdir(tmp_path)
    assert "there are none; name them" in told(run("compare", "hi"))
    assert asked == []  # nothing was loaded for a mistake


def test_compare_in_a_chat(asked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    talk = chat(ScriptedGPT(["One.", "Two."]), "a", "b", "/compare sft rlhf", "/compare", "c")
    talk.run()
    out = capsys.readouterr().out
    assert re.search(r"sft \(sft, 0\.\d M\) +rlhf \(rlhf, 0\.\d M\)\s+Hello! +Hi, friend\.", out)
    assert re.search(r"\(seed \d+; the conversation stays as it was\)", out)
    assert "Once [b]upon[/b] a time\nthere was" in out  # three columns don't fit
    assert turns(talk.session) == ["a", "One.", "b", "Two.", "c", "One."]
    # Each model has read the conversation up to the last message.
    assert [message.content for message in asked[0][3].messages] == ["a", "One.", "b", "Hello!"]


def test_compare_in_a_chat_from_a_pipe(asked, capsys):
    chat(ScriptedGPT(["One."]), "a", "/compare sft rlhf", interactive=False).run()
    assert capsys.readouterr().out == "One.\nsft:\n  Hello!\nrlhf:\n  Hi, friend.\n"


def test_a_mistake_in_a_chat(asked, capsys):
    chat(ScriptedGPT(["One."]), "a", "/compare sft", "/compare sft stf").run()
    out = said(capsys.readouterr().out)
    assert "only sft is named" in out and "did you mean sft?" in out


def test_compare_interrupted_in_a_chat(asked, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    talk = chat(ScriptedGPT(["One."]), "a", "/compare sft rlhf", "b")
    monkeypatch.setattr(loading, "open_session", interrupted)
    talk.run()
    assert "(stopped)" in capsys.readouterr().out and turns(talk.session) == [
        "a",
        "One.",
        "b",
        "One.",
    ]
