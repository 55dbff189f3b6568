"""Ranked replies as tokens, and an endless stream of batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tinychat.data.preferences import Ranked
from tinychat.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Group:
    """All replies to one prompt as tokens, and what is known of their order."""

    tokens: tuple[tuple[int, ...], ...]
    "prompt and reply, up to the reply's `<|end|>`"
    start: int
    "how many of the tokens are the prompt's"
    ranked: Ranked
    "where they come from, in the same order"
    pairs: tuple[tuple[int, int], ...]
    "(better, worse)"
    weights: tuple[float, ...]
    "what each pair counts; a prompt with many pairs counts no more than one with a single pair"


def tokenize_group(
    ranked: Ranked, tokenizer: Tokenizer, *, sequence: int, most: int = 6
) -> Group | None:
    """Render every reply behind the same prompt; None where nothing is left to be compared.

    A reply that doesn't fit into `sequence` tokens is left out (cut off, it would look unfinished).
    Of more than `most` replies, some from all ranks stay.
    """
    from tinychat.dialogue import render_prompt

    bodies = [
        [*tokenizer.encode(reply.text), *[tokenizer.end_id] * reply.ended]
        for reply in ranked.replies
    ]
    fitting = [n for n, body in enumerate(bodies) if 0 < len(body) <= sequence // 2]
    if len(fitting) > most:
        fitting = [fitting[round(n * (len(fitting) - 1) / (most - 1))] for n in range(most)]
    kept = replace(ranked, replies=tuple(ranked.replies[n] for n in fitting))
    pairs = tuple(kept.pairs)
    if not pairs:
        return None
    longest = max(len(bodies[n]) for n in fitting)
    try:
        prompt = render_prompt(kept.prompt, tokenizer, context=sequence, reserve=longest)
    except ConfigError:
        return None  # the question alone is too long
    return Group(
        tokens=tuple((*prompt, *bodies[n]) for n in fitting),
        start=len(prompt),
        ranked=kept,
        pairs=pairs,
        weights=(kept.weight / len(pairs),) * len(pairs),
    )


def tokenize_groups(
    ranked: Iterable[Ranked], tokenizer: Tokenizer, *, sequence: int, most: int = 6
) -> list[Group]:
    """Tokenize all that leave something to be compared."""
    found = (tokenize_group(one, tokenizer, sequence=sequence, most=most) for one in ranked)
    return [group for group in found if group is not None]


class GroupBatches:
    """An endless, repeatable stream of `size` prompts at a time: each epoch in a new order.

    Prompts of similar length share a batch, within pools of 16 batches, so that little is padding.
    """

    def __init__(self, groups: Sequence[Group], size: int, seed: int):
        if not groups:
            raise DataError("There are no ranked replies to learn from; add some.")
        self.groups, self.size, self.seed = groups, size, seed

    def order(self, epoch: int) -> list[int]:
        """Return the prompts of one epoch in the order of its batches."""
        draw = np.random.default_rng((self.seed, epoch))
        shuffled = draw.permutation(len(self.groups)).tolist()
        found: list[list[int]] = []
        for start in range(0, len(shuffled), 16 * self.size):
            pool = shuffled[start : start + 16 * self.size]
            pool.sort(key=lambda number: max(map(len, self.groups[number].tokens)))
            parts = [pool[first : first + self.size] for first in range(0, len(pool), self.size)]
            found += [parts[number] for number in draw.permutation(len(parts))]
        return [number for part in found for number in part]

    def batches(self, start: int = 0) -> Iterator[list[Group]]:
        """Yield batch number `start` and all that follow, for ever."""
        number, epoch = 0, 0
        waiting: list[int] = []
        while True:
            waiting += self.order(epoch)
            epoch += 1
            while len(waiting) >= self.size:
                now, waiting = waiting[: self.size], waiting[self.size :]
                if number >= start:
                    yield [self.groups[n] for n in now]
                number += 1
