# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The tokenizer
#
# Cut text into numbered pieces and join them again without losing a byte.
#
# A language model never sees a letter. It sees numbers: one for each piece of text, out of a fixed
# list of pieces. The program that cuts text into pieces, and joins them again, is the
# **tokenizer**. A piece is called a **token**.
#
# It sounds like a detail. But the tokenizer decides how long a text is for the model, what the
# model can say at all, and why it is bad at counting the letters of a word.
#
# **What you will build**
#
# 1. byte-pair encoding in its plainest form, on one line of text;
# 2. an encoder that can write any text at all, emoji and Chinese included;
# 3. a comparison, merge by merge, with SentencePiece, the library that real models use;
# 4. the `Tokenizer` of this book, with pieces that nobody can type;
# 5. a tokenizer of your own, and a look at what each language pays.
#
# **What you need:** chapter 01 for the habit of reading such pages; no mathematics. (Exercise 2 uses
# the measure of chapter 02.) The code runs in well under a minute; take an hour to read.

# %% tags=["export"]
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

# %% [markdown]
# ## Letters or words?
#
# What should a piece be? Two answers come to mind: one letter, or one word. Try both on the
# stories that come with the book.

# %%
import time

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.corpus import dialogues, explanations, stories
from tinychat.data.split import split_of

FAST = os.environ.get("TINYCHAT_FAST") == "1"

story = stories()[0].text
rest = " ".join(document.text for document in stories()[1:])
letters = list(story)
words = story.split()
unknown = sorted(set(words) - set(rest.split()))
print(f"{len(letters):,} letters, out of an alphabet of {len(set(rest))}")
print(f"{len(words):,} words, out of a list of {len(set(rest.split())):,}")
print(f"{len(unknown)} of its different words are in no other story, such as {unknown[:5]}")
assert unknown and set(letters) <= set(rest)

# %% [markdown]
# Letters make the text long: the model has to read many steps for little meaning. Words make it
# short, but the list gets huge, and still the next story brings words that are not in it. To a
# model that knows only words, they don't exist.
#
# What you want lies between: frequent words as one piece, rare words as a few pieces, and a way to
# write *anything*.
#
# ## The idea: join what stands together
#
# **Byte-pair encoding** (BPE) starts with letters and looks at the text. Which two pieces stand
# side by side most often? Join them to a new piece. Look again. Join again. Stop when the list is
# as long as you want it. That's all.
#
# Here it is in its plainest form, on one line of text.

# %%
pieces = list("to be or not to be")
for _ in range(4):
    counts = Counter(zip(pieces, pieces[1:], strict=False))
    left, right = max(counts, key=lambda pair: counts[pair])
    joined, i = [], 0
    while i < len(pieces):
        hit = pieces[i : i + 2] == [left, right]
        joined.append(left + right if hit else pieces[i])
        i += 2 if hit else 1
    print(f"{left!r} + {right!r} stand together {counts[left, right]} times → {joined}")
    pieces = joined

# %% [markdown]
# After one round "to" is a piece, although nobody told the program that it is a word. Then
# something unpleasant happens: a piece grows across the gap between two words. Go on, and whole
# sentences become pieces that never come up again.
#
# So real tokenizers cut the text into words first, and join only inside a word. Where does the
# space go? Into the word after it: `▁low` is "low" with the space before it. Tokens carry their
# space, and to put a text together again you only write the pieces one after the other. No rule is
# needed for where spaces belong.
#
# Letters and punctuation are kept apart too, or else `home` and `home.` would be two pieces that
# know nothing of each other. Digits stand alone: then a number is written the same way wherever it
# comes up.


# %% tags=["export"]
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


# %%
print(split_words('He sold 25 loaves, then went home. "Home!"'))

# %% tags=["test"]
# Nothing is lost, and no word holds both letters and punctuation.
assert "".join(split_words(story)) == story.replace(" ", SPACE)
assert not any(re.search(r"[^\W\d_]", w) and re.search(r"[^\w▁\n]", w) for w in split_words(story))
assert split_words("go home.") == ["go", "▁home", "."]
assert split_words("42") == ["4", "2"]

# %% [markdown]
# Most words come up many times, so you need each different word only once, with its count. Two
# small functions are left: count the pairs, and join one.


# %% tags=["export"]
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


# %%
example = [(tuple(word), n) for word, n in Counter(split_words("low lower lowest slow")).items()]
for pair, n in count_pairs(example).most_common(3):
    print(pair, n)
print(merge_pair(("▁", "l", "o", "w", "e", "r"), ("l", "o")))

