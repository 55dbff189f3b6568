"""Guess what comes next: by counting, with an LSTM, and why neither became a chatbot.

Generated from chapters/02_language_models.py: edit that file,
then run `python -m tinychat.book export`.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.data.corpus import explanations, stories
from tinychat.data.split import Split, split_of


def documents(split: Split) -> list[bytes]:
    """Return the embedded stories and explanations of one part, as UTF-8."""
    return [text.text.encode() for text in stories() + explanations() if split_of(text.id) == split]


def held_out_text() -> list[bytes]:
    """Return the texts on which this book compares its language models; no chapter trains on them.

    Each document stands for itself: a model starts each with nothing read.
    """
    return documents("test")


class NGram:
    """Guesses a byte from the `order - 1` bytes before it, by counts with add-k smoothing.

    Zero bytes stand before a text's beginning.
    """

    def __init__(self, texts: Iterable[bytes], order: int, k: float = 0.01) -> None:
        if order < 1 or k <= 0:
            raise ValueError(f"order {order} and k {k}: give an order of 1 or more, and k above 0")
        self.order, self.k = order, k
        self.counts: dict[bytes, dict[int, int]] = {}
        for text in texts:
            padded = bytes(order - 1) + text
            for place, byte in enumerate(text):
                following = self.counts.setdefault(padded[place : place + order - 1], {})
                following[byte] = following.get(byte, 0) + 1
        self.totals = {context: sum(seen.values()) for context, seen in self.counts.items()}

    def probability(self, context: bytes, byte: int) -> float:
        """Return p(byte | context); the context has `order - 1` bytes."""
        count = self.counts.get(context, {}).get(byte, 0)
        return (count + self.k) / (self.totals.get(context, 0) + 256 * self.k)

    def next_byte(self, text: bytes) -> Tensor:
        """Return the probability of each of the 256 bytes after a text."""
        padded = bytes(self.order - 1) + text
        context = padded[len(padded) - self.order + 1 :]
        return torch.tensor([self.probability(context, byte) for byte in range(256)])

    def log_probability(self, text: bytes) -> float:
        """Return the natural logarithm of the probability of a whole text."""
        padded = bytes(self.order - 1) + text
        return sum(
            math.log(self.probability(padded[place : place + self.order - 1], byte))
            for place, byte in enumerate(text)
        )


def write(
    next_byte: Callable[[bytes], Tensor], start: bytes, length: int, draw: torch.Generator
) -> str:
    """Go on from `start` for `length` bytes, each drawn from the model's guess."""
    text = start
    for _ in range(length):
        text += bytes([int(torch.multinomial(next_byte(text), 1, generator=draw))])
    return text.decode("utf-8", errors="replace")


def bits_per_byte(log_probability: Callable[[bytes], float], texts: Sequence[bytes]) -> float:
    """Return the mean surprise of a model, in bits for each byte of the texts.

    `log_probability` gives the natural logarithm of the probability of a whole text, so any model
    fits, whatever pieces it reads.
    """
    nats = -sum(log_probability(text) for text in texts)
    return nats / math.log(2) / sum(map(len, texts))


class KneserNey(NGram):
    """Interpolated Kneser-Ney smoothing, with one discount for each length of context.

    Kneser and Ney 1995, in the interpolated form of Chen and Goodman 1998. The longest contexts
    keep their counts; a shorter one counts the different bytes that stood before it.
    """

    def __init__(self, texts: Iterable[bytes], order: int) -> None:
        super().__init__(texts, order)
        levels = [self.counts]
        for _ in range(order - 1):
            shorter: dict[bytes, dict[int, int]] = {}
            for context, seen in levels[0].items():
                following = shorter.setdefault(context[1:], {})
                for byte in seen:
                    following[byte] = following.get(byte, 0) + 1
            levels.insert(0, shorter)
        self.levels = []  # for each length of context: contexts, their totals, the discount
        for level in levels:
            counts = [count for seen in level.values() for count in seen.values()]
            once, twice = counts.count(1), counts.count(2)
            discount = once / (once + 2 * twice) if once and twice else 0.5
            totals = {context: sum(seen.values()) for context, seen in level.items()}
            self.levels.append((level, totals, discount))

    def probability(self, context: bytes, byte: int) -> float:
        """Return p(byte | context), from no context at all to the longest one that was seen."""
        p = 1 / 256
        for length, (level, totals, discount) in enumerate(self.levels):
            ending = context[len(context) - length :]
            seen = level.get(ending)
            if seen is None:
                break  # what was never seen has no longer version that was
            kept = max(seen.get(byte, 0) - discount, 0.0)
            p = (kept + discount * len(seen) * p) / totals[ending]
        return p


