"""Markdown while it is written: what stands on a terminal, and in its scroll-back, in the end."""

import io
import re
import signal

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from tinychat.cli.console import PlainText, Screen
from tinychat.cli.live import LiveMarkdown
from tinychat.cli.markdown import finished, rendered

DOCUMENT = """\
# A title

Some **bold** and *soft* words, `code`, a [link](http://x.y/z), <b>tags</b> and A&B.
Second line of the paragraph; 漢字 and 👍 are two cells wide.

- one
- two is longer than the window is wide, so that it goes on in a second row
  1. inner
  2. list

7. seven
8. eight

```python
def f(x):  # ``` inside

    return x
```
> a quote
lazy line

| name | number |
|:--|--:|
| supercalifragilistic | 1 |

---
~~~~
never closed
"""


class Terminal(io.StringIO):
    """A file that is an emulated terminal; it keeps what was written, write by write."""

    def __init__(self, columns: int = 40, rows: int = 10):
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.Stream(self.screen)
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def cells(self) -> list[list]:
        """Scroll-back and window, each cell with its colours, without what is blank at the end."""
        rows = [*self.screen.history.top, *map(self.screen.buffer.__getitem__, range(self.rows))]
        rows = [[row[x] for x in range(self.screen.columns)] for row in rows]
        while rows and not "".join(cell.data for cell in rows[-1]).strip():
            rows.pop()
        return rows

    @property
    def rows(self) -> int:
        return self.screen.lines

    def lines(self) -> list[str]:
        return ["".join(cell.data for cell in row).rstrip() for row in self.cells()]

    def console(self, **options) -> Console:
        return Console(
            file=self, force_terminal=True, color_system="standard", highlight=False,
            width=self.screen.columns, height=self.rows, _environ={}, **options,
        )  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stream(terminal: Terminal, pieces, pauses=None, live: bool = True) -> None:
    clock = Clock()
    writer = LiveMarkdown(terminal.console(), live=live, clock=clock)
    for number, piece in enumerate(pieces):
        clock.now += pauses[number % len(pauses)] if pauses else 1
        writer.push(piece)
    writer.finish()


def plain(text: str, console: Console) -> list[str]:
    return ["".join(segment.text for segment in line) for line in rendered(text, console)]


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


# Blocks in any order, and letters that mean something to Markdown in any order at all.
TEXTS = st.one_of(
    st.lists(st.sampled_from(re.split(r"(?<=\n)(?=\n)", DOCUMENT)), max_size=5).map("".join),
    st.text(alphabet="ab漢 -*#>`|~\n:1.=_+", max_size=60),
    st.lists(
        st.sampled_from(["a", "b c", "\n", "\n\n", "- ", "1. ", "> ", "```", "    ", "# ", "***",
                         "--", "|", "|-|\n", "| x |", "===", "~~~", "  ", "**", "[a]: b", "\t"]),
        max_size=25,
    ).map("".join),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    TEXTS,
    st.lists(st.integers(0, 500), max_size=12),
    st.lists(st.sampled_from([0, 0.03, 1]), min_size=1, max_size=4),
    st.integers(12, 60),
    st.integers(2, 12),
)
def test_the_end_is_the_same_however_it_came(text, places, pauses, columns, rows):
    terminal, at_once = Terminal(columns, rows), Terminal(columns, rows)
    stream(terminal, cut(text, places), pauses)
    stream(at_once, [text])
    assert terminal.lines() == plain(text, terminal.console())
    assert terminal.cells() == at_once.cells()
    assert not terminal.screen.cursor.hidden
    assert terminal.screen.cursor.x == 0


def test_letter_by_letter():
    terminal = Terminal()
    stream(terminal, DOCUMENT)
    assert (
        terminal.lines()
        == """\
A title

Some bold and soft words, code, a link
(http://x.y/z), <b>tags</b> and A&B.
Second line of the paragraph; 漢字 and
👍 are two cells wide.

 • one
 • two is longer than the window is
   wide, so that it goes on in a second
   row
    1. inner
    2. list

 7. seven
 8. eight

  def f(x):  # ``` inside

      return x

▌ a quote
▌ lazy line

 name                  number
 ────────────────────────────
 supercalifragilistic       1

────────────────────────────────────────

  never closed""".split("\n")
    )


