"""The public sources: what each is, where it lies, its licence, and how to read it.

Nothing here downloads: the files lie in a folder that `--data` or `TINYCHAT_DATA` names, as
`public/pretrain/NAME.jsonl.zst` and so on. A file of your own is a source too.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinychat.data.jsonl import (
    parse_dialogue,
    parse_lines,
    read_lines,
    takes_turns,
    text_field,
)
from tinychat.data.records import Dialogue, Document, Message
from tinychat.data.sources import TABLE, Kind, Source
from tinychat.runtime.errors import DataError

# Templates that nobody filled in ("My name is [user 1's name]"): a model learns to say them.
BRACKETS = re.compile(r"\[[^\]]{1,40}\]")
PLACEHOLDERS = {
    "synthetic_persona_chat": re.compile(
        rf"{BRACKETS.pattern}|\((?:[a-z ]*name|city|[a-z ]*town)\)"
    ),
}
OWN = "a name that ends in .txt, .jsonl, .txt.zst or .jsonl.zst"


def sources(kind: Kind | None = None) -> list[Source]:
    """Return the table of public sources, simplest first; only one kind when named."""
    return [source for source in TABLE if kind in (None, source.kind)]


def source(name: str) -> Source:
    """Return the source of a name; DataError names the nearest."""
    names = [entry.name for entry in TABLE]
    if name in names:
        return TABLE[names.index(name)]
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(
        f"there is no data source {name!r}; {hint}`tinychat data list` shows all; "
        f"a file of your own needs {OWN}"
    )


def data_folder(option: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder with the public files: the option, else TINYCHAT_DATA, else None.

    Takes the folder itself or the one that holds it as `public/`. DataError where neither holds
    the expected files.
    """
    named = option or os.environ.get("TINYCHAT_DATA")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist: name another with --data")
    for candidate in (folder / "public", folder):
        if any((candidate / entry.file).is_file() for entry in TABLE):
            return candidate
    raise DataError(
        f"the data folder {folder} holds none of the expected files, "
        f"such as public/{TABLE[0].file}: name another with --data"
    )


def source_path(name: str, folder: Path | None) -> Path:
    """Return the file of a source; a name that is a path to a file of your own stays as it is."""
    if not any(entry.name == name for entry in TABLE):
        own = Path(name)
        if re.search(r"\.(txt|jsonl)(\.zst)?$", own.name):
            if not own.is_file():
                raise DataError(f"there is no file {own}: check the path")
            return own
        if own.exists() or own.suffix:
            raise DataError(f"{own} can't be a source: a file of your own needs {OWN}")
    entry = source(name)
    if folder is None:
        raise DataError(f"the source {name} needs a data folder: name it with --data")
    path = folder / entry.file
    if not path.is_file() and (folder / "public" / entry.file).is_file():
        path = folder / "public" / entry.file
    if not path.is_file():
        raise DataError(f"the data folder {folder} has no {entry.file}: fetch the source {name}")
    return path


def _letters(text: str, most: int = 200) -> str:
    """The first letters of a text in lower case: two copies with other quotes agree in it."""
    return re.sub(r"[^a-z]+", "", text[: 3 * most].lower())[:most] or text


def _id(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()[:20]


def _document_key(text: str, source: str) -> str:
    # The parts of one article, and a story in two sources, must fall into the same split.
    if source.startswith("wikipedia_en"):
        return text.partition("\n")[0].removesuffix(" (continued)")
    return _letters(text)


def _dialogue_key(messages: tuple[Message, ...], source: str) -> str:
    if source == "story_requests":
        return _letters(messages[-1].content)
    return "\n".join(f"{m.role}: {m.content}" for m in messages)


def read_documents(name: str, folder: Path | None = None) -> Iterator[Document]:
    """Yield the documents of a pretraining source, or of a `.txt` or `.jsonl` file of your own.

    A text file is one document, cut between paragraphs into parts of about 8,000 characters. The
    id comes from the text, so it does not change when the file is re-ordered; texts that begin
    with the same 200 letters share it, and so their split. Raises DataError.
    """
    path = source_path(name, folder)
    if re.search(r"\.txt(\.zst)?$", path.name):
        yield from _read_text(path)
        return
    empty = True
    for where, record in parse_lines(read_lines(path), str(path)):
        if "text" not in record and "messages" in record:
            raise DataError(f"{where} holds a dialogue among texts: give it a file of its own")
        text = text_field(record, "text", where)
        empty = False
        yield Document(_id(_document_key(text, name)), text, name)
    if empty:
        raise DataError(f"{path} holds no records: fetch it again, or leave it out")


def _read_text(path: Path, most: int = 8000) -> Iterator[Document]:
    try:
        text = b"".join(read_lines(path)).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): save the file as UTF-8"
        ) from error
    if not text:
        raise DataError(f"{path} holds no text: leave it out")
    part = ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        if part and len(part) + len(paragraph) > most:
            yield Document(_id(part), part, path.name)
            part = ""
        part += ("\n\n" if part else "") + paragraph
    yield Document(_id(part), part, path.name)


def read_dialogues(name: str, folder: Path | None = None) -> Iterator[Dialogue]:
    """Yield the dialogues of an SFT source, or of a `.jsonl` file of your own; raises DataError.

    Dialogues with templates that nobody filled in are left out (`PLACEHOLDERS`).
    """
    path = source_path(name, folder)
    unfilled = PLACEHOLDERS.get(name)
    source_is_own = all(entry.name != name for entry in TABLE)
    empty = True
    for where, record in parse_lines(read_lines(path), str(path)):
        dialogue = parse_dialogue(record, where, source=name, id="?")
        empty = False
        if source_is_own and not takes_turns(dialogue.messages):
            raise DataError(
                f"{where}: after an optional system message, user and assistant take turns, "
                "beginning with the user; change the order of its messages"
            )
        if unfilled and any(unfilled.search(message.content) for message in dialogue.messages):
            continue
        yield Dialogue(
            id=_id(_dialogue_key(dialogue.messages, name)),
            topic=dialogue.topic,
            messages=dialogue.messages,
            rejected=dialogue.rejected,
            train_on=dialogue.train_on,
            source=name,
        )
    if empty:
        raise DataError(f"{path} holds no records: fetch it again, or leave it out")


def is_dialogues(name: str, folder: Path | None = None) -> bool:
    """True where a source's records are dialogues; looks into the file where it is your own."""
    for entry in TABLE:
        if entry.name == name:
            return entry.kind == "sft"
    path = source_path(name, folder)
    if re.search(r"\.txt(\.zst)?$", path.name):
        return False
    return any("messages" in record for _, record in _first(path))


def _first(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for entry in parse_lines(read_lines(path), str(path)):
        yield entry
        return


@dataclass(frozen=True)
class Verified:
    """What `verify` found for one source."""

    source: Source
    state: Literal["ok", "missing", "changed"]
    bytes: int


def verify(folder: Path) -> list[Verified]:
    """Compare every file of the table with its SHA-256; one row a source, in table order."""
    rows: list[Verified] = []
    for entry in TABLE:
        try:
            path = source_path(entry.name, folder)
        except DataError:
            rows.append(Verified(entry, "missing", 0))
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        state: Literal["ok", "changed"] = "ok" if digest == entry.sha256 else "changed"
        rows.append(Verified(entry, state, path.stat().st_size))
    return rows
