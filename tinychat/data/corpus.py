"""The embedded corpus: our own dialogues, basics, stories and explanations (CC0-1.0)."""

import hashlib
from functools import cache
from importlib.resources import files

from tinychat.data.jsonl import parse_dialogue, parse_lines
from tinychat.data.records import Dialogue, Document


def _read(name: str) -> list[tuple[str, dict[str, object]]]:
    file = files("tinychat.data").joinpath("corpus", name)
    return list(parse_lines(file.read_bytes().splitlines(), name))


@cache
def _dialogues(name: str) -> tuple[Dialogue, ...]:
    return tuple(
        parse_dialogue(record, where, source="corpus") for where, record in _read(f"{name}.jsonl")
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
    return list(_dialogues("dialogues"))


def basics() -> list[Dialogue]:
    """Return the basics: short conversations, of two kinds, mixed in an order by hash.

    `basics.jsonl` says each thing in many words, `everyday.jsonl` was written one by one. Why many
    words: a small model learns a fact that it meets often, in other words each time (Allen-Zhu and
    Li 2023, "Physics of Language Models", part 3.1). So one that the split holds out asks in words
    that were not trained on for something that was.
    """
    return list(_basics())


@cache
def _basics() -> tuple[Dialogue, ...]:
    """Those made from patterns and those written one by one, mixed in an order by hash."""
    some = (*_dialogues("basics"), *_dialogues("everyday"))
    return tuple(sorted(some, key=lambda one: hashlib.sha256(one.id.encode()).digest()))


def graded() -> list[tuple[str, dict[str, object]]]:
    """Return, with their places, prompts with our own models' replies and a reader's marks.

    `tinychat.data.preferences.corpus_graded` makes ranked replies of them.
    """
    return _read("graded.jsonl")


def stories() -> list[Document]:
    """Return the short stories, each under its title."""
    return list(_documents("stories"))


def explanations() -> list[Document]:
    """Return the short explanatory texts, each under its title."""
    return list(_documents("explanations"))
