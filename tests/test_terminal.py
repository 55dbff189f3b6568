"""The chat in a real pseudo-terminal, as the person in front of an emulated screen sees it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyte
import pytest

pexpect = pytest.importorskip("pexpect")

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# The program itself, with a model that takes its time to say what a script says.
CHILD = """
import sys, time
from fakes import ByteTokenizer, ScriptedGPT
from tinychat.cli import app, loading
from tinychat.cli.session import ChatSession
from tinychat.generation import Sampling

class Slow(ScriptedGPT):
    def scores(self, ids):
        time.sleep({pause})
        return super().scores(ids)

def open_session(info, settings, system=None):
    sampling = Sampling(**{{**settings, "temperature": 0, "max_tokens": 300}})
    return ChatSession(Slow({replies!a}, context=4000), ByteTokenizer(), sampling, 4000, system)

loading.open_session = open_session
app.main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home with a checkpoint (its header is all that is read) and a line typed long ago."""
    from tinychat.data import tokenizer_model
    from tinychat.gpt import GPT, GPTConfig, save_model
    from tinychat.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("home")
    shape = GPTConfig(width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16)
    lineage = {"parent": None, "data": [], "tokens": 1, "seconds": 1.0}
    file = folder / "sft.safetensors"
    tokenizer = Tokenizer(tokenizer_model())
    save_model(file, GPT(shape), stage="sft", tokenizer=tokenizer, lineage=lineage, metrics={})
    history = folder / "data" / "tinychat" / "history"
    history.parent.mkdir(parents=True)
    history.write_text("\n# 2026-01-01 00:00:00\n+asked long ago\n")
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return {
        **kept, "PYTHONPATH": f"{ROOT}:{TESTS}", "HOME": str(home), "OMP_NUM_THREADS": "1",
        "XDG_DATA_HOME": str(home / "data"), "XDG_CONFIG_HOME": str(home / "config"),
        "LANG": "C.UTF-8", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **more,
    }  # fmt: skip


def child(replies: list[str], pause: float, *words: str) -> list[str]:
    code = CHILD.format(replies=replies, pause=pause)
    return [sys.executable, "-c", code, *words, "--ckpt", "sft.safetensors"]


class Window:
    """A program and the screen it draws on."""

    def __init__(self, command: list[str], home: Path, rows: int, columns: int, **more: str):
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.process = pexpect.spawn(
            command[0], command[1:], cwd=str(home), env=environment(home, **more),
            dimensions=(rows, columns), timeout=60,
        )  # fmt: skip

    def lines(self) -> list[str]:
        rows = [
            *self.screen.history.top,
            *(self.screen.buffer[y] for y in range(self.screen.lines)),
        ]
        return ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows]

    def text(self) -> str:
        return "\n".join(self.lines()).rstrip()

    def until(self, done, seconds: float = 60) -> str:
        """Wait for a text, or for what a function says of the whole text."""
        wanted = done if callable(done) else lambda text: done in text
        end = time.monotonic() + seconds
        while not wanted(self.text()):
            assert time.monotonic() < end, f"waited for {done!r}; the screen shows:\n{self.text()}"
            try:
                data = self.process.read_nonblocking(65536, timeout=0.1)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                raise AssertionError(f"it ended before {done!r}:\n{self.text()}") from None
            self.raw += data
            self._stream.feed(data)
        return self.text()

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def ask(self, keys: str, answer: str) -> str:
        """Type something, and wait until its answer and a new prompt are there."""
        before = self.text().count(answer)
        self.type(keys)
        self.until(lambda text: text.count(answer) > before)
        return self.prompt()

    def prompt(self) -> str:
        """Wait for an empty prompt below everything else."""
        return self.until(lambda text: text.split("\n")[-1].rstrip() in (">", "> loading ..."))

    def resize(self, rows: int, columns: int) -> None:
        self.process.setwinsize(rows, columns)
        self.screen.resize(rows, columns)

    def close(self) -> int:
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


def test_a_chat(home):
    replies = [
        "# Title\n\n- one\n- **two**\n",
        "Second.",
        "first words and then " + "many more " * 40,
        "some 漢字 " + " ".join(f"word{number}" for number in range(20)) + " end.",
    ]
    window = Window(child(replies, 0.01, "chat"), home, 24, 60)
    window.prompt()

    # The history of an earlier chat: by its beginning, and by what it contains.
    window.type("ask\x1b[A")
    window.until("> asked long ago")
    window.type("\x03")
    window.prompt()
    window.type("\x12long")
    window.until(lambda text: "I-search" in text and "asked long ago" in text.split("\n")[-2])
    window.type("\x03\x03")
    window.prompt()

    # Tab completes commands and values, and does nothing to a message.
    window.type("/retr\t")
    window.until("> /retry")
    window.type("\x15/set rend\t")
    window.until("> /set render")
    window.type("pl\t")
    window.until("> /set render plain")
    window.type("\x15/")
    window.until("> /")
    window.type("\x15re\t")
    text = window.ask("\x7f\x7fhi\r", "two")
    assert "> hi\nTitle\n\n • one\n • two\n\n>" in text

    # Several pasted lines are one message; so are lines in quotes, and after Alt-Enter.
    for keys, message in (
        ("\x1b[200~one line\nand one\x1b[201~\r", "one line and one"),
        ('"""in\rquotes"""\r', "in quotes"),
        ("before\x1b\rafter\r", "before after"),
    ):
        window.ask(keys, "Second.")
        window.ask("/undo\r", f"(forgotten: {message})")

    # Ctrl-C stops the reply, and only that.
    window.ask("go\r", "Second.")
    window.type("on\r")
    window.until("many more many more")
    text = window.ask("\x03", "(stopped)")
    assert text.count("first words") == 1

    # A window that changes while the reply is drawn.
    window.type("resize\r")
    window.until("some 漢字")
    window.resize(24, 90)
    window.until("end.")
    window.resize(30, 70)
    text = window.prompt()
    assert text.count("word7") == text.count("end.") == 1
    assert "Traceback" not in text

    window.type("\x04")
    assert window.close() == 0
    history = home / "data" / "tinychat" / "history"
    assert "+one line\n+and one\n" in history.read_text()


def test_a_poor_terminal(home):
    """No cursor, 40 columns, no UTF-8, nowhere to write."""
    nowhere = str(home / "sft.safetensors" / "x")
    window = Window(
        child(["Grüße • **漢字** and a line longer than forty columns."], 0, "chat"), home, 10, 40,
        TERM="dumb", LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
        XDG_DATA_HOME=nowhere,
    )  # fmt: skip
    window.prompt()
    window.type("héllo\r")
    text = window.until("columns.")
    assert "Gr??e" in text and "**" in text
    window.prompt()
    window.type("/undo\r")
    window.until("(forgotten: h")
    window.prompt()
    window.type("/quit\r")
    assert window.close() == 0
    assert "Traceback" not in window.text()
    assert b"\x1b[" not in window.raw


def test_a_pipe_that_closes(home):
    # Slow enough that it still writes when this process comes to close its end.
    command = child(["line\n" * 200], 0.05, "ask", "hi")
    with subprocess.Popen(
        command, cwd=home, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as asking:
        assert asking.stdout.readline() == b"line\n"
        asking.stdout.close()
        assert asking.stderr.read() == b""
    assert asking.returncode == 128 + signal.SIGPIPE


STREAM = """
import sys, time
from rich.console import Console
from tinychat.cli.live import LiveMarkdown
print("filled\\n" * 20)
writer = LiveMarkdown(Console(highlight=False))
for word in sys.argv[1].split(" "):
    writer.push(word + " ")
    time.sleep(0.02)