# %% tags=["test"]
assert count_pairs(example)["l", "o"] == 4  # low, ▁lower, ▁lowest, ▁slow
assert merge_pair("aaa", ("a", "a")) == ("aa", "a")  # from the left, each letter once

# %% [markdown]
# ## The encoder
#
# Training gives a list of merges, the most useful first. To encode a new text, cut it into words
# and repeat the merges in the order in which they were learned.
#
# One question is open: what about a character that was in no training text, an emoji or a Chinese
# sign? Text in a computer is made of bytes, and there are only so many different ones. So the list
# begins with one piece for every byte, and a character that is not in the list becomes its bytes.
# This is **byte fallback**. With it, every text has an encoding.


# %% tags=["export"]
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


# %%
encoder = BytePairEncoder.train(story, 60)
for i, (left, right) in enumerate(encoder.merges[:12], 1):
    print(f"merge {i:2}: {left!r:>6} + {right!r:<5} → {left + right!r}")

sentence = "The bread was not sorry about the butter."
ids = encoder.encode(sentence)
print()
print(" | ".join(encoder.pieces[i] for i in ids))
print(f"{len(sentence)} letters became {len(ids)} tokens")
print(" | ".join(encoder.pieces[i] for i in encoder.encode("🦊 é")))

# %% tags=["test"]
assert len(encoder.encode(sentence)) < len(sentence)
for text in (story, sentence, "", "🦊 é 日本", "two  spaces\n\n", "a real ▁"):
    assert encoder.decode(encoder.encode(text)) == text

# %% [markdown]
# Look at the first merges: bits of the most common English words, and many of them begin with a
# space. Look at the fox as well: one emoji became several byte pieces, and none of them means
# anything on its own.
#
# <!-- widget: merges -->
#
# ## The same thing, faster
#
# Your encoder is easy to read and slow: each round counts every pair again. For real texts you
# use **SentencePiece**, a library in C++ that does the same with better bookkeeping. Does it
# really do the same? Don't believe it: compare.
#
# SentencePiece reads lines, and silently skips a line that is too long. So first cut texts into
# lines that fit.


# %% tags=["export"]
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


# %%
small_text = story.replace("\n", " ")
merges = 150
ours = BytePairEncoder.train(small_text, merges)
seen = set(small_text.replace(" ", SPACE))
alphabet = seen | set(map(chr, range(33, 127)))  # SentencePiece also gets all of ASCII
fixed = len(CONTROL_PIECES) + 2 + 256  # control pieces, two line breaks, the bytes: explained below
theirs = sentencepiece.SentencePieceProcessor()
theirs.LoadFromSerializedProto(train_sentencepiece([small_text], fixed + len(alphabet) + merges))

our_list = [left + right for left, right in ours.merges]
their_list = [theirs.IdToPiece(fixed + i) for i in range(merges)]
print("ours:  ", our_list[:14])
print("theirs:", their_list[:14])
print(f"{sum(a == b for a, b in zip(our_list, their_list, strict=True))} of {merges} merges agree")
assert our_list == their_list

# %% [markdown]
# Every merge is the same, in the same order. That took care in two places, and both are in the
# code above:
#
# - **Ties.** Two pairs are often equally frequent. Then SentencePiece takes the shorter piece, and
#   of equally long ones the first in the alphabet.
# - **Borders.** SentencePiece lets no piece hold letters and punctuation together, which is why
#   `split_words` parts them. The next cell leaves that out, and shows where the two lists part.

# %%
naive_words = re.findall(r"▁?[^▁]+", small_text.replace(" ", SPACE))
naive = [(tuple(word), n) for word, n in Counter(naive_words).items()]
for i in range(merges):
    found = count_pairs(naive)
    best = min(found, key=lambda pair: (-found[pair], len("".join(pair)), "".join(pair)))
    if "".join(best) != their_list[i]:
        print(f"merge {i + 1}: without borders {''.join(best)!r}, SentencePiece {their_list[i]!r}")
        break
    naive = [(merge_pair(word, best), n) for word, n in naive]
assert not "".join(best).strip(SPACE).isalpha()  # the odd one holds a letter and a mark

# %% [markdown]
# Encoding must agree as well, on text that neither was trained on. (Characters that are new to
# ours are left out: it writes them as bytes, while SentencePiece was given all of ASCII.)

# %% tags=["test"]
for other in stories()[1:20]:
    text = "".join(c for c in other.text.replace("\n", " ") if c in seen or c == " ")
    assert [ours.pieces[i] for i in ours.encode(text)] == theirs.EncodeAsPieces(text)

