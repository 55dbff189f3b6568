"""The loop of `tinychat chat`: read a line, obey or answer it, until the user leaves."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING

from tinychat.cli.commands import Commands
from tinychat.cli.console import Screen
from tinychat.cli.loading import Loading
from tinychat.cli.reading import Reader
from tinychat.runtime.errors import TinychatError

if TYPE_CHECKING:
    from tinychat.cli.keys import Keys
    from tinychat.cli.saved import Journal
    from tinychat.cli.session import ChatSession

NOTES = {
    "loop": "stopped, because the reply was repeating itself",
    "length": "cut at the longest reply allowed; /continue goes on, /set max_tokens N allows more",
    "stopped": "stopped",
}


class Chat:
    """One conversation at one terminal (or pipe)."""

    def __init__(self, loading: Loading, reader: Reader, screen: Screen) -> None:
        self.loading = loading
        self.reader = reader
        self.screen = screen
        self.leaving = False
        self.journal: Journal | None = None
        self.keys: Keys | None = None
        """asks for a single key; None where nobody sits at a terminal"""
        self.prefill = ""
        """stands on the next line to begin with, for the user to edit"""
        self.on_turn: Callable[[], None] = lambda: None
        """called whenever a turn has entered the conversation"""
        self._commands = Commands(self)
        self._interrupts = 0
        self._told_dropped = False

    @property
    def session(self) -> ChatSession:
        """The conversation; waits, and shows so, while the model is still loading."""
        self.loading.start()
        if not self.loading.running:
            return self.loading.session()
        with self.screen.waiting(f"loading {self.loading.info.path.name} ..."):
            return self.loading.session()

    def run(self) -> None:
        """Until /quit, the end of the input, or Ctrl-C twice at an empty prompt."""
        while not self.leaving:
            if self.loading.error is not None:
                raise self.loading.error
            prefill, self.prefill = self.prefill, ""
            try:
                line = self.reader.read(prefill).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._interrupted()
                continue
            self._interrupts = 0
            if not line:
                continue
            try:
                self._obey(line)
                if not self.leaving:
                    self.screen.space()
            except KeyboardInterrupt:
                if not self.reader.interactive:
                    raise
                self.screen.note(NOTES["stopped"])
                self.screen.space()

    def _obey(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._commands.run(line)
        else:  # two slashes: a message that begins with one
            self.answer(line[1:] if line.startswith("//") else line)

    def answer(self, text: str | None) -> None:
        """Draw the reply to a message, or for None another reply to the last one."""
        self.draw(lambda session: session.retry() if text is None else session.reply(text))

    def draw(self, begin: Callable[[ChatSession], Generator[str, None, None]]) -> None:
        """Draw the reply that `begin` starts, and say how it ended."""
        try:
            with closing(begin(self.session)) as pieces:
                self.screen.reply(pieces)
        except KeyboardInterrupt:
            if not self.reader.interactive:
                raise
            self._report()
        except TinychatError as error:
            if error is self.loading.error:
                raise
            self.screen.complain(str(error))
            return
        else:
            self._report()
        last = None if self.loading.running else self.session.last
        if last is not None and last.text.strip():
            self.on_turn()

    def _report(self) -> None:
        """Say how the reply ended, where that is not plain to see."""
        last = None if self.loading.running else self.session.last
        if last is None or (last.ended == "stopped" and not last.text.strip()):
            self.screen.note("stopped before the first word; the message was not kept")
        elif not last.text.strip():
            self.screen.note("no words came, so this turn is not kept; ask again, or differently")
        elif last.ended in NOTES:
            self.screen.note(NOTES[last.ended])
        if last is not None and last.dropped and not self._told_dropped:
            self._told_dropped = True
            self.screen.note("the conversation has grown longer than the model can read: "
                             "from now on its oldest turns are left out")  # fmt: skip

    def _interrupted(self) -> None:
        """Ctrl-C at the prompt: an empty line means leaving, if it comes twice."""
        if not self.reader.interactive:
            raise KeyboardInterrupt
        self._interrupts = 0 if self.reader.unsent else self._interrupts + 1
        self.leaving = self._interrupts == 2
        if self._interrupts == 1:
            self.screen.note("Ctrl-C once more leaves, and so does Ctrl-D")
