"""Where the user's lines come from: a terminal with line editing, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from tinychat.runtime.errors import DataError

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples

    from tinychat.cli.loading import Loading


class Reader(Protocol):
    interactive: bool

    def read(self) -> str:
        """The next line. Raises EOFError at the end and KeyboardInterrupt for Ctrl-C."""
        ...

    @property
    def unsent(self) -> str:
        """What stood on the line when Ctrl-C came."""
        ...


class TerminalReader:
    """Line editing by prompt_toolkit. The model starts to load once the prompt is on the screen."""

    interactive = True

    def __init__(self, loading: Loading) -> None:
        from prompt_toolkit import PromptSession

        self._loading = loading
        self._prompt: PromptSession[str] = PromptSession(
            [("bold", "> ")], rprompt=self._progress, enable_history_search=True
        )
        self._app = self._prompt.app
        self._app.after_render += lambda _: loading.start()
        loading.on_end = self._wake

    def read(self) -> str:
        return self._prompt.prompt()

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

    def read(self) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return as_text(line)


def as_text(data: bytes) -> str:
    """Decode what came in through a pipe. Raises DataError when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Standard input is not UTF-8 text: byte {error.start + 1} is "
            f"0x{data[error.start]:02x}; convert it first, for example with iconv -t UTF-8."
        ) from None