# %% [markdown]
# ## Pieces that nobody can type
#
# A model needs marks that are not text: here a document begins, here a turn ends, now the user
# speaks. If these marks were ordinary words, a user could type them, and so put words into the
# model's mouth.
#
# So a few ids are **control pieces**. They have names, to print them, but no text stands for them.
# Encoding never gives their ids, even when somebody types the name letter by letter. `<|bos|>` begins a
# document ("beginning of sequence") and `<|end|>` ends it, or a turn of a chat. The next three say whose
# turn it is. `<|pad|>` fills up short rows of a batch, and `<|unk|>`, for the unknown, is never needed
# here: what is unknown becomes bytes.

# %%
print(CONTROL_PIECES)

# %% [markdown]
# ## The tokenizer of this book
#
# Now the class that all later chapters use: SentencePiece inside, with four promises around it.
#
# 1. **Every text comes back as it was.** No cleaning, no added or removed space. (SentencePiece
#    writes a space as `▁`, so a real `▁` in a text would come back as a space. It goes through its
#    bytes instead.)
# 2. **Control ids come from the program, never from text.**
# 3. **Decoding joins bytes before it reads them as text**, since one character may be spread over
#    several tokens. `token_bytes` is there for programs that print token by token.
# 4. **It has a fingerprint.** A model is worthless with another tokenizer: the same numbers would
#    mean other pieces. So files carry the hash of their tokenizer, and loading compares it.


# %% tags=["export"]
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


# %% [markdown]
# ## Train your own
#
# The text is what comes with the book: stories, explanations and conversations. It takes seconds.
# A few documents are kept out, to measure on text that the tokenizer has not seen: `split_of`
# decides by a hash of a document's name, so the choice is the same in every chapter.
#
# How many pieces should there be? More pieces make texts shorter, but each piece needs a row of
# numbers in the model, and rare pieces are hardly ever trained.

# %%
documents = stories() + explanations()
corpus = [document.text for document in documents if split_of(document.id) == "train"]
if not FAST:
    talks = [talk for talk in dialogues() if split_of(talk.id) == "train"]
    corpus += [message.content for talk in talks for message in talk.messages]
unseen_text = "\n".join(d.text for d in documents if split_of(d.id) == "validation")
print(f"trained on {sum(len(text) for text in corpus):,} letters")
print("pieces   bytes a token   the word 'yesterday'")
table = {}
for size in (512, 1024) if FAST else (512, 1024, 2048, 4096):
    table[size] = Tokenizer(train_sentencepiece(corpus, size))
    tokens = table[size].encode(unseen_text)
    word = " ".join(table[size].piece(i) for i in table[size].encode(" yesterday"))
    print(f"{size:6,}   {len(unseen_text.encode()) / len(tokens):13.2f}   {word}")

# %% tags=["test"]
lengths = [len(tokenizer.encode(unseen_text)) for tokenizer in table.values()]
assert lengths == sorted(lengths, reverse=True)  # more pieces, fewer tokens

# %% [markdown]
# Keep the one with 2,048 pieces: small enough for a small model, and yours. (The next chapters take
# the shipped one, so that what you train can be compared with the shipped checkpoints.)

# %%
mine = table[1024 if FAST else 2048]
folder = Path("runs/book")
folder.mkdir(parents=True, exist_ok=True)
(folder / "tokenizer.model").write_bytes(mine.model)
print(f"runs/book/tokenizer.model: {mine.vocab_size:,} pieces, fingerprint {mine.sha256[:12]}")
assert Tokenizer.from_file(folder / "tokenizer.model").sha256 == mine.sha256

# %% [markdown]
# ## The shipped tokenizer
#
# The model that you can chat with has a tokenizer of the same kind, trained on far more text:
# children's books, simple stories, conversations, some encyclopaedia. Look at what it does with
# texts of many kinds, none of which it was trained on.

# %%
shipped = Tokenizer(tokenizer_model())
print(f"{shipped.vocab_size:,} pieces, a model file of {len(shipped.model):,} bytes\n")
samples = {
    "stories": "\n".join(d.text for d in stories() if split_of(d.id) == "validation"),
    "explanations": "\n".join(d.text for d in explanations() if split_of(d.id) == "validation"),
    "our chats": "\n".join(
        message.content
        for talk in dialogues()
        if split_of(talk.id) == "validation"
        for message in talk.messages
    ),
    "Python": "for i in range(10):\n    print(i ** 2)\n",
    "German": "Der Fuchs springt über den müden Hund und läuft in den Wald.",
    "Japanese": "きつねはのろまな犬を飛び越える",
    "emoji": "🦊🐶🌲",
    "digits": "3.14159265358979",
}
print(f"{'bytes a token':16}{'shipped':>8}{'yours':>8}")
per_token, of_mine = {}, {}
for name, text in samples.items():
    sizes = [len(text.encode()) / len(t.encode(text)) for t in (shipped, mine)]
    per_token[name], of_mine[name] = sizes
    print(f"{name:16}{sizes[0]:8.2f}{sizes[1]:8.2f}")