BLOCKS = [
    "Two words\n",
    "> said\n",
    "- a\n- b c\n",
    "| x | y |\n|---|---|\n| 1 | two |\n",
    "## H\n",
]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(BLOCKS), max_size=6), st.integers(20, 60))
def test_blocks_look_as_in_richs_own_markdown(blocks, columns):
    ours, theirs = Terminal(columns, 50), Terminal(columns, 50)
    text = "\n".join(blocks)
    stream(ours, text)
    theirs.console().print(Markdown(text, hyperlinks=False))
    assert list(filter(None, ours.lines())) == list(filter(None, theirs.lines()))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab 漢<>/&;[]()!:-*#_=\n", max_size=60), st.integers(1, 60))
def test_no_letter_vanishes(text, columns):
    console = Terminal(columns).console()
    shown = "".join(plain(text, console))
    assert re.findall(r"[ab漢&;!]", shown) == re.findall(r"[ab漢&;!]", text)


@pytest.mark.parametrize("deep", ["> " * 30, "- " * 30, "1. " * 30, "> - " * 15])
def test_text_nested_too_deep_is_shown_as_written(deep):
    assert "".join(plain(f"{deep}word", Terminal().console())).endswith("word")


def test_a_table_with_more_columns_than_fit_is_shown_as_written():
    row = "|".join("abcdefghijklmno")
    lines = plain(f"{row}\n{'|'.join('-' * 15)}\n{row}", Terminal(30).console())
    assert lines[0] == row


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("one\ntwo", "one\ntwo"),
        ("one\n\ntwo", "two"),
        ("one\n\n", "\n"),
        ("one\n#", "one\n#"),  # may become one paragraph, "one #x"
        ("one\n# two\n", "# two\n"),
        ("- a\n\n- b\n", "- a\n\n- b\n"),  # one list
        ("- a\n\nb\n", "b\n"),
        ("```\na\n\n```", "```\na\n\n```"),
        ("```\na\n```\n\n", "\n"),
        ("> a\n\n", "> a\n\n"),
        ("a\n\u2028\n\nb", "b"),  # not a line break to markdown-it
    ],
)
def test_finished(text, rest):
    assert text[finished(text) :].lstrip("\n") == rest.lstrip("\n")


# What is on the way


def live(columns: int = 30, rows: int = 6, **options) -> tuple[Terminal, LiveMarkdown, Clock]:
    terminal, clock = Terminal(columns, rows), Clock()
    return terminal, LiveMarkdown(terminal.console(**options), clock=clock), clock


def test_only_the_end_of_a_tall_block_is_live():
    terminal, writer, clock = live()
    words = [f"- word{number}\n" for number in range(20)]
    for word in words:
        clock.now += 1
        writer.push(word)
        assert not terminal.screen.history.top
    assert [line.strip() for line in terminal.lines()] == [f"• word{n}" for n in (17, 18, 19)]
    writer.finish()
    assert terminal.lines() == [f" • word{number}" for number in range(20)]


def test_a_finished_block_is_in_the_scroll_back_before_the_reply_ends():
    terminal, writer, clock = live(rows=4)
    for piece in ("one\n\n", "two\n\n", "th"):
        clock.now += 1
        writer.push(piece)
    assert terminal.lines() == ["one", "", "two", "", "th"]
    # Where the unfinished block begins, so that a resized terminal keeps the place.
    assert (terminal.screen.cursor.x, terminal.screen.cursor.hidden) == (0, True)
    assert terminal.lines()[len(terminal.screen.history.top) + terminal.screen.cursor.y] == ""


def test_redraws_are_few_and_whole():
    terminal, writer, clock = live()
    for _ in range(1000):
        clock.now += 0.001
        writer.push("word ")
    writes = list(filter(None, terminal.writes))
    assert 10 <= len(writes) <= 17
    for write in writes:
        assert write.startswith("\x1b[?2026h") and write.endswith("\x1b[?2026l")


def test_marks_at_the_end_wait_for_what_they_mean():
    terminal, writer, clock = live()
    for piece in ("Animals:\n", "-"):  # with nothing after it, the dash underlines a heading
        clock.now += 1
        writer.push(piece)
    assert terminal.lines() == ["Animals:"]
    assert not terminal.screen.buffer[0][0].bold


