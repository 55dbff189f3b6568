"""What the chat looks like: the only module that draws. Text is never read as markup."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

# A model writes bytes, so it can write escape sequences; a terminal must not obey them.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters; line breaks and tabs stay."""
    return text.translate(_CONTROLS)


def shortened(text: str, width: int = 60) -> str:
    """The text in one printable line of at most `width` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else line[: width - 3] + "..."


def is_terminal(stream: Any) -> bool:
    """True where a person sits at it; a standard stream that was closed is None."""
    return stream is not None and not stream.closed and bool(stream.isatty())


def print_json(record: Any) -> None:
    """One line of JSON for other programs; \\u escapes where the pipe is not UTF-8 (Windows)."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    print(json.dumps(record, ensure_ascii=encoding != "utf8"))


Render = Literal["auto", "markdown", "plain"]
"""How replies look on a terminal. auto: Markdown, except where it cannot be redrawn."""


class Writer(Protocol):
    """Draws one reply."""

    def push(self, text: str) -> None: ...

    def finish(self) -> None:
        """Write what was held back, and end the line."""
        ...


class Screen:
    """A terminal; or, when `interactive` is False, replies on standard output and nothing else."""

    def __init__(self, interactive: bool, render: Render = "auto") -> None:
        self.interactive = interactive
        self.render = render
        self.out = Console(highlight=False)
        self.aside = self.out if interactive else Console(stderr=True, highlight=False)

    def reply(self, pieces: Iterator[str]) -> None:
        """Write a reply as it comes; end its line however the reply ends.

        Where people read, lines break between words, and Markdown is drawn. Elsewhere the text
        comes out as the model wrote it.
        """
        writer = self._writer()
        begun = False
        try:
            for piece in pieces:
                text = printable(piece) if begun else printable(piece).lstrip()
                begun = begun or bool(text)
                if text:
                    writer.push(text)
        except BaseException:
            if begun:
                writer.finish()
            raise
        if begun or not self.interactive:
            writer.finish()

    def _writer(self) -> Writer:
        # A terminal that cannot move its cursor gets each block when it is finished.
        moves = self.interactive and not self.out.is_dumb_terminal and not self.out.legacy_windows
        markdown = self.render == "markdown" or (
            self.render == "auto" and moves and self.out.is_terminal
        )
        if self.interactive and markdown:
            from tinychat.cli.live import LiveMarkdown  # Rich's Markdown takes a while to import

            return LiveMarkdown(self.out, live=moves)
        return PlainText(self.out, wrapped=self.interactive)

    def note(self, text: str) -> None:
        """A remark of the program, not of the model."""
        self.aside.print(Text(f"({printable(text)})", style="dim"))

    def complain(self, text: str) -> None:
        """Something that did not work, after which the conversation goes on."""
        self.aside.print(Text(printable(text), style="red"))

    def show(self, thing: RenderableType) -> None:
        self.aside.print(thing)

    def space(self) -> None:
        """A blank line, where people read."""
        if self.interactive:
            self.out.print()

    def waiting(self, text: str) -> Any:
        """A context manager that shows a spinner (nothing where there is no terminal)."""
        return self.aside.status(Text(text, style="dim"))


class PlainText:
    """The text itself, at once; `wrapped` breaks it between words."""

    def __init__(self, console: Console, wrapped: bool) -> None:
        self._file = console.file
        self._wrap = WordWrap(lambda: console.width if wrapped else None)

    def push(self, text: str) -> None:
        self._write(self._wrap.push(text))

    def finish(self) -> None:
        self._write(self._wrap.flush() + "\n")

    def _write(self, text: str) -> None:
        if text:
            self._file.write(text)
            self._file.flush()


class WordWrap:
    """Breaks streamed text between words: `width()` is the terminal's now, None never breaks.

    A word is held back until its end is known; one wider than the line is left to the terminal.
    """

    def __init__(self, width: Callable[[], int | None]) -> None:
        self._width = width
        self._column = 0
        self._gap = ""
        self._word = ""

    def push(self, text: str) -> str:
        """Take some text; return what can be written now."""
        width = self._width()
        if width is None:
            return text
        done = []
        for letter in text:
            if not letter.isspace():
                self._word += letter
                continue
            done.append(self._place(width))
            if letter == "\n":
                done.append("\n")
                self._gap, self._column = "", 0
            else:
                self._gap += " " if letter != "\t" else "    "
        return "".join(done)

    def flush(self) -> str:
        """Return the word that was held back."""
        width = self._width()
        return self._place(width) if width is not None else ""

    def _place(self, width: int) -> str:
        if not self._word:
            return ""
        size, gap, word = cell_len(self._word), self._gap, self._word
        self._gap = self._word = ""
        if self._column and self._column + len(gap) + size > width:
            self._column = size
            return "\n" + word
        self._column += len(gap) + size
        return gap + word
