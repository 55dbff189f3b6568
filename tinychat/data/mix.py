"""Which window of which source is the i-th training sequence: a pure function of (seed, i).

Nothing is remembered between sequences, so a run resumes at any step by asking for that step,
and every process of a parallel run finds its own part by arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinychat.data.batch import Batch
from tinychat.data.shards import TokenShard
from tinychat.runtime.errors import ConfigError, DataError

BLOCK = 256  # sequences that are planned, and shuffled, together
UNITS = 1 << 20  # weights are whole numbers of this many parts, so that no rounding can drift


@dataclass(frozen=True)
class Phase:
    """A part of the run with its own shares of the sources."""

    until: float
    "where it ends, as a fraction of all sequences; 1.0 for the last phase"
    weights: Mapping[str, float]
    "share of the sequences by source; any positive scale"


@dataclass(frozen=True)
class _Span:
    start: int  # first sequence of the phase
    end: int
    names: tuple[str, ...]
    parts: np.ndarray  # whole numbers that add up to `units`
    units: int
    before: Mapping[str, int]  # sequences that each source gave in earlier runs and phases


class Mix:
    """Training sequences out of several shards, in shares that hold in every part of a run.

    Of each source the windows of `sequence` tokens come in a random order, each once an epoch;
    every epoch has an order and an offset of its own. Shares hold exactly, not on average: the
    k-th sequence of a source with share w comes within 256 places of k / w.

    `read`: the tokens by source that an earlier run has read. Each source goes on behind them, and
    doesn't begin with the same windows again, if seed, sequence and text are those of that run;
    with others the order is another, and what is met again is chance. Raises DataError for a source
    without a shard, ConfigError for numbers that can't work.
    """

    def __init__(
        self,
        shards: Mapping[str, TokenShard],
        phases: Sequence[Phase],
        *,
        sequence: int,
        seed: int,
        total: int,
        read: Mapping[str, float] | None = None,
    ) -> None:
        if sequence < 1 or total < 1:
            raise ConfigError(
                f"a mix needs at least one sequence of one token, not {total} of {sequence}"
            )
        if seed < 0:
            raise ConfigError(f"the seed of a mix is {seed}; it must be 0 or more")
        if not phases or phases[-1].until != 1.0:
            raise ConfigError("the last phase of a mix must last until 1.0")
        self.shards = dict(shards)
        self.sequence = sequence
        self.seed = seed
        self.total = total
        self._plan = lru_cache(maxsize=8)(self._make_plan)
        self._order = lru_cache(maxsize=2 * len(self.shards))(self._make_order)
        self._spans: list[_Span] = []
        start, behind = 0, read or {}
        before = {name: int(behind.get(name, 0)) // sequence for name in self.shards}
        for phase in phases:
            end = round(phase.until * total)
            if not start <= end <= total:
                raise ConfigError(f"a phase until {phase.until} doesn't follow the one before it")
            span = self._span(phase, start, end, dict(before))
            self._spans.append(span)
            for name, count in self._counts(span, end - start).items():
                before[name] += count
            start = end

    def sequence_at(self, i: int) -> np.ndarray:
        """Return sequence number i as int64 `[T + 1]`: T inputs and, one further, T targets."""
        source, k = self.place(i)
        tokens = self.shards[source].array
        windows = max(1, len(tokens) // self.sequence)
        epoch, nth = divmod(k, windows)
        order, offset = self._order(source, epoch)
        # The stream is a ring: with a new offset each epoch, no token is always last or left out.
        start = offset + int(order[nth]) * self.sequence
        place = np.arange(start, start + self.sequence + 1) % len(tokens)
        if place[-1] - place[0] == self.sequence:  # no wrap: a slice is faster
            return np.asarray(tokens[place[0] : place[-1] + 1], dtype=np.int64)
        return np.asarray(tokens[place], dtype=np.int64)

    def place(self, i: int) -> tuple[str, int]:
        """Return the source of sequence i, and how many sequences that source gave before it.

        Those of the runs before this one are counted with them.
        """
        if not 0 <= i < self.total:
            raise ConfigError(f"there is no sequence {i}: the mix was made for {self.total}")
        number = next(n for n, span in enumerate(self._spans) if i < span.end)
        span = self._spans[number]
        block, nth = divmod(i - span.start, BLOCK)
        sources, counts = self._plan(number, block)
        return span.names[sources[nth]], int(counts[nth])

    def batches(
        self, start_step: int, batch: int, steps: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield the batches of steps `start_step` to `start_step + steps`.

        `batch` counts the sequences of one step over all processes: rank r of `world` reads every
        world-th of them, so the data of a step doesn't depend on how many share the work. A
        rest at the end of the mix that fills no batch is left out.
        """
        if batch < 1 or batch % world or not 0 <= rank < world:
            raise ConfigError(f"a batch of {batch} can't be shared by {world} processes")
        for step in range(start_step, min(start_step + steps, self.total // batch)):
            first = step * batch
            window = np.stack(
                [self.sequence_at(i) for i in range(first + rank, first + batch, world)]
            )
            inputs, targets = window[:, :-1], window[:, 1:]
            yield Batch(
                np.ascontiguousarray(inputs), np.ascontiguousarray(targets), np.ones_like(targets)
            )

    def counts(self) -> dict[str, int]:
        """Return how many sequences the whole run takes from each source."""
        result = dict.fromkeys(self.shards, 0)
        for span in self._spans:
            for name, count in self._counts(span, span.end - span.start).items():
                result[name] += count
        return result

    def passes(self) -> dict[str, float]:
        """Return how often the whole run reads each source."""
        return {
            name: count * self.sequence / self.shards[name].tokens
            for name, count in self.counts().items()
        }

    def _span(self, phase: Phase, start: int, end: int, before: Mapping[str, int]) -> _Span:
        missing = [name for name in phase.weights if name not in self.shards]
        if missing:
            raise DataError(
                f"the mix asks for {', '.join(missing)}, but there is no such shard: "
                f"there are {', '.join(self.shards)}"
            )
        bad = [f"{n} {w}" for n, w in phase.weights.items() if not 0 <= w < float("inf")]
        weight = sum(phase.weights.values())
        if bad or not weight > 0:
            raise ConfigError(
                f"the weights of a mix must be positive numbers, not {', '.join(bad) or 'all zero'}"
            )
        parts = {name: round(UNITS * w / weight) for name, w in sorted(phase.weights.items())}
        names = tuple(name for name, part in parts.items() if part)
        array = np.array([parts[name] for name in names], dtype=np.int64)
        return _Span(start, end, names, array, int(array.sum()), before)

    def _merged(self, span: _Span, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences `first` to `first + count` of a phase before shuffling: sources and numbers.

        The k-th sequence of a source with share w stands at time (k + 1/2) / w; sorted by time,
        every stretch of the run holds each source in its share. Times within half the number of
        sources of `first` are all that can matter.
        """
        margin = len(span.names) + 1
        early, late = max(0, first - margin), first + count + margin
        # In whole numbers: the first k with (2k + 1) * units / (2 * part) >= time.
        low = -((span.units - 2 * span.parts * early) // (2 * span.units))
        high = -((span.units - 2 * span.parts * late) // (2 * span.units))
        low, high = np.maximum(low, 0), np.maximum(high, 0)
        source = np.repeat(np.arange(len(span.names)), high - low)
        number = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        time = (2 * number + 1) * span.units / (2 * span.parts[source])
        order = np.lexsort((source, time))[first - low.sum() :][:count]
        return source[order], number[order]

    def _make_plan(self, number: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        span = self._spans[number]
        first = block * BLOCK
        sources, counts = self._merged(span, first, min(BLOCK, span.end - span.start - first))
        counts = counts + np.array([span.before[name] for name in span.names])[sources]
        rng = np.random.default_rng([self.seed, 1, number, block])
        shuffled = rng.permutation(len(sources))
        return sources[shuffled], counts[shuffled]

    def _counts(self, span: _Span, length: int) -> dict[str, int]:
        if not length:
            return {}
        sources, _ = self._merged(span, 0, length)
        counts = np.bincount(sources, minlength=len(span.names))
        return dict(zip(span.names, counts.tolist(), strict=True))

    def _make_order(self, source: str, epoch: int) -> tuple[np.ndarray, int]:
        # The name enters by its letters: a source keeps its order when others come or go.
        rng = np.random.default_rng([self.seed, 2, epoch, *source.encode()])
        tokens = self.shards[source].tokens
        return rng.permutation(max(1, tokens // self.sequence)), int(rng.integers(tokens))
