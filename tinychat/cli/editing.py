"""The line editor's own parts: keys, completion, and a history that outlives the chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from tinychat.cli.reading import is_open


class History(FileHistory):
    """Lines in a private file; where none can be read or written, only this chat's own."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            path = Path(os.fspath(self.filename))  # type: ignore[arg-type]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            super().store_string(string)


class SlashCompleter(Completer):
    """Completes commands and what may follow them; in a message, Tab has no effect."""

    def __init__(self, words: Callable[[str], list[str]]) -> None:
        self._words = words

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or line.startswith("//") or "\n" in line:
            return
        last = line.split(" ")[-1]
        words = [word for word in self._words(line) if word.startswith(last)]
        for word in words:
            text = f"{word} " if len(words) == 1 else word
            yield Completion(text, start_position=-len(last), display=word)


def key_bindings() -> KeyBindings:
    """Enter sends, except inside open quotes; Alt-Enter breaks the line."""
    keys = KeyBindings()
    writing = has_focus(DEFAULT_BUFFER)

    @Condition
    def choosing() -> bool:
        state = get_app().current_buffer.complete_state
        return state is not None and state.current_completion is not None

    @keys.add("enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("enter", filter=writing & choosing)  # a line in the menu: take it, don't send yet
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.complete_state = None

    @keys.add("escape", "enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
