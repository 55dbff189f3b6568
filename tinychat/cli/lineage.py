"""What a checkpoint's lineage says of the runs before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def descent(lineage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A lineage, that of the model it began with, and so on back to random weights."""
    yield lineage
    match lineage.get("ancestors"):
        case [Mapping() as parent, *_]:
            yield from descent(parent)


def tokens_read(lineage: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, float]:
    """The tokens by source that a model has met in pretraining, its ancestors' readings counted.

    `own` holds the sha256 of each file of the user's by its label: what a model has read of
    another text under the same name doesn't count. Nor does what a foreign file says in a form
    that no run of ours writes.
    """
    read: dict[str, float] = {}
    for one in descent(lineage):
        data = one.get("data")
        for name, source in data.items() if isinstance(data, Mapping) else ():
            match source:
                case {"tokens": int(tokens), "passes": int() | float() as passes}:
                    known = own.get(name, source.get("sha256")) == source.get("sha256")
                    if known and tokens >= 0 and 0 <= passes < math.inf:
                        read[name] = read.get(name, 0) + tokens * passes
    return read