writer.finish()
print("(end)")
time.sleep(60)
"""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is a terminal that wraps anew")
def test_a_resized_terminal_that_wraps_its_lines_anew():
    words = " ".join(f"word{number}" for number in range(60))
    text = f"first paragraph of it\n\n{words}\n\n- a list\n- of {words.upper()}\n"
    tmux = ["tmux", "-L", f"tinychat-{os.getpid()}", "-f", os.devnull]

    def screen() -> str:
        shown = ["capture-pane", "-p", "-J", "-S", "-", "-t", "w"]
        return subprocess.run([*tmux, *shown], capture_output=True, text=True, check=True).stdout

    size = ["-x", "60", "-y", "12"]
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", STREAM, text]
    subprocess.run([*tmux, "new-session", "-d", "-s", "w", *size, *command], check=True)
    try:
        sizes = iter([("30", "12"), ("80", "8"), ("45", "20")])
        end = time.monotonic() + 60
        while "(end)" not in screen():
            assert time.monotonic() < end, screen()
            if "word" in screen() and (size := next(sizes, None)):
                subprocess.run([*tmux, "resize-window", "-t", "w", "-x", size[0], "-y", size[1]])
            time.sleep(0.4)
        shown = screen().split()
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    assert [word for word in shown if word != "filled"] == [
        *text.replace("- ", "• ").split(),
        "(end)",
    ]
