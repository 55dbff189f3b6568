"""Which part of the data a record belongs to, from its id alone."""

import hashlib
from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar

Split = Literal["train", "validation", "test"]


class HasId(Protocol):
    """A dialogue, a document: whatever has an id."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=HasId)


def split_of(id: str) -> Split:
    """Return the part of a record: 90 % train, 5 % validation, 5 % test.

    The hash of the id decides, so the answer does not change when records are added, removed or
    put into another order.
    """
    digest = hashlib.sha256(b"tinychat split 1\n" + id.encode("utf-8", errors="replace")).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < 90:
        return "train"
    return "validation" if percent < 95 else "test"


def by_split(records: Iterable[R]) -> dict[Split, list[R]]:
    """Sort records into the three parts, in the order in which they came."""
    parts: dict[Split, list[R]] = {"train": [], "validation": [], "test": []}
    for record in records:
        parts[split_of(record.id)].append(record)
    return parts
