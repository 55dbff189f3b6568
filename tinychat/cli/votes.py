"""Votes in a file: which of two replies a person liked better. Only ever appended to. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinychat import __version__
from tinychat.data.jsonl import is_json, parse_lines, read_lines, whole_lines
from tinychat.data.preferences import prompt_key
from tinychat.data.records import Message
from tinychat.runtime.errors import DataError
from tinychat.runtime.files import take_lock

Winner = Literal["a", "b", "tie", "bad"]


@dataclass(frozen=True)
class Maker:
    """What wrote a reply."""

    name: str
    "the checkpoint's file name"
    stage: str
    sha256: str
    seed: int | None
    "None where the dice were thrown anew and nobody can repeat it"
    ended: str
    "end, length, loop or stopped"


@dataclass(frozen=True)
class Vote:
    """One comparison, as a line of the file."""

    prompt: Sequence[Message]
    a: str
    b: str
    winner: Winner
    "tie: equally good; bad: both are"
    left: Literal["a", "b"]
    "which of them was shown first"
    made: Mapping[str, Maker | None]
    "who wrote a and b; None where nobody knows, as in a chat that was loaded"
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {
            "prompt": [{"role": m.role, "content": m.content} for m in self.prompt],
            "a": self.a,
            "b": self.b,
            "winner": self.winner,
            "left": self.left,
            "made": {side: asdict(maker) if maker else None for side, maker in self.made.items()},
            "sampling": {name: one for name, one in self.sampling.items() if name != "seed"},
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tinychat": __version__,
        }


def votes_file() -> Path:
    """Where votes are kept when no other file is named; it need not exist."""
    from platformdirs import user_data_dir

    return Path(user_data_dir("tinychat")) / "votes.jsonl"


def append(path: Path, vote: Vote) -> None:
    """Add a vote; it is durable when this returns. The file is the user's alone. Raises OSError.

    What a crash left behind the last whole line goes.
    """
    # A lone surrogate becomes \udc80, which is how JSON spells it.
    line = json.dumps(vote.record(), ensure_ascii=False) + "\n"
    data = line.encode("utf-8", errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(handle, "r+b") as file:
        take_lock(file.fileno(), wait=True)  # two duels may write into one file
        tail = _tail(file)
        if tail and is_json(tail):  # whoever edited the file last left the line open
            data = b"\n" + data
        elif tail:
            file.seek(-len(tail), os.SEEK_END)
            file.truncate()
        file.seek(0, os.SEEK_END)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _tail(file: Any) -> bytes:
    """What stands behind the last line break."""
    tail = b""
    end = file.seek(0, os.SEEK_END)
    while end > 0 and b"\n" not in tail:
        begin = max(0, end - 65_536)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        end = begin
    return tail.rpartition(b"\n")[2]


def check_file(path: Path) -> None:
    """Raise, before anything is drawn, where votes cannot be added to the file.

    OSError where the system refuses it, DataError where it holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        path.unlink()
    except FileExistsError:
        os.close(os.open(path, os.O_RDWR))
        for _ in records(path):
            pass


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The votes of a file that need not exist, without one that a crash tore. Raises DataError."""
    if not path.exists() or path.stat().st_size == 0:
        return
    for where, record in parse_lines(whole_lines(read_lines(path)), str(path)):
        if not _is_vote(record):
            raise DataError(
                f"{where} is no vote (a prompt, the replies a and b, and a winner: a, b, tie or "
                "bad); remove the line, or name another file."
            )
        yield record


def _is_vote(record: Mapping[str, Any]) -> bool:
    prompt = record.get("prompt")
    return (
        record.get("winner") in ("a", "b", "tie", "bad")
        and all(isinstance(record.get(side), str) for side in "ab")
        and isinstance(prompt, list)
        and all(
            isinstance(turn, dict)
            and all(isinstance(turn.get(k), str) for k in ("role", "content"))
            for turn in prompt
        )
    )


def voted(path: Path, pair: frozenset[str]) -> set[str]:
    """The keys of the prompts that were voted on already for these checkpoints (by sha256)."""
    return {
        prompt_key([Message(turn["role"], turn["content"]) for turn in record["prompt"]])
        for record in records(path)
        if frozenset(maker["sha256"] for maker in makers(record) if maker) == pair
    }


def makers(record: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Who wrote a and b; None where a line written by hand, or an old one, doesn't say."""
    made = record.get("made")
    both = [made.get(side) if isinstance(made, dict) else None for side in "ab"]
    a, b = (
        one
        if isinstance(one, dict) and all(isinstance(one.get(k), str) for k in ("name", "sha256"))
        else None
        for one in both
    )
    return a, b
