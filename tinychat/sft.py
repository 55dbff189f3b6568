"""Show the base model good conversations, until it answers instead of rambling on.

Generated from chapters/10_sft.py: edit that file,
then run `python -m tinychat.book export`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tinychat.data.batch import Batch
from tinychat.dialogue import Rendered
from tinychat.gpt import GPT
from tinychat.pretraining import Progress, Result, TrainConfig, pretrain, processes
from tinychat.runtime.errors import ConfigError, DataError
from tinychat.runtime.state import load_state


def pack(
    lengths: Sequence[int], room: int, order: Sequence[int], open_rows: int = 64
) -> list[list[int]]:
    """Sort conversations into rows of `room` tokens; returns the conversations of each row.

    First fit in the given order: each conversation goes into the first row with enough room left.
    Only the newest `open_rows` rows stay open, which keeps the work linear and the order random.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number in order:
        size = min(lengths[number], room)
        for row in range(max(0, len(rows) - open_rows), len(rows)):
            if left[row] >= size:
                rows[row].append(number)
                left[row] -= size
                break
        else:
            rows.append([number])
            left.append(room - size)
    return rows


def packed_row(
    examples: Sequence[Rendered], room: int, pad: int, goes_on: Sequence[bool] = ()
) -> np.ndarray:
    """Lay conversations one behind another: returns `[4, room]` inputs, targets, mask, segments.

    A conversation of n tokens takes n - 1 places: its last token predicts nothing, because what
    follows it is another conversation. One that is too long loses its end. Segment 0 is padding.
    Where `goes_on` is true, a conversation goes on in the chat of the one before it: it shares its
    segment, and the other's last token stands in the place of its own first one.
    """
    row = np.zeros((4, room), dtype=np.int64)
    row[:2] = pad
    start, segment = 0, 0
    for number, example in enumerate(examples):
        size = min(len(example.tokens) - 1, room - start)
        part = slice(start, start + size)
        row[0, part] = example.tokens[:size]
        row[1, part] = example.tokens[1 : size + 1]
        row[2, part] = example.loss_mask[1 : size + 1]
        if number and number < len(goes_on) and goes_on[number]:
            row[0, start] = examples[number - 1].tokens[-1]  # <|end|>, where <|bos|> would be
        else:
            segment += 1
        row[3, part] = segment
        start += size
    return row


@dataclass(frozen=True)
class SFTConfig:
    """What decides a fine-tuning run besides the model and the conversations."""

    epochs: float = 4.0
    "readings of all conversations"
    batch: int = 16
    "packed rows a step"
    sequence: int = 512
    "tokens a row; several conversations share one"
    chain: float = 0.6
    "share of the conversations that go on in the chat of the one before them"
    matrix_lr: float = 6e-3
    "Muon's peak rate: well below pretraining's, to keep what the base has learned"
    vector_lr: float = 2e-3
    "AdamW's peak rate for embeddings and norms"
    warmup: float = 0.03
    "share of the steps in which the rates rise"
    decay: float = 0.9
    "share of the steps, at the end, in which the rates fall to zero"
    clip: float = 1.0
    "largest norm of the whole gradient"
    seed: int = 0
    "decides the order of the conversations"
    keep: float = 0.0
    "share of the base's weights in the mean that a finished run gives"
    precision: str = "auto"
    "bf16 or fp32 matrix products; auto takes bf16 where the machine computes it fast"
    compiled: bool = True
    "use torch.compile where a C++ compiler is installed"
    save_minutes: float = 3.0
    "time between saved states"
    evaluate_every: int = 50
    "steps between validations"

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is {self.epochs}; it must be a number above 0.")
        if not 0 <= self.chain <= 1:
            raise ConfigError(f"chain is {self.chain}; it must be from 0 to 1.")
        if not 0 <= self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; it must be 0 or more, and below 1.")
        for name in ("matrix_lr", "vector_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more.")
        self.loop(steps=1)  # the loop refuses everything else that makes no sense

    def loop(self, steps: int) -> TrainConfig:
        """The same settings for the training loop of chapter 07."""
        return TrainConfig(
            steps=steps,
            batch=self.batch,
            sequence=self.sequence,
            matrix_lr=self.matrix_lr,
            vector_lr=self.vector_lr,
            warmup=self.warmup,
            decay=self.decay,
            clip=self.clip,
            seed=self.seed,
            precision=self.precision,
            compiled=self.compiled,
            save_minutes=self.save_minutes,
            evaluate_every=self.evaluate_every,
        )


