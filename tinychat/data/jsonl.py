"""Lines of JSON, plain or zstd: read safely, with errors that name file and line."""

import json
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from tinychat.data.records import ROLES, Dialogue, Message, Rejected
from tinychat.runtime.errors import DataError

WINDOW = 1 << 27  # the files are packed with a 128 MiB window, above zstandard's default limit


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, unpacking it where its name ends in `.zst`.

    Raises DataError for a missing, empty or corrupt file and for a missing zstandard package.
    """
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: fetch it again, or leave it out")
        with path.open("rb") as file:
            yield from _unpack(file, path) if path.suffix == ".zst" else file
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _unpack(file: BufferedReader, path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path} is packed with zstd: install the reader with `pip install zstandard`"
        ) from error
    rest = b""
    frame = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
    begun = False
    try:
        while block := file.read(1 << 17):
            while block:  # a file may hold several frames
                begun = True
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block = frame.unused_data
                if frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
                    begun = False
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is not a readable zstd file ({error}): fetch it again") from error
    if begun:
        raise DataError(f"{path} is cut off before its end: fetch it again")
    if rest:
        yield rest


def parse_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield `("name:line", record)`; DataError for bytes that are no UTF-8 or no JSON object."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 text: save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} holds {type(record).__name__}, not a JSON object")
        yield where, record


def whole_lines(lines: Iterable[bytes]) -> list[bytes]:
    """The lines without a last one that a crash tore: it has no line break, and is no JSON."""
    found = list(lines)
    if found and not found[-1].endswith(b"\n") and not is_json(found[-1]):
        found.pop()
    return found


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def takes_turns(messages: Sequence[Message]) -> bool:
    """True where user and assistant take turns from the user on, after a system message or none."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return turns == (["user", "assistant"] * len(turns))[: len(turns)]


def text_field(record: dict[str, object], key: str, where: str) -> str:
    """Return a field that must be a string with something in it; else DataError."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where} needs a text in the field "{key}"')
    return value


def parse_dialogue(record: dict[str, object], where: str, source: str, id: str = "") -> Dialogue:
    """Check one dialogue record; DataError names the place and what is wrong with it."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where} needs a list of messages in the field "messages"')
    train_on = record.get("train_on", "all")
    if train_on not in ("all", "last"):
        raise DataError(f'{where}: "train_on" is {train_on!r}; it can be "all" or "last"')
    rejected = record.get("rejected", [])
    if not isinstance(rejected, list) or not all(isinstance(r, dict) for r in rejected):
        raise DataError(f'{where}: "rejected" must be a list of replies')
    return Dialogue(
        id=id or text_field(record, "id", where),
        topic=str(record.get("topic", "")),
        messages=tuple(_message(message, where) for message in messages),
        rejected=tuple(
            Rejected(str(r.get("flaw", "")), text_field(r, "content", where)) for r in rejected
        ),
        train_on="last" if train_on == "last" else "all",
        source=source,
    )


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"{where}: a message needs a role of {', '.join(ROLES)}")
    return Message(message["role"], text_field(message, "content", where))
