"""What the chat looks like: the only module that draws. Text is never read as markup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

# A model writes bytes, so it can write escape sequences; a terminal must not obey them.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters; line breaks and tabs stay."""
    return text.translate(_CONTROLS)


class Screen:
    """A terminal; or, when `interactive` is False, replies on standard output and nothing else."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self.out = Console(highlight=False)
        self.aside = self.out if interactive else Console(stderr=True, highlight=False)

    def reply(self, pieces: Iterator[str]) -> None:
        """Write a reply as it comes, wrapped between words on a terminal; end its line always."""
        wrap = WordWrap(lambda: self.out.width if self.interactive else None)
        begun = False
        try:
            for piece in pieces:
                text = printable(piece) if begun else printable(piece).lstrip()
                begun = begun or bool(text)
                self._write(wrap.push(text))
        except BaseException:
            if begun:
                self._write(wrap.flush() + "\n")
            raise
        if begun or not self.interactive:
            self._write(wrap.flush() + "\n")

    def _write(self, text: str) -> None:
        if text:
            self.out.file.write(text)
            self.out.file.flush()

    def note(self, text: str) -> None:
        """A remark of the program, not of the model."""
        self.aside.print(Text(f"({text})", style="dim"))

    def complain(self, text: str) -> None:
        """Something that did not work, after which the conversation goes on."""
        self.aside.print(Text(text, style="red"))

    def show(self, thing: RenderableType) -> None:
        self.aside.print(thing)

    def space(self) -> None:
        """A blank line, where people read."""
        if self.interactive:
            self.out.print()

    def waiting(self, text: str) -> Any:
        """A context manager that shows a spinner (nothing where there is no terminal)."""
        return self.aside.status(Text(text, style="dim"))


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
