"""Cut text into numbered pieces and join them again without losing a byte.

Generated from chapters/03_tokenizer.py: edit that file,
then run `python -m tinychat.book export`.
"""

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from tinychat.runtime.errors import ConfigError, TinychatError


SPACE = "▁"  # how a piece shows the space it carries: U+2581, as in SentencePiece
CONTROL_PIECES = (
    "<|pad|>",
    "<|unk|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)


def split_words(text: str) -> list[str]:
    """Cut a text into words that carry the space before them, shown as `▁`.

    Letters and punctuation part ways ("home" "."); digits and line breaks stand alone.
    """
    return re.findall(r"▁?[^\W\d_]+|▁?(?:[^\w▁\n]|_)+|▁|\d|\n|.", text.replace(" ", SPACE))


def count_pairs(words: Iterable[tuple[tuple[str, ...], int]]) -> Counter[tuple[str, str]]:
    """Count how often two pieces stand side by side in `(pieces, frequency)` words."""
    pairs: Counter[tuple[str, str]] = Counter()
    for pieces, frequency in words:
        for pair in zip(pieces, pieces[1:], strict=False):
            pairs[pair] += frequency
    return pairs


def merge_pair(pieces: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of `pair` in a word, from the left."""
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            merged.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return tuple(merged)


class BytePairEncoder:
    """Byte-pair encoding from scratch (Sennrich et al. 2016), small and slow, for reading.

    `pieces` holds 256 byte pieces, then the characters seen in training, then one piece a merge.
    The id of a piece is its place in the list. A character that was never seen becomes its UTF-8
    bytes, so every text that UTF-8 can hold has an encoding.
    """

    def __init__(self, characters: Iterable[str], merges: Iterable[tuple[str, str]]) -> None:
        self.merges = list(merges)
        joined = [left + right for left, right in self.merges]
        self.pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list(characters) + joined
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.rank = {piece: i for i, piece in enumerate(joined)}

    @classmethod
    def train(cls, text: str, merges: int) -> "BytePairEncoder":
        """Learn at most `merges` merges: each joins the most frequent pair of the moment.

        Between equally frequent pairs the shorter piece wins, then the alphabet: the rule that
        SentencePiece uses, so that both learn the same list.
        """
        words = [(tuple(word), n) for word, n in Counter(split_words(text)).items()]
        learned: list[tuple[str, str]] = []
        while len(learned) < merges:
            pairs = count_pairs(words)
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], len("".join(pair)), "".join(pair)))
            words = [(merge_pair(pieces, best), n) for pieces, n in words]
            learned.append(best)
        return cls(sorted(set(text.replace(" ", SPACE))), learned)

    def tokenize(self, word: str) -> tuple[str, ...]:
        """Cut one word: as long as two neighbours join to a known piece, join the earliest."""
        pieces = tuple(word)
        while True:
            pairs = [p for p in zip(pieces, pieces[1:], strict=False) if "".join(p) in self.rank]
            if not pairs:
                return pieces
            pieces = merge_pair(pieces, min(pairs, key=lambda pair: self.rank["".join(pair)]))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; a `▁` that the text really holds goes through its bytes."""
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            ids += SPACE.encode() if i else b""
            for piece in (p for word in split_words(part) for p in self.tokenize(word)):
                ids += [self.ids[piece]] if piece in self.ids else piece.encode()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Join pieces to text; bytes that are no UTF-8 show as U+FFFD."""
        data = b"".join(
            bytes([i]) if i < 256 else self.pieces[i].replace(SPACE, " ").encode() for i in ids
        )
        return data.decode("utf-8", errors="replace")


def sentences(texts: Iterable[str], longest: int = 4000) -> Iterator[str]:
    """Cut texts into the lines that SentencePiece trains on, at most `longest` bytes each.

    SentencePiece silently skips a line of more than 4192 bytes; long lines are cut at a space.
    """
    for text in texts:
        for line in clean_surrogates(text).split("\n"):
            while len(line.encode()) > longest:
                # Four bytes a character at most: this many characters always fit.
                cut = line.rfind(" ", 1, longest // 4)
                cut = cut if cut > 0 else longest // 4
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def clean_surrogates(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 can hold, by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def train_sentencepiece(texts: Iterable[str], vocab_size: int = 8192) -> bytes:
    """Train a SentencePiece BPE model (Kudo & Richardson 2018) and return its bytes.

    Nothing is normalised and no space is added or removed, so that decoding gives the text back.
    Line breaks and paragraph breaks are pieces of their own. Raises TinychatError where the text
    holds too little for `vocab_size` pieces, or `vocab_size` leaves no room for text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=0.9998,
            required_chars="".join(map(chr, range(33, 127))),
            user_defined_symbols=["\n", "\n\n"],
            control_symbols=list(CONTROL_PIECES[4:]),
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=CONTROL_PIECES[0],
            unk_piece=CONTROL_PIECES[1],
            bos_piece=CONTROL_PIECES[2],
            eos_piece=CONTROL_PIECES[3],
            num_threads=1,  # the order of a parallel sum must not change a tie
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TinychatError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text: use more text or "
            f"another vocabulary size ({str(error).strip().splitlines()[-1]})"
        ) from error
    return model.getvalue()


class Tokenizer:
    """The tokenizer that the models use: a SentencePiece model with tinychat's control pieces.

    Encoding never yields a control id, whatever the text says; only the chat template adds them.
    Decoding joins bytes first and text last, so any Unicode comes back as it went in. Raises
    TinychatError for bytes that are no such model.
    """

    def __init__(self, model: bytes) -> None:
        self.model = bytes(model)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not self.model:
                raise RuntimeError("no bytes")
            self._processor.LoadFromSerializedProto(self.model)
            size = self._processor.GetPieceSize()
        except RuntimeError as error:
            raise TinychatError(
                f"these {len(self.model)} bytes are no SentencePiece model: "
                "train one with `tinychat train tokenizer`"
            ) from error
        ids = [self._processor.PieceToId(piece) for piece in CONTROL_PIECES]
        for piece, i in zip(CONTROL_PIECES, ids, strict=True):
            found = size and self._processor.IdToPiece(i) == piece
            if not found or not (self._processor.IsControl(i) or self._processor.IsUnknown(i)):
                raise TinychatError(
                    f"the tokenizer lacks the control piece {piece}: "
                    "train one with `tinychat train tokenizer`"
                )
        self.pad_id, self.unk_id, self.bos_id, self.end_id = ids[:4]
        self.system_id, self.user_id, self.assistant_id = ids[4:]
        self.control_ids = frozenset(ids)
        self._bytes = [self._bytes_of(i) for i in range(size)]
        if not all(self._processor.PieceToId(f"<0x{b:02X}>") != self.unk_id for b in range(256)):
            raise TinychatError(
                "the tokenizer has no byte pieces, so it can't hold every text: "
                "train one with `tinychat train tokenizer`"
            )
        self._space_ids = [self._processor.PieceToId(f"<0x{b:02X}>") for b in SPACE.encode()]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a `tokenizer.model` file; ConfigError where it can't be read."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"the tokenizer {path} can't be read: {error.strerror or error}"
            ) from error
        try:
            return cls(model)
        except TinychatError as error:
            raise TinychatError(f"{path}: {error}") from error

    @cached_property
    def sha256(self) -> str:
        """The hex SHA-256 of the model: shards and checkpoints name their tokenizer by it."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def vocab_size(self) -> int:
        """How many pieces there are; ids run from 0 to one less."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; lone surrogates count as U+FFFD."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Encode many texts; `threads` 0 takes every core."""
        # SentencePiece writes a space as ▁, so a text's own ▁ would come back as a space.
        parts = [clean_surrogates(text).split(SPACE) for text in texts]
        flat = [part for text in parts for part in text]
        if threads == 1:
            encoded = iter([self._processor.EncodeAsIds(part) for part in flat])
        else:
            threads = threads or os.cpu_count() or 1
            encoded = iter(self._processor.Encode(flat, num_threads=threads))
        batch: list[list[int]] = []
        for text in parts:
            ids: list[int] = list(next(encoded))
            for _ in text[1:]:
                ids += self._space_ids
                ids += next(encoded)
            batch.append(ids)
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """Join ids to text: control ids vanish, bytes that are no UTF-8 show as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that a token stands for, `b""` for a control id.

        One character may be spread over several tokens. Raises TinychatError for an id outside
        the vocabulary.
        """
        if not 0 <= id < len(self._bytes):
            raise TinychatError(
                f"the token id {id} is outside this tokenizer's 0 to {self.vocab_size - 1}"
            )
        return self._bytes[id]

    def piece(self, id: int) -> str:
        """Return a piece's printable name: `▁the`, `<0xE2>`, `\\n`, `<|end|>`."""
        self.token_bytes(id)
        return self._processor.IdToPiece(id).replace("\n", "\\n")

    def _bytes_of(self, id: int) -> bytes:
        if self._processor.IsControl(id) or self._processor.IsUnknown(id):
            return b""
        name = self._processor.IdToPiece(id)
        if self._processor.IsByte(id):
            return bytes([int(name[3:5], 16)])
        return name.replace(SPACE, " ").encode()
