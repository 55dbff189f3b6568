"""The slash commands that keep a conversation: saved chats, files, the clipboard."""

from __future__ import annotations

import base64
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.cli.console import printable, shortened
from tinychat.cli.errors import sentence
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat
    from tinychat.cli.saved import SavedChat


class Filing:
    """Mixed into the slash commands."""

    _chat: Chat

    def do_save(self, name: str) -> None:
        """/save [NAME]: name this chat, or say where it is kept

        Every chat at a terminal is saved after each turn, unless --no-save, TINYCHAT_SAVE=0 or
        `save = false` in the config file says otherwise; then /save NAME begins it.
        """
        from tinychat.cli.saved import Journal, chats_folder, check_name

        chat, journal = self._chat, self._chat.journal
        if not name:
            where = journal.path if journal is not None else None
            if where is None:
                why = "not saved; /save NAME does it" if journal is None else "empty, so not saved"
                raise ConfigError(f"This chat is {why}.")
            chat.screen.note(f"this chat is kept in {where}")
            return
        check_name(name)
        if not chat.session.messages:
            raise ConfigError("There is nothing to save yet; write a message first.")
        if journal is None:
            journal = Journal(chats_folder())
        journal.rename(name)
        journal.follow(chat.session.messages, about(chat))
        chat.journal = journal
        chat.screen.note(f"saved as {name}; /load {name} takes it up again")

    def do_load(self, name: str) -> None:
        """/load NAME: go on with a saved chat

        NAME is what `tinychat chats` lists, or a .jsonl file. The running chat stays saved.
        """
        from tinychat.cli.saved import find_chat

        if not name:
            raise ConfigError("Name a chat, as in /load tea; `tinychat chats` lists them.")
        chat, saved = self._chat, find_chat(name)
        session = chat.session
        if chat.journal is not None:
            chat.journal.take_up(saved)
        session.clear()
        session.messages, session.system = list(saved.messages), saved.system
        welcome_back(chat, saved)

    def do_export(self, name: str) -> None:
        """/export FILE: write the chat as .md, .json or .html

        An existing file is never replaced.
        """
        from tinychat.cli.export import Talk, export

        if not name:
            raise ConfigError("Give the file a name, for example /export chat.md.")
        chat = self._chat
        session, info = chat.session, chat.loading.info
        if not session.messages:
            raise ConfigError("There is nothing to export yet; write a message first.")
        path = Path(os.path.expanduser(name))
        settings = asdict(session.sampling)
        export(path, Talk(info.path.name, info.stage, settings, session.system, session.messages))
        chat.screen.note(f"wrote {path}")

    def do_copy(self, _: str) -> None:
        """/copy: put the last reply on the clipboard

        By the escape sequence OSC 52, which also works over ssh where the terminal allows it.
        """
        chat = self._chat
        if not chat.session.messages:
            raise ConfigError("There is no reply to copy yet; write a message first.")
        if not chat.screen.interactive or os.environ.get("TERM") in ("dumb", "linux"):
            raise ConfigError("There is no terminal with a clipboard here; try /export chat.md.")
        text = printable(chat.session.messages[-1].content).strip()
        # OSC 52: the terminal itself sets the clipboard of the machine that it runs on.
        data = base64.b64encode(text.encode("utf-8", errors="replace")).decode()
        chat.screen.out.file.write(f"\033]52;c;{data}\a")
        chat.screen.out.file.flush()
        chat.screen.note(
            f"{len(text)} characters sent to the terminal's clipboard (by OSC 52; where nothing "
            "arrives, the terminal does not allow it; in tmux: set -g set-clipboard on)"
        )


def about(chat: Chat) -> dict[str, Any]:
    """What a saved chat says of itself beside its turns."""
    info, session = chat.loading.info, chat.session
    return {
        "checkpoint": info.path.name,
        "stage": info.stage,
        "sha256": _sha256(info.path, info.bytes),
        "settings": asdict(session.sampling),
        "system": session.system,
    }


@lru_cache(maxsize=8)
def _sha256(path: Path, _: int) -> str | None:
    from tinychat.runtime.errors import CheckpointError
    from tinychat.runtime.files import file_sha256

    try:
        return file_sha256(path)
    except CheckpointError:  # moved away while it talks
        return None


class Keeper:
    """Lets the journal follow the chat after each turn; says once where that does not work."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._told = False

    def __call__(self) -> None:
        journal = self._chat.journal
        if journal is None:
            return
        try:
            journal.follow(self._chat.session.messages, about(self._chat))
        except OSError as error:
            if not self._told:
                self._chat.screen.note(f"this chat cannot be saved: {sentence(error)}")
            self._told = True
        else:
            self._told = False


def welcome_back(chat: Chat, saved: SavedChat) -> None:
    """Say what was taken up, and what is not as it was."""
    turns, now = len(saved.messages) // 2, chat.loading.info.path.name
    chat.screen.note(f"{saved.name}: {turns} turn{'s' * (turns != 1)}")
    if saved.torn:
        chat.screen.note("its last line was torn off by a crash and is left out")
    then = saved.about.get("checkpoint")
    if then and then != now:
        chat.screen.note(f"it was held with {then}; {now} goes on (/model changes that)")
    if saved.messages:
        last = saved.messages[-2:]
        for speaker, message in zip(("you", "tinychat"), last, strict=True):
            chat.screen.note(f"{speaker}: {shortened(message.content)}")
