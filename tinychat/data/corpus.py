"""The embedded corpus: our own dialogues, stories and explanations (CC0-1.0)."""

from functools import cache
from importlib.resources import files

from tinychat.data.jsonl import parse_dialogue, parse_lines
from tinychat.data.records import Dialogue, Document


def _read(name: str) -> list[tuple[str, dict[str, object]]]:
    file = files("tinychat.data").joinpath("corpus", name)
    return list(parse_lines(file.read_bytes().splitlines(), name))


@cache
def _dialogues() -> tuple[Dialogue, ...]:
    return tuple(
        parse_dialogue(record, where, source="corpus") for where, record in _read("dialogues.jsonl")
    )


@cache
def _documents(name: str) -> tuple[Document, ...]:
    return tuple(
        # The title is part of a story as it is told.
        Document(str(record["id"]), f"{record['title']}\n\n{record['text']}", name)
        for _, record in _read(f"{name}.jsonl")
    )


def dialogues() -> list[Dialogue]:
    """Return the conversations with tinychat; read once, then kept."""
    return list(_dialogues())


def stories() -> list[Document]:
    """Return the short stories, each under its title."""
    return list(_documents("stories"))


def explanations() -> list[Document]:
    """Return the short explanatory texts, each under its title."""
    return list(_documents("explanations"))
