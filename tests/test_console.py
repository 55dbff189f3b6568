"""What is shown: no control character of a stranger's text, one line of JSON for any pipe."""

import io
import json
import sys

import pytest
from fakes import stirred
from typer.testing import CliRunner

from tinychat.cli.app import app
from tinychat.cli.console import Screen, is_terminal, print_json, shortened
from tinychat.data import tokenizer_model
from tinychat.gpt import GPTConfig, save_model
from tinychat.tokenizer import Tokenizer

ESCAPE = "\x1b]52;c;aGk=\x07"  # "set the clipboard"


def test_remarks_obey_no_stranger(capsys):
    screen = Screen(interactive=True)
    screen.note(f"system message: {ESCAPE}you are kind")
    screen.complain(f"there is no chat {ESCAPE}")
    shown = "".join(capsys.readouterr())
    assert "you are kind" in shown and "\x1b]" not in shown and "\x07" not in shown


def test_metadata_of_a_stranger_is_only_text(tmp_path):
    shape = GPTConfig(width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16)
    save_model(
        tmp_path / "a.safetensors", stirred(shape, 0), stage="base", metrics={},
        tokenizer=Tokenizer(tokenizer_model()), lineage={f"by{ESCAPE}": f"me{ESCAPE}"},
    )  # fmt: skip
    result = CliRunner().invoke(app, ["info", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 0 and "\x1b" not in result.output and "me" in result.output


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n b\x1b[2J", "a b[2J"), ("x" * 60, "x" * 60), ("x" * 61, "x" * 57 + "...")],
)
def test_one_line(text, line):
    assert shortened(text) == line


def test_a_closed_stream_is_no_terminal():
    closed = io.StringIO()
    closed.close()
    assert not is_terminal(None) and not is_terminal(closed) and not is_terminal(io.StringIO())


def test_json_survives_a_pipe_that_is_not_utf8(monkeypatch):
    for encoding in ("cp1252", "utf-8"):
        pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", pipe)
        print_json({"reply": "café ☕"})
        pipe.flush()
        assert json.loads(pipe.buffer.getvalue().decode(encoding)) == {"reply": "café ☕"}


def test_asking_without_standard_input(monkeypatch, capsys):
    monkeypatch.setattr("tinychat.cli.app.sys.stdin", None)
    app(["ask"], standalone_mode=False)
    assert "There is no question; write one" in capsys.readouterr().err