class PackedConversations:
    """An endless, repeatable stream of packed batches: each epoch in a new order."""

    def __init__(self, examples: Iterable[Rendered], config: SFTConfig, pad: int):
        # A conversation without a learned token would only take room.
        self.examples = [e for e in examples if any(e.loss_mask[1 : config.sequence + 1])]
        if not self.examples:
            raise DataError("There is no conversation with a reply to learn from; add some.")
        self.config = config
        self.pad = pad

    def rows(self, epoch: int) -> list[list[int]]:
        """Return which conversations share each row in this epoch."""
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.examples))
        lengths = [len(example.tokens) - 1 for example in self.examples]
        return pack(lengths, self.config.sequence, order.tolist())

    def steps(self, world: int = 1) -> int:
        """Optimizer steps for all epochs, where `world` processes read a batch each."""
        batch = self.config.batch * world
        return max(1, round(self.config.epochs * len(self.rows(0)) / batch))

    def batches(
        self, start: int = 0, total: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield batch number `start` and all that follow, for ever.

        Of `world` processes each takes a batch of a step's rows: process `rank` every world-th.
        """
        number, epoch = 0, 0
        waiting: list[list[int]] = []
        size = self.config.batch * world
        while True:
            waiting += self.rows(epoch)
            epoch += 1
            while len(waiting) >= size:
                now, waiting = waiting[:size], waiting[size:]
                if number >= start:
                    yield self.batch(now[rank::world], self.config.chain)
                number += 1

    def once(self) -> Iterator[Batch]:
        """Yield every conversation once and by itself, to measure; all batches of the same size."""
        rows, size = self.rows(0), self.config.batch
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield self.batch([*part, *[[]] * (size - len(part))])

    def batch(self, rows: Sequence[Sequence[int]], chain: float = 0.0) -> Batch:
        """Build the tensors of some rows; a share `chain` goes on in the chat of the one before."""
        data = np.stack([self._row(row, chain) for row in rows])
        inputs, targets, mask, segments = torch.from_numpy(data).unbind(1)
        return Batch(inputs, targets, mask, segments)

    def _row(self, row: Sequence[int], chain: float) -> np.ndarray:
        examples = [self.examples[n] for n in row]
        # The row itself seeds its dice, so a resumed run throws the same.
        dice = np.random.default_rng((self.config.seed, *row)).random(len(row))
        goes_on = [
            # A system message stands at the head of a chat, and only there.
            throw < chain and not example.system
            for throw, example in zip(dice, examples, strict=True)
        ]
        return packed_row(examples, self.config.sequence, self.pad, goes_on)


def blend(model: GPT, before: Mapping[str, torch.Tensor], share: float) -> None:
    """Move `model` the given share of the way back to the weights `before` (Wortsman et al. 2022).

    `before` holds its named parameters from the beginning of the fine-tuning.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.lerp_(before[name].to(weight), share)


def finetune(
    model: GPT,
    examples: Iterable[Rendered],
    config: SFTConfig,
    folder: str | Path,
    *,
    pad: int,
    minutes: float = 0.0,
    validation: Callable[[], Iterable[Batch]] | None = None,
    token_bytes_V: torch.Tensor | None = None,
    resume: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train `model` in place on conversations: pretraining's loop, but only replies carry loss.

    As many steps as `config.epochs` asks for or, with `minutes`, as fit into that time; a run that
    was begun with minutes keeps its number of steps when it is resumed without. `model` comes as
    the base, also to be resumed; a finished one is blended with it (`config.keep`), its saved
    state is not. Raises DataError where nothing is to be learned, ConfigError for rows longer than
    the model reads.
    """
    context = model.config.context
    if config.sequence > context:
        raise ConfigError(
            f"sequence is {config.sequence}; this model reads at most {context} tokens."
        )
    rank, world = processes()
    stream = PackedConversations(examples, config, pad)
    saved = load_state(folder) if resume and not minutes else None
    by_time = minutes or (saved is not None and not saved[1]["config"]["steps"])
    before = {name: w.detach().clone() for name, w in model.named_parameters() if config.keep}
    result = pretrain(
        model,
        partial(stream.batches, rank=rank, world=world),
        config.loop(0 if by_time else stream.steps(world)),
        folder,
        minutes=minutes,
        validation={"replies": validation} if validation else None,
        token_bytes_V=token_bytes_V,
        resume=resume,
        on_step=on_step,
        should_stop=should_stop,
    )
    if result.finished and before:
        blend(model, before, config.keep)
    return result