# %%
# alt: Bytes a token for eight kinds of text: English is far ahead of German, emoji and digits.
def draw_prices(plt):
    figure, axis = plt.subplots()
    places = list(range(len(per_token)))
    axis.barh([y - 0.2 for y in places], list(per_token.values()), 0.4, label="shipped")
    axis.barh([y + 0.2 for y in places], list(of_mine.values()), 0.4, label="yours")
    axis.axvline(1, color="grey", linestyle=":", label="every byte a token")
    axis.set_yticks(places, list(per_token))
    axis.invert_yaxis()
    axis.set(xlabel="bytes a token: more is cheaper")
    axis.legend()
    return figure


picture("03_prices", draw_prices)

# %% [markdown]
# English is cheap, because the tokenizer was trained on English. German costs more, and Japanese
# and emoji go byte by byte. This is not only a matter of cost: what takes more tokens is harder to
# learn, too. A tokenizer is the first place where a model prefers one language to another.

# %%
for text in (
    " the",
    "The",
    " tokenizer",
    " unbelievably",
    " 2026",
    " Zürich",
    "🦊",
    "\n\n",
    "<|end|>",
):
    print(f"{text!r:16}", " | ".join(shipped.piece(i) for i in shipped.encode(text)))

# %% tags=["test"]
for text in samples.values():
    assert shipped.decode(shipped.encode(text)) == text
assert per_token["stories"] > per_token["German"] > per_token["digits"]
assert shipped.control_ids.isdisjoint(shipped.encode(" ".join(CONTROL_PIECES)))
assert len(shipped.encode("\n\n")) == 1

# %% [markdown]
# Three things to notice. The word with its space and the word that begins a sentence are different
# pieces: the model has to learn that they mean the same. A number is its digits, one by one. And
# for the model, a word that is one piece has no letters at all: it can only learn by heart how it
# is spelled. When you see a chatbot miscount the letters of a word, this is why.
#
# ## Half a character
#
# A model writes token by token. Print each token at once, and a character whose bytes are spread
# over tokens comes out broken.

# %%
fox = shipped.encode("🦊")
print("one by one: ", "".join(shipped.decode([i]) for i in fox))
print("joined:     ", shipped.decode(fox))
print("the bytes:  ", [shipped.token_bytes(i) for i in fox])
assert shipped.decode(fox) == "🦊" != "".join(shipped.decode([i]) for i in fox)

# %% [markdown]
# Chapter 08 builds on `token_bytes`: it holds bytes back until a character is whole.
#
# ## Exercises
#
# **1.** Find the longest piece of letters in the shipped tokenizer. What does it tell you about the
# text that it was trained on?

# %% tags=["solution"]
letters_only = [
    piece for piece in map(shipped.piece, range(shipped.vocab_size)) if piece.strip(SPACE).isalpha()
]
longest = max(letters_only, key=len)
print(longest, len(longest) - longest.count(SPACE))
assert shipped.encode(longest.replace(SPACE, " ")) and len(longest) > 10

# %% [markdown]
# **2.** Two models with different tokenizers can't be compared by their loss a token: the one with
# longer tokens has the harder guess. Compare them by chapter 02's **bits per byte**. Write
# `bits_per_byte(nats_per_token, bytes_per_token)`. (A nat is $1/\ln 2$ bits.) Which is better: a
# loss of 3.0 at 4.0 bytes a token, or 2.5 at 3.0?

# %% tags=["solution"]
import math


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token


print(f"{bits_per_byte(3.0, 4.0):.3f} against {bits_per_byte(2.5, 3.0):.3f}")
assert bits_per_byte(3.0, 4.0) < bits_per_byte(2.5, 3.0)  # the higher loss a token is better
assert abs(bits_per_byte(math.log(256), 1) - 8) < 1e-12  # knowing nothing costs 8 bits a byte

# %% [markdown]
# **3.** What does it cost to shout? Take the small-letter words of the stories that are one token
# with a space before them. Which of them become the most tokens in capitals?

