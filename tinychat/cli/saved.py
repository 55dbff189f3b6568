"""Saved chats: one JSON line a turn, so that a crash loses at most the reply being written.

The first line says what the chat began with. A line `{"user", "reply"}` adds a turn,
`{"keep": n}` drops the turns after the n-th (undo, retry, edit), `{"now": {...}}` tells of another
checkpoint, other settings, another system message. Only ever appended to. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tinychat import __version__
from tinychat.cli.errors import nearest
from tinychat.data.records import Message
from tinychat.runtime.errors import ConfigError, DataError
from tinychat.runtime.files import take_lock

FORMAT = 1
SUFFIX = ".jsonl"


@dataclass(frozen=True)
class SavedChat:
    """What a file holds."""

    path: Path
    about: dict[str, Any]
    "checkpoint, stage, sha256, settings and system message at its end"
    started: str
    messages: list[Message]
    whole: int
    "bytes of complete lines; what follows was torn off by a crash"
    torn: bool
    changed: float
    "seconds since 1970"

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def system(self) -> str | None:
        return self.about.get("system")


def chats_folder() -> Path:
    """Where chats are kept; it need not exist."""
    from platformdirs import user_data_dir

    return Path(user_data_dir("tinychat")) / "chats"


def read_chat(path: Path) -> SavedChat:
    """Read a file. A torn last line is left out; DataError for anything else that is wrong."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    torn = whole < len(data)
    about: dict[str, Any] = {}
    started = ""
    messages: list[Message] = []
    lines = data[:whole].split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if number == 1:
                if entry["format"] != FORMAT:
                    raise DataError(
                        f"{path} has format {entry['format']!r} and this tinychat reads {FORMAT}; "
                        "it takes the tinychat that wrote it."
                    )
                started, about = str(entry["started"]), _checked(entry)
            elif "keep" in entry:
                if type(entry["keep"]) is not int or not 0 <= entry["keep"] <= len(messages) // 2:
                    raise ValueError
                del messages[2 * entry["keep"] :]
            elif "now" in entry:
                about |= _checked(entry["now"])
            else:
                messages += [_message("user", entry["user"]), _message("assistant", entry["reply"])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number == len(lines) > 1:  # a crash of the whole machine can leave such a line
                return SavedChat(
                    path, about, started, messages, whole - len(line) - 1, True, _changed(path)
                )
            raise DataError(
                f"{path}: line {number} is not one of a saved chat; remove the line, or the file."
            ) from None
    if not lines:
        raise DataError(f"{path} holds no saved chat; it can be removed.")
    return SavedChat(path, about, started, messages, whole, torn, _changed(path))


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _checked(entry: Mapping[str, Any]) -> dict[str, Any]:
    about = {key: entry[key] for key in ABOUT if key in entry}
    if not isinstance(about.get("system", ""), str | None):
        raise TypeError
    return about


ABOUT = ("checkpoint", "stage", "sha256", "settings", "system")


def _message(role: str, text: Any) -> Message:
    if not isinstance(text, str):
        raise TypeError
    return Message(role, text)


def saved_chats(folder: Path | None = None) -> list[SavedChat]:
    """Every readable chat with at least one turn, the newest first."""
    found = []
    for path in (folder or chats_folder()).glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError, DataError):
            found.append(read_chat(path))
    chats = [chat for chat in found if chat.messages]
    return sorted(chats, key=lambda chat: (chat.changed, chat.name), reverse=True)


def find_chat(name: str, folder: Path | None = None) -> SavedChat:
    """The chat that a name, or the path of a file, means. Raises ConfigError for neither."""
    folder = folder or chats_folder()
    for path in (folder / f"{name}{SUFFIX}", Path(os.path.expanduser(name))):
        if path.suffix == SUFFIX and path.is_file():
            return read_chat(path)
    known = [chat.name for chat in saved_chats(folder)]
    hint = nearest(name, known)
    listed = "`tinychat chats` lists them" if known else "none is saved yet"
    raise ConfigError(f"There is no saved chat {name!r};{hint} {listed}.".replace("; D", "; d"))


def check_name(name: str) -> None:
    """Raise ConfigError for a name that would be no plain file name everywhere."""
    if not re.fullmatch(r"\w[\w .+-]{0,79}", name) or name.endswith((".", " ")):
        raise ConfigError(
            f"{name!r} cannot name a chat; take up to 80 letters, digits, spaces and . + - _ "
            "(/export writes to a path)."
        )


