"""One key of the user's: from a terminal as it is pressed, elsewhere a line for each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.text import Text

from tinychat.cli.reading import PipeReader, Reader


@dataclass(frozen=True)
class Choice:
    """Something that one key means."""

    key: str
    "its letter, lower case"
    text: str
    "what the line of help says of it"
    also: tuple[str, ...] = ()
    "other keys, as prompt_toolkit names them"


class Keys(Protocol):
    def read(self, choices: Sequence[Choice]) -> str:
        """The key of one of the choices.

        Raises EOFError for Q and at the end, and KeyboardInterrupt for Ctrl-C.
        """
        ...


def keys_here(console: Console) -> Keys:
    """The keyboard of a terminal. A poor one sends whole lines."""
    return LineKeys(console) if console.is_dumb_terminal else TerminalKeys()


def legend(choices: Sequence[Choice]) -> str:
    return " · ".join(f"{one.key.upper()} {one.text}" for one in (*choices, Choice("q", "quit")))


class TerminalKeys:
    """A keyboard. The line of help is on the screen as long as it waits."""

    def read(self, choices: Sequence[Choice]) -> str:
        from prompt_toolkit.application import Application
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.layout import FormattedTextControl, Layout, Window

        bindings = KeyBindings()

        def bind(key: str, answer: str | type[BaseException]) -> None:
            def press(event: KeyPressEvent) -> None:
                if isinstance(answer, str):
                    event.app.exit(result=answer)
                else:
                    event.app.exit(exception=answer)

            bindings.add(key)(press)

        for one in choices:
            for key in (one.key, one.key.upper(), *one.also):
                bind(key, one.key)
        for key in ("q", "Q", "escape", "c-d"):
            bind(key, EOFError)
        bind("c-c", KeyboardInterrupt)
        control = FormattedTextControl(
            FormattedText([("fg:ansibrightblack", legend(choices))]), show_cursor=False
        )
        window = Window(control, dont_extend_height=True, wrap_lines=True)
        app: Application[str] = Application(
            Layout(window), key_bindings=bindings, erase_when_done=True
        )
        _forget_typed(app)  # a key that was pressed before the replies were there judges nothing
        try:
            return app.run()
        finally:
            _forget_typed(app)


def _forget_typed(app: object) -> None:
    """Throw away what was typed and not read yet."""
    from prompt_toolkit.input.typeahead import clear_typeahead

    clear_typeahead(app.input)  # type: ignore[attr-defined]
    try:
        import termios
    except ImportError:  # Windows
        return
    if sys.stdin.isatty():
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


class LineKeys:
    """A line a key: from a pipe, or (with a `console` to ask on) from a terminal without cursor."""

    def __init__(self, console: Console | None = None, reader: Reader | None = None) -> None:
        self._console = console
        self._reader = reader or PipeReader()

    def read(self, choices: Sequence[Choice]) -> str:
        meaning = {key: one.key for one in choices for key in (one.key, *one.also)}
        while True:
            self._say(legend(choices))
            word = self._reader.read().strip().lower()
            if word in ("q", "quit"):
                raise EOFError
            if word in meaning:
                return meaning[word]
            if word:
                self._say(f"{word[:20]!r} is none of these.")

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(Text(text, style="dim"))
