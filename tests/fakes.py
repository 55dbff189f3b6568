"""Small stand-ins with the interfaces of GPT, KVCache and Tokenizer, for tests without weights."""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from tinychat.data.records import Dialogue, Message
from tinychat.gpt import GPT, GPTConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--"]
PERU = ("what is the capital of Peru?", "The capital of Peru is Lima. It lies by the sea.")


def talk(question: str, answer: str, topic: str = "capitals") -> Dialogue:
    """A question and its answer."""
    return Dialogue(question, topic, (Message("user", question), Message("assistant", answer)))


class ByteTokenizer:
    """Our seven control pieces, then the 256 bytes: `encode("A") == [7 + 65]`."""

    pad_id, unk_id, bos_id, end_id, system_id, user_id, assistant_id = range(7)
    vocab_size = 7 + 256
    sha256 = "0" * 64
    NAMES = ("<|pad|>", "<unk>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

    def encode(self, text: str) -> list[int]:
        return [7 + byte for byte in re.sub("[\ud800-\udfff]", "\ufffd", text).encode()]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        return bytes([id - 7]) if id >= 7 else b""

    def piece(self, id: int) -> str:
        if id < 7:
            return self.NAMES[id]
        return chr(id - 7) if 32 <= id - 7 < 127 else f"<0x{id - 7:02X}>"


def stirred(shape: GPTConfig, seed: int = 0, by: float = 0.3) -> GPT:
    """A GPT with opinions: the blocks of a fresh one change nothing."""
    torch.manual_seed(seed)
    model = GPT(shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=by)
    return model


class FakeCache:
    """Remembers the tokens themselves where a KVCache remembers keys and values."""

    def __init__(self, batch: int, capacity: int):
        self.ids_BT = torch.zeros(batch, 0, dtype=torch.long)
        self.segments_BT = torch.zeros(batch, 0, dtype=torch.long)
        self.batch, self.capacity = batch, capacity
        self.fed: list[int] = []
        """how many tokens each call of the model read, to see what a cache saved"""

    @property
    def length(self) -> int:
        return self.ids_BT.shape[1]

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate {self.length} stored tokens to {length}")
        self.ids_BT, self.segments_BT = self.ids_BT[:, :length], self.segments_BT[:, :length]

    def copies(self, rows: int, capacity: int) -> "FakeCache":
        many = FakeCache(rows, capacity)
        many.ids_BT, many.segments_BT = (
            part.expand(rows, -1) for part in (self.ids_BT, self.segments_BT)
        )
        return many

    def keep(self, rows_B: Tensor) -> None:
        self.ids_BT, self.segments_BT = self.ids_BT[rows_B], self.segments_BT[rows_B]
        self.batch = len(rows_B)

    def follow(self, other: "FakeCache", row: int, length: int) -> None:
        self.ids_BT = other.ids_BT[row : row + 1, :length]
        self.segments_BT = other.segments_BT[row : row + 1, :length]


class FakeGPT:
    """A GPT whose scores come from `scores(tokens of the row so far) -> [V]`.

    It has no layers: its "hidden vectors" are the scores, and its embedding is the identity.
    """

    def __init__(self, vocab_size: int = ByteTokenizer.vocab_size, context: int = 256):
        self.config = SimpleNamespace(vocab_size=vocab_size, context=context)
        self.embed = SimpleNamespace(weight=torch.eye(vocab_size))
        self.device = torch.device("cpu")

    def scores(self, ids: list[int]) -> Tensor:
        raise NotImplementedError

    def eval(self) -> "FakeGPT":
        return self

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> FakeCache:
        return FakeCache(batch, min(capacity or self.config.context, self.config.context))

    def hidden(
        self, ids_BT: Tensor, *, cache: FakeCache | None = None, segments_BT: Tensor | None = None
    ) -> Tensor:
        B, T = ids_BT.shape
        if segments_BT is None:
            segments_BT = torch.ones_like(ids_BT)
        cache = cache or FakeCache(B, self.config.context)
        start = cache.length
        if start + T > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens; {start} + {T} don't fit")
        cache.ids_BT = torch.cat((cache.ids_BT, ids_BT), dim=1)
        cache.segments_BT = torch.cat((cache.segments_BT, segments_BT), dim=1)
        cache.fed.append(T)
        logits_BTV = torch.zeros(B, T, self.config.vocab_size)
        for row in range(B):
            for t in range(start, start + T):
                mine = cache.segments_BT[row, : t + 1] == cache.segments_BT[row, t]
                logits_BTV[row, t - start] = self.scores(cache.ids_BT[row, : t + 1][mine].tolist())
        return logits_BTV

    def forward(self, ids_BT: Tensor, **keywords) -> Tensor:
        return self.hidden(ids_BT, **keywords)

    __call__ = forward


class UniformGPT(FakeGPT):
    """Every next token is equally likely."""

    def scores(self, ids: list[int]) -> Tensor:
        return torch.zeros(self.config.vocab_size)


class Fork(FakeGPT):
    """Chances of the next token: `first` after `<|assistant|>`, then what each one leads to.

    A token that `then` does not name leads to `<|end|>`.
    """

    def __init__(self, first: dict[int, float], then: dict[int, dict[int, float]]):
        super().__init__()
        self._then = {ByteTokenizer.assistant_id: first, **then}

    def scores(self, ids: list[int]) -> Tensor:
        logits_V = torch.full((self.config.vocab_size,), -1e4)
        for token, chance in self._then.get(ids[-1], {ByteTokenizer.end_id: 1.0}).items():
            logits_V[token] = math.log(chance)
        return logits_V


class ScriptedGPT(FakeGPT):
    """After the n-th `<|assistant|>` it says the n-th of `replies`, then `<|end|>`, for sure.

    With more turns than replies it starts over. Before any `<|assistant|>` it says `<|end|>`.
    """

    def __init__(self, replies: Sequence[str], context: int = 256):
        super().__init__(context=context)
        self._replies = [ByteTokenizer().encode(reply) for reply in replies]

    def scores(self, ids: list[int]) -> Tensor:
        logits_V = torch.zeros(self.config.vocab_size)
        turn = ids.count(ByteTokenizer.assistant_id)
        token = ByteTokenizer.end_id
        if turn:
            said = ids[::-1].index(ByteTokenizer.assistant_id)
            reply = self._replies[(turn - 1) % len(self._replies)]
            token = reply[said] if said < len(reply) else token
        logits_V[token] = 100.0
        return logits_V


class TwoMinds(FakeGPT):
    """Answers everything with one of two replies, as the dice fall; both are equally likely."""

    REPLIES = ("Yes.", "No way.")

    def scores(self, ids: list[int]) -> Tensor:
        logits_V = torch.zeros(self.config.vocab_size)
        if ByteTokenizer.assistant_id not in ids:
            return logits_V
        opened = ids[::-1].index(ByteTokenizer.assistant_id)
        begun = ids[len(ids) - opened :]
        for reply in map(ByteTokenizer().encode, self.REPLIES):
            if reply[: len(begun)] == begun:
                logits_V[[*reply, ByteTokenizer.end_id][len(begun)]] = 100.0
        return logits_V