def test_rows_that_are_longer_than_the_terminal_thinks_do_not_shift_the_picture():
    terminal, clock = Terminal(10, 6), Clock()
    console = Console(file=terminal, force_terminal=True, width=14, height=6, _environ={})
    writer = LiveMarkdown(console, clock=clock)
    for word in ("one two three ", "four five six ", "end"):
        clock.now += 1
        writer.push(word)
    assert [line[:9] for line in terminal.lines()] == ["one two t", "four five", "end"]


# The screen


def screen_on(terminal: Terminal, render="auto", **options) -> Screen:
    screen = Screen(interactive=True, render=render)
    screen.out = screen.aside = terminal.console(**options)
    return screen


def test_markup_and_escapes_of_the_model_are_text():
    terminal = Terminal()
    screen_on(terminal).reply(iter(["[red]no[/red]", " \x1b[31mno\x07 :smile: &#27;[2J"]))
    assert terminal.lines() == ["[red]no[/red] [31mno :smile: &#27;[2J"]


def test_ctrl_c_leaves_the_block_as_far_as_it_came():
    def pieces():
        yield "- one\n"
        yield "- two"
        raise KeyboardInterrupt

    terminal = Terminal()
    screen = screen_on(terminal)
    with pytest.raises(KeyboardInterrupt):
        screen.reply(pieces())
    screen.note("stopped")
    assert terminal.lines() == [" • one", " • two", "(stopped)"]


def test_ctrl_c_in_the_middle_of_drawing_waits_for_its_end():
    class Interrupted(Terminal):
        def write(self, text):
            half = text.find("two")
            if half < 0 or self.came:
                return super().write(text)
            super().write(text[:half])
            self.came = True
            signal.raise_signal(signal.SIGINT)
            return super().write(text[half:])

    terminal = Interrupted()
    terminal.came = False
    # Where pytest runs in the background of a script, the shell has switched Ctrl-C off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            screen_on(terminal).reply(iter(["one\n\ntwo", " three"]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert terminal.came and terminal.lines() == ["one", "", "two"]


def test_nothing_to_draw():
    terminal = Terminal()
    screen_on(terminal).reply(iter([" ", "\n"]))
    assert terminal.writes == []


@pytest.mark.parametrize(
    ("render", "environ", "markdown", "moves"),
    [
        ("auto", {"TERM": "xterm"}, True, True),
        ("auto", {"TERM": "dumb"}, False, False),
        ("auto", {"TERM": "xterm", "NO_COLOR": "1"}, True, True),
        ("markdown", {"TERM": "dumb"}, True, False),
        ("plain", {"TERM": "xterm"}, False, False),
    ],
)
def test_render(render, environ, markdown, moves):
    terminal = Terminal()
    screen = Screen(interactive=True, render=render)
    screen.out = Console(
        file=terminal, force_terminal=True, width=40, height=10, _environ=environ, highlight=False
    )
    screen.reply(iter(["## Title\n\n```python\nx = 1\n", "```\n\n**end**"]))
    out = "".join(terminal.writes)
    assert ("##" not in out) == markdown
    assert ("\x1b[?25l" in out) == moves
    colours = re.search(r"\x1b\[[\d;]*\b[39][0-7]m", out)
    assert bool(colours) == (markdown and moves and "NO_COLOR" not in environ)


def test_not_a_terminal_is_never_rendered(capsys):
    screen = Screen(interactive=False, render="markdown")
    screen.reply(iter(["# A *title*\n\n", "- b\n"]))
    assert capsys.readouterr().out == "# A *title*\n\n- b\n\n"
    assert isinstance(screen._writer(), PlainText)


def test_a_terminal_without_unicode():
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="replace")
    writer = LiveMarkdown(Console(file=file, force_terminal=True, width=40, height=9), live=False)
    writer.push("- é\n\n> a\n\n---\n\n|x|\n|-|\n|1|\n")
    writer.finish()
    text = re.sub(r"\x1b\[[\d;]*m", "", file.buffer.getvalue().decode("latin-1"))
    assert "?" not in text
    assert text.startswith(" * é\n\n| a\n\n" + "-" * 40)