def lstm_step(
    x_BI: Tensor, h_BD: Tensor, c_BD: Tensor, from_x: Tensor, from_h: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Read one input and return the new state and notebook (Hochreiter and Schmidhuber 1997).

    `from_x` is `[4 D, I]`, `from_h` `[4 D, D]`, `bias` `[4 D]`: the rows of the input gate, the
    forget gate, the note and the output gate, in PyTorch's order.
    """
    gates = x_BI @ from_x.T + h_BD @ from_h.T + bias
    write_BD, keep_BD, note_BD, show_BD = gates.chunk(4, dim=1)
    c_BD = keep_BD.sigmoid() * c_BD + write_BD.sigmoid() * note_BD.tanh()
    return show_BD.sigmoid() * c_BD.tanh(), c_BD


class LSTMModel(nn.Module):
    """Guesses the next byte from all bytes before it."""

    def __init__(self, width: int, embedding: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def forward(
        self, bytes_BT: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logits `[B, T, 256]` of the byte after each byte, and the state at the end."""
        states_BTD, state = self.lstm(self.embed(bytes_BT), state)
        return self.out(states_BTD), state

    @torch.no_grad()
    def next_byte(self, text: bytes) -> Tensor:
        """Return the probability of each of the 256 bytes after a text."""
        return self(torch.tensor([[0, *text]]))[0][0, -1].softmax(dim=0)

    @torch.no_grad()
    def log_probability(self, text: bytes) -> float:
        """Return the natural logarithm of the probability of a whole text."""
        bytes_T = torch.tensor([0, *text])
        logits_1TV, _ = self(bytes_T[None, :-1])
        return -float(F.cross_entropy(logits_1TV[0], bytes_T[1:], reduction="sum"))


def train_lstm(
    model: LSTMModel,
    texts: Sequence[bytes],
    epochs: int,
    rate: float = 6e-3,
    strips: int = 16,
    stretch: int = 64,
) -> list[float]:
    """Read the texts `epochs` times, in a new order each time; return the loss of each step."""
    steps_a_time = (sum(len(text) + 1 for text in texts) - 1) // strips // stretch
    if steps_a_time < 1:
        raise ValueError(f"too little text: give at least {strips * stretch} bytes")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps_a_time * epochs)
    losses = []
    for epoch in range(epochs):
        order = random.Random(epoch).sample(list(texts), len(texts))
        row = torch.tensor(list(b"\0" + b"\0".join(order)))
        length = (len(row) - 1) // strips
        inputs_BL = row[: strips * length].view(strips, length)
        targets_BL = row[1 : strips * length + 1].view(strips, length)
        state = None
        for start in range(0, steps_a_time * stretch, stretch):
            logits_BTV, state = model(inputs_BL[:, start : start + stretch], state)
            state = (state[0].detach(), state[1].detach())
            targets_BT = targets_BL[:, start : start + stretch]
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            fall.step()
            losses.append(loss.item())
    return losses


def add_row(
    name: str, bits: float, path: str | os.PathLike[str] = "runs/book/bits_per_byte.json"
) -> dict[str, float]:
    """Note a model's bits per byte on the held-out text; return the table so far, worst first."""
    path = Path(path)
    table: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    table[name] = bits
    table = dict(sorted(table.items(), key=lambda row: -row[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    return table