class Journal:
    """The file of the running chat. It follows the conversation, whatever happens to that.

    The file is created with the first turn. What was written is durable when `follow` returns; if
    it raises OSError, the next call tries all of it again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._file: BinaryIO | None = None
        self._name: str | None = None
        self._end = 0
        self._messages: list[Message] = []
        self._about: dict[str, Any] = {}

    def follow(self, messages: Sequence[Message], about: Mapping[str, Any]) -> None:
        """Make the file say what the conversation now is."""
        if self._file is None and not messages:
            return
        lines: list[dict[str, Any]] = []
        if self._file is None:
            self._create()
        if self._end == 0:
            header = {"tinychat": __version__, "format": FORMAT, "started": _now()}
            lines.append({**header, **about})
            # Nothing of an earlier try counts.
            self._messages, self._about = [], dict(about)
        changed = {key: value for key, value in about.items() if self._about.get(key) != value}
        if changed:
            lines.append({"now": changed})
        same = 0
        for old, new in zip(self._messages, messages, strict=False):
            if old != new:
                break
            same += 1
        same //= 2
        if same < len(self._messages) // 2:
            lines.append({"keep": same})
        for place in range(2 * same, len(messages), 2):
            user, reply = messages[place].content, messages[place + 1].content
            lines.append({"user": user, "reply": reply, "time": _now()})
        if lines:
            self._append(lines)
        self._messages, self._about = list(messages), dict(about)

    def take_up(self, chat: SavedChat) -> None:
        """Go on with a saved chat. ConfigError, and nothing changes, where another has it open."""
        if self.path is not None and chat.path.resolve() == self.path.resolve():
            return
        file = chat.path.open("r+b")
        try:
            _lock(file, chat.path)
        except BaseException:
            file.close()
            raise
        self.leave()
        self.path, self._file, self._end = chat.path, file, chat.whole
        self._messages, self._about = list(chat.messages), dict(chat.about)

    def leave(self) -> None:
        """Close the file as it is; what follows goes into a new one."""
        if self._file is not None:
            self._file.close()
        self.path, self._file, self._name, self._end = None, None, None, 0
        self._messages, self._about = [], {}

    def rename(self, name: str) -> None:
        """Call the chat `name`. ConfigError when another has that name already."""
        check_name(name)
        new = self.folder / f"{name}{SUFFIX}"
        if self.path is None:
            if new.exists():
                raise ConfigError(f"There is a chat {name!r} already; choose another name.")
            self._name = name
            return
        if self.path == new:
            return
        if new.exists() and not new.samefile(self.path):
            raise ConfigError(f"There is a chat {name!r} already; choose another name.")
        self.path = self.path.rename(new)

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stem = self._name or time.strftime("%Y-%m-%d-%H%M%S")
        for number in range(1, 1000):
            path = self.folder / f"{stem}{'' if number == 1 else f'-{number}'}{SUFFIX}"
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                continue
            self._file, self.path, self._end = os.fdopen(handle, "r+b"), path, 0
            _lock(self._file, path)
            return
        raise FileExistsError(17, "Too many chats have this name", str(self.folder / stem))

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        assert self._file is not None
        # A lone surrogate becomes \udc80, which is how JSON spells it.
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        data = text.encode("utf-8", errors="backslashreplace")
        # Whatever a crash or an earlier, failed try left behind the last whole line goes.
        self._file.seek(self._end)
        self._file.truncate()
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._end += len(data)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _lock(file: BinaryIO, path: Path) -> None:
    """Hold the file until it is closed. Raises ConfigError where another process does."""
    if not take_lock(file.fileno()):
        raise ConfigError(
            f"The chat {path.stem!r} is open in another tinychat; leave that one first."
        )


def show_chats(as_json: bool) -> None:
    """Print the saved chats, the newest first."""
    chats, folder = saved_chats(), chats_folder()
    if as_json:
        rows = [
            {
                "name": chat.name,
                "path": str(chat.path),
                "changed": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(chat.changed)),
                "turns": len(chat.messages) // 2,
                "checkpoint": chat.about.get("checkpoint"),
                "first": chat.messages[0].content,
            }
            for chat in chats
        ]
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from tinychat.cli.console import printable

    console = Console()
    if not chats:
        console.print(Text(f"No chat is saved in {folder} yet."), soft_wrap=True)
        return
    table = Table(
        "name", "date", Column("turns", justify="right"),
        Column("first words", no_wrap=True, overflow="ellipsis"),
    )  # fmt: skip
    for chat in chats:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.changed))
        first = " ".join(printable(chat.messages[0].content).split())
        table.add_row(Text(chat.name), date, str(len(chat.messages) // 2), Text(first))
    console.print(table)
    console.print(Text(f"in {folder}; /load NAME goes on with one"), soft_wrap=True)