# %% tags=["solution"]
known = {word for document in stories()[:50] for word in re.findall(r"\b[a-z]+\b", document.text)}
single = sorted(word for word in known if len(shipped.encode(f" {word}")) == 1)
shouted = {word: len(shipped.encode(f" {word.upper()}")) for word in single}
for word in sorted(shouted, key=lambda word: (-shouted[word], word))[:3]:
    print(word, "→", " | ".join(map(shipped.piece, shipped.encode(f" {word.upper()}"))))
assert max(shouted.values()) > 3

# %% [markdown]
# **4.** Make training faster. After a merge, only the words that hold the pair have changed. Keep
# the counts, and a list of the words for each pair, and update both. The merges must stay the same.


# %% tags=["solution"]
def train_faster(text: str, merges: int) -> list[tuple[str, str]]:
    words = [(tuple(word), n) for word, n in Counter(split_words(text)).items()]
    counts = count_pairs(words)
    where: dict[tuple[str, str], set[int]] = {}
    for i, (pieces, _) in enumerate(words):
        for pair in zip(pieces, pieces[1:], strict=False):
            where.setdefault(pair, set()).add(i)
    learned: list[tuple[str, str]] = []
    while counts and len(learned) < merges:
        best = min(counts, key=lambda pair: (-counts[pair], len("".join(pair)), "".join(pair)))
        learned.append(best)
        for i in where.pop(best):
            pieces, n = words[i]
            if best not in zip(pieces, pieces[1:], strict=False):
                continue  # an earlier merge took the pair away from this word
            words[i] = (merge_pair(pieces, best), n)
            counts.subtract(count_pairs([(pieces, n)]))
            counts.update(count_pairs([words[i]]))
            for pair in zip(words[i][0], words[i][0][1:], strict=False):
                where.setdefault(pair, set()).add(i)
        counts = +counts  # drop what has fallen to zero
    return learned


text = " ".join(document.text for document in stories()[: 5 if FAST else 30])
start = time.perf_counter()
slow = BytePairEncoder.train(text, 200).merges
middle = time.perf_counter()
fast = train_faster(text, 200)
end = time.perf_counter()
print(f"plain {middle - start:.2f} s, with bookkeeping {end - middle:.2f} s")
assert fast == slow

# %% [markdown]
# ## Check yourself
#
# 1. Why not simply take words as tokens?
# 2. Two pairs are equally frequent. Why must the rule for ties be fixed?
# 3. What becomes of an emoji that no training text held?
# 4. A user types `<|end|>`. Which token does the model get?
# 5. Model A has a loss of 3.0 a token, model B of 2.5. Which is better?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. The list would be huge, most words in it rare, and the next text would still bring new ones.
# 2. Or the same text would give two different lists of merges, and a model trained with one can't
#    read the other's numbers.
# 3. Its bytes, a token each. The text comes back as it was.
# 4. Letters and marks as in any other text. Control ids come from the program alone.
# 5. You can't tell: their tokens may differ in length. Compare bits per byte (exercise 2).
#
# </details>
#
# ## What we left out
#
# - **Unigram tokenizers.** Instead of merging upwards, they start with far too many pieces and
#   throw out the least useful. SentencePiece can do that too.
# - **BPE on bytes.** Some models merge bytes from the start and have no characters at all. Byte
#   fallback comes to the same list for English, and to a simpler one to read.
# - **Cleaning.** Many tokenizers turn "ﬁ" into "fi" or smart quotes into plain ones. Ours changes
#   nothing, so that you can trust what comes back.
# - **No tokenizer.** Models that read bytes exist. They need more computation for the same text.
#
# ## Where this is in the package
#
# `tinychat/tokenizer.py` holds what you built: `BytePairEncoder`, `train_sentencepiece` and
# `Tokenizer`. The shipped model is `tinychat/data/tokenizer.model`, and
# `tinychat/data/sample.py` says which texts it was trained on. `tinychat train tokenizer` trains
# another.
#
# ## Sources
#
# - Philip Gage, [A new algorithm for data compression](http://www.pennelynn.com/Documents/CUJ/HTML/94HTML/19940045.HTM),
#   1994: byte-pair encoding, to make files smaller.
# - Rico Sennrich, Barry Haddow, Alexandra Birch,
#   [Neural machine translation of rare words with subword units](https://aclanthology.org/P16-1162/),
#   2016: the same idea for language models.
# - Taku Kudo, John Richardson,
#   [SentencePiece](https://aclanthology.org/D18-2012/), 2018: spaces inside the pieces, text comes
#   back as it was.
# - Changhan Wang, Kyunghyun Cho, Jiatao Gu,
#   [Neural machine translation with byte-level subwords](https://arxiv.org/abs/1909.03341), 2019:
#   bytes as the alphabet.
