"""Where the user's lines come from: a terminal with line editing, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tinychat.runtime.errors import DataError

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples

    from tinychat.cli.loading import Loading


QUOTES = '"""'


class Reader(Protocol):
    interactive: bool

    def read(self, default: str = "") -> str:
        """The next message, `default` on the line to begin with.

        Raises EOFError at the end and KeyboardInterrupt for Ctrl-C.
        """
        ...

    @property
    def unsent(self) -> str:
        """What stood on the line when Ctrl-C came."""
        ...


class TerminalReader:
    """Line editing by prompt_toolkit. The model starts to load once the prompt is on the screen."""

    interactive = True

    def __init__(
        self,
        loading: Loading,
        completions: Callable[[str], list[str]] | None = None,
        history: Path | None = None,
    ) -> None:
        """`completions` gets a line that begins a command, up to the cursor, and returns words
        that could stand at its end. Without `history`, lines are remembered for this chat only.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.application import create_app_session
        from prompt_toolkit.output.plain_text import PlainTextOutput
        from prompt_toolkit.utils import is_dumb_terminal

        from tinychat.cli.editing import History, SlashCompleter, key_bindings

        self._loading = loading
        self._dumb = is_dumb_terminal()
        # Without this, it would send a dumb terminal some escape sequences after all.
        with create_app_session(output=PlainTextOutput(sys.stdout) if self._dumb else None):
            self._prompt: PromptSession[str] = PromptSession(
                [("bold", "> ")],
                rprompt=self._progress,
                multiline=True,
                prompt_continuation=[("fg:ansibrightblack", ". ")],
                key_bindings=key_bindings(),
                completer=SlashCompleter(completions or (lambda line: [])),
                complete_while_typing=False,
                history=History(history) if history is not None else None,
                enable_history_search=True,
                search_ignore_case=True,
                enable_open_in_editor=True,
                tempfile_suffix=".md",
            )
        self._app = self._prompt.app
        self._app.after_render += lambda _: loading.start()
        loading.on_end = self._wake

    def read(self, default: str = "") -> str:
        if self._dumb:  # prompt_toolkit draws nothing there, and nothing starts the model
            self._loading.start()
        text = self._prompt.prompt(default=default)
        # Letters that the locale cannot decode arrive byte by byte; terminals send UTF-8.
        return unquoted(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))

    @property
    def unsent(self) -> str:
        return self._prompt.default_buffer.text

    def _progress(self) -> StyleAndTextTuples:
        # Not drawn with the accepted line, so that it doesn't stay in the scroll-back.
        shown = self._loading.running and not self._app.is_done
        return [("fg:ansibrightblack", "loading ...")] if shown else []

    def _wake(self) -> None:
        """Called in the loading thread at its end: hide the notice, or show what went wrong."""
        loop = self._app.loop
        if loop is not None and self._app.is_running:
            loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        if self._loading.error is not None and not self._app.is_done:
            self._app.exit(exception=self._loading.error)
        else:
            self._app.invalidate()


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """What is typed while a reply is drawn waits for the next prompt, unseen until then.

    The terminal would show it in the middle of the reply. The prompt has a mode of its own.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    keyboard = sys.stdin.fileno()
    usual = termios.tcgetattr(keyboard)
    quiet = [*usual[:3], usual[3] & ~termios.ECHO, *usual[4:]]
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, usual)


class PipeReader:
    """Lines of standard input as they are, without a prompt."""

    interactive = False
    unsent = ""

    def read(self, default: str = "") -> str:
        text = as_text(sys.stdin.buffer.readline())
        if not text:
            raise EOFError
        while is_open(text) and (line := as_text(sys.stdin.buffer.readline())):
            text += line
        return unquoted(text)


def is_open(text: str) -> bool:
    """Triple quotes have begun, and not ended yet: the message goes on in the next line."""
    text = text.lstrip()
    return text.startswith(QUOTES) and QUOTES not in text[len(QUOTES) :]


def unquoted(text: str) -> str:
    """The message inside triple quotes, which is never a command; other text as it is."""
    if not text.lstrip().startswith(QUOTES):
        return text
    inside, _, rest = text.lstrip()[len(QUOTES) :].partition(QUOTES)
    if rest.strip():
        return text
    inside = inside.strip()
    return f"/{inside}" if inside.startswith("/") else inside  # the loop takes one slash away


def as_text(data: bytes) -> str:
    """Decode what came in through a pipe. Raises DataError when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Standard input is not UTF-8 text: byte {error.start + 1} is "
            f"0x{data[error.start]:02x}; convert it first, for example with iconv -t UTF-8."
        ) from None
