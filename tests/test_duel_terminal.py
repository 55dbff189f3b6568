"""Voting in a real pseudo-terminal: single keys, and nothing that was pressed too early."""

import json
import sys
from pathlib import Path

import pytest
from test_cli import write_checkpoint

pytest.importorskip("pexpect")
from test_terminal import Window

# The program itself, with a model that says one of two things and takes its time for it.
CHILD = """
import sys, time
from fakes import ByteTokenizer, TwoMinds
from tinychat.cli import app, loading
from tinychat.cli.session import ChatSession
from tinychat.generation import Sampling

class Slow(TwoMinds):
    def scores(self, ids):
        time.sleep({pause})
        return super().scores(ids)

def open_session(info, settings, system=None):
    sampling = Sampling(**{{**settings, "temperature": 1.0, "max_tokens": 30}})
    return ChatSession(Slow(context=400), ByteTokenizer(), sampling, 400, system)

loading.open_session = open_session
app.main()
"""
WORDS = (
    "duel", "sft.safetensors", "--prompts", "prompts.txt", "--votes", "v.jsonl", "--seed", "7",
)  # fmt: skip
LEGEND = "A better · B better · T tie · X both bad · S skip · Q quit"


@pytest.fixture
def home(tmp_path) -> Path:
    write_checkpoint(tmp_path / "sft.safetensors", "sft")
    (tmp_path / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(60)))
    return tmp_path


def window(home: Path, *words: str, pause=0.0, rows=24, columns=80, **more: str) -> Window:
    command = [sys.executable, "-c", CHILD.format(pause=pause), *words]
    return Window(command, home, rows, columns, **more)


def winners(path: Path) -> list[str]:
    """What was voted for, as the keys that say so."""
    votes = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {"tie": "t", "bad": "x"}.get(vote["winner"]) or "ab"[vote["winner"] != vote["left"]]
        for vote in votes
    ]


def waits(text: str) -> bool:
    """The replies are there, and a key is waited for."""
    return text.split("\n")[-1] == LEGEND


def test_keys_of_a_duel(home):
    duel = window(home, *WORDS)
    # Letters, capitals, arrows and digits.
    keys = [
        ("a", "(A is better)"), ("B", "(B is better)"), ("t", "(a tie)"), ("X", "(both bad)"),
        ("\x1b[D", "(A is better)"), ("\x1b[C", "(B is better)"), ("\x1b[B", "(a tie)"),
        ("s", "(skipped)"), ("1", "(A is better)"), ("2", "(B is better)"), ("3", "(a tie)"),
    ]  # fmt: skip
    for key, answer in keys:
        before = duel.until(waits).count(answer)
        duel.type("zz\r" + key)  # what means nothing is passed over
        duel.until(lambda text, answer=answer, n=before: text.count(answer) > n)
    duel.until(waits)
    # Ctrl-C leaves as Q does, with all that was voted.
    duel.type("\x03")
    text = duel.until("half is fair")
    assert duel.close() == 0
    assert winners(home / "v.jsonl") == list("abtxabtabt")
    assert "(10 votes added to v.jsonl)" in text and LEGEND not in text
    assert "sft against itself: 10 votes, 3 ties, 1 both bad." in text
    assert "Traceback" not in text


def test_keys_that_come_before_the_replies_judge_nothing(home):
    duel = window(home, *WORDS, pause=0.05)
    duel.until("writing")
    duel.type("abtx")
    duel.until(waits)
    assert not (home / "v.jsonl").exists()
    duel.type("a")
    duel.until("(A is better)")
    duel.type("bbb")  # too late for this one, too early for the next
    duel.until(waits)
    duel.type("q")
    text = duel.until("(1 vote added")
    duel.close()
    assert winners(home / "v.jsonl") == ["a"] and "bbb" not in text


def test_a_duel_on_a_poor_terminal(home):
    duel = window(home, *WORDS, columns=40, TERM="dumb", LANG="C", LC_ALL="C", PYTHONUTF8="0",
                  PYTHONCOERCECLOCALE="0")  # fmt: skip
    for key in "abq":
        duel.until(lambda text: "Q quit" in text.split("\n\n")[-1].replace("\n", " "))
        duel.type(f"{key}\r")
        duel.until({"a": "(A is better)", "b": "(B is better)", "q": "(2 votes added"}[key])
    assert duel.close() == 0
    assert winners(home / "v.jsonl") == ["a", "b"] and b"\x1b[" not in duel.raw


def test_typed_prompts(home):
    duel = window(home, "duel", "sft.safetensors", "--ask", "--votes", "v.jsonl", "--seed", "7")
    duel.prompt()
    duel.type("first question\r")
    duel.until(waits)
    duel.type("a")
    duel.prompt()
    duel.type("\x04")
    duel.until("(1 vote added")
    assert duel.close() == 0
    (vote,) = map(json.loads, (home / "v.jsonl").read_text().splitlines())
    assert vote["prompt"] == [{"role": "user", "content": "first question"}]


def vote(chat) -> None:
    """Type /vote until two replies are there: the second one may fall like the first four times."""
    while True:
        before = chat.text().count("said nothing else")
        chat.type("/vote\r")
        seen = chat.until(
            lambda text: waits(text) or text.count("said nothing else") > before  # noqa: B023
        )
        if waits(seen):
            return
        chat.prompt()


def test_vote_in_a_chat(home):
    chat = window(home, "chat", "--ckpt", "sft.safetensors", "--temperature", "1", "--no-save")
    votes = home / "data" / "tinychat" / "votes.jsonl"
    chat.prompt()
    chat.type("/vo\t")
    chat.until("> /vote")
    chat.type("\x15hello\r")
    chat.until(lambda text: "Yes." in text or "No way." in text)
    chat.prompt()
    # B, with the reply that it stands for.
    vote(chat)
    chat.type("bb")
    chat.until("(B is better)")
    text = " ".join(chat.prompt().split())  # where a line breaks depends on the file's name
    assert "(kept in" in text and "the conversation goes on" in text and "bb" not in text
    assert winners(votes) == ["b"]
    (cast,) = map(json.loads, votes.read_text().splitlines())
    # The next message finds the chosen reply in the conversation.
    chat.type("/export talk.json\r")
    chat.until("(wrote talk.json)")
    chat.prompt()
    (turn,) = [
        message for message in json.loads((home / "talk.json").read_text())["messages"]
        if message["role"] == "assistant"
    ]  # fmt: skip
    assert turn["content"] == cast[cast["winner"]]
    # Escape and Ctrl-C give no vote, and the chat goes on.
    for key, answer in (("\x1b", "(no vote; "), ("\x03", "(stopped)")):
        vote(chat)
        chat.type(key)
        chat.until(answer)
        chat.prompt()
    assert winners(votes) == ["b"]
    chat.type("\x04")
    assert chat.close() == 0
    assert "Traceback" not in chat.text()
