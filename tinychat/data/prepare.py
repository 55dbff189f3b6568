"""Text to token shards: builds what is missing, keeps what is there."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat.data import corpus
from tinychat.data.public import (
    data_folder,
    is_dialogues,
    read_dialogues,
    read_documents,
    source_path,
    sources,
)
from tinychat.data.records import Dialogue, Document
from tinychat.data.shards import TokenShard, with_suffix, write_shard
from tinychat.data.split import split_of
from tinychat.runtime.errors import DataError

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer

EMBEDDED: dict[str, Callable[[], Sequence[Document | Dialogue]]] = {
    "stories": corpus.stories,
    "explanations": corpus.explanations,
    "dialogues": corpus.dialogues,
    "basics": corpus.basics,
}
SPLITS = ("train", "validation")
BATCH = 4_000_000  # characters encoded at a time
NOT_FOR_PRETRAINING = frozenset(
    # Answers of one kind over and over, or of a model: they would teach a voice, not a language.
    (
        "chitchat_personas",
        "chatterbot_corpus",
        "jokes_programmer",
        "oasst_pythia_answers",
        "taskmaster4_coffee",
        "gsm8k",
        "self_instruct_human",
    )
)

Render = Callable[[Dialogue, "Tokenizer"], Sequence[int]]


@dataclass(frozen=True)
class Progress:
    """What `prepare` reports: one call when a source starts, several while it runs, one at end."""

    source: str
    number: int
    "1 for the first source"
    of: int
    tokens: int
    done: bool


def default_sources(folder: Path | None) -> list[str]:
    """Return the embedded sources and, of the public ones for pretraining, those that are here."""
    here = [
        source.name
        for source in sources()
        if folder is not None
        and source.kind != "preference"
        and source.name not in NOT_FOR_PRETRAINING
        and (folder / source.file).is_file()
    ]
    # Simplest first: a run that is cut short has made the shards that matter most.
    simple = 4
    return [*here[:simple], *EMBEDDED, *here[simple:]]


def prepare(
    folder: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    tokenizer: "Tokenizer",
    sources: Sequence[str] | None = None,
    *,
    render: Render | None = None,
    threads: int = 0,
    validation_tokens: int = 150_000,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, dict[str, TokenShard]]:
    """Make `OUT/SOURCE.train` and `OUT/SOURCE.validation`; return them as `[split][source]`.

    Only missing shards are made; one of another tokenizer, or a damaged one, raises DataError and
    stays. `sources` are names of public sources, `stories`, `explanations`, `dialogues`, `basics`,
    or paths to your own `.txt` and `.jsonl` files; None takes what the folder holds, and without a
    folder the embedded corpus alone. Documents become `<|bos|>` and their text; `render` turns
    dialogues into tokens (None: the chat template). At most `validation_tokens` a source, to the
    document; a source too small to have validation text has none, one too small to have anything
    else is trained on whole. `threads` 0 takes all cores.
    """
    data = data_folder(folder)
    names = list(sources) if sources is not None else default_sources(data)
    # 1. Refuse what can't work before the first hour is spent.
    for name in names:
        if name not in EMBEDDED:
            source_path(name, data)
    stems = [shard_name(name) for name in names]
    if doubled := {stem for stem in stems if stems.count(stem) > 1}:
        raise DataError(f"two sources have the name {doubled.pop()!r}: rename a file")
    # 2. One source after the other.
    shards: dict[str, dict[str, TokenShard]] = {split: {} for split in SPLITS}
    for number, (name, label) in enumerate(zip(names, stems, strict=True), 1):

        def report(
            tokens: int, done: bool = False, label: str = label, number: int = number
        ) -> None:
            if progress is not None:
                progress(Progress(label, number, len(names), tokens, done))

        report(0)
        for split in SPLITS:
            stem = Path(out) / f"{label}.{split}"
            limit = validation_tokens if split == "validation" else None
            if with_suffix(stem, ".json").exists():
                shard = TokenShard.open(stem, tokenizer.sha256)
            else:
                lists = _encode(name, data, tokenizer, split, limit, render, threads, report)
                first = next(lists, None)
                if first is None and split == "validation":
                    continue
                if first is None:  # all of a tiny file fell to the other parts
                    lists = _encode(name, data, tokenizer, None, limit, render, threads, report)
                    first = next(lists)
                shard = write_shard(
                    stem,
                    _chain(first, lists),
                    tokenizer_sha256=tokenizer.sha256,
                    source=label,
                    split=split,
                )
            shards[split][label] = shard
        report(shards["train"][label].tokens, True)
    return shards


def shard_name(source: str) -> str:
    """Return what a source is called in shards and recipes: a file of your own by its name."""
    return source if source in EMBEDDED else Path(source).name


def _chain(first: Sequence[int], rest: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
    yield first
    yield from rest


def _records(name: str, folder: Path | None) -> Iterator[Document | Dialogue]:
    if name in EMBEDDED:
        yield from EMBEDDED[name]()
    elif is_dialogues(name, folder):
        yield from read_dialogues(name, folder)
    else:
        yield from read_documents(name, folder)


def _encode(
    name: str,
    folder: Path | None,
    tokenizer: "Tokenizer",
    split: str | None,
    limit: int | None,
    render: Render | None,
    threads: int,
    report: Callable[[int], None],
) -> Iterator[Sequence[int]]:
    """Yield the tokens of the records of one split (None: all), until `limit` is reached."""
    total = 0
    waiting: list[Document | Dialogue] = []
    characters = 0
    # A small limit needs small batches, or it would encode far more than it keeps.
    batch = BATCH if limit is None else min(BATCH, 4 * limit)

    def flush() -> Iterator[Sequence[int]]:
        nonlocal total
        for tokens in _tokens(waiting, tokenizer, render, threads):
            total += len(tokens)
            yield tokens
            if limit is not None and total >= limit:
                return
        report(total)

    for record in _records(name, folder):
        if split is not None and split_of(record.id) != split:
            continue
        waiting.append(record)
        characters += sum(map(len, _texts(record)))
        if characters >= batch:
            yield from flush()
            waiting, characters = [], 0
            if limit is not None and total >= limit:
                return
    yield from flush()


def _texts(record: Document | Dialogue) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    return [message.content for message in record.messages]


class _Encoded:
    """The tokenizer with the texts of one batch encoded ahead, on all threads at once."""

    def __init__(self, tokenizer: "Tokenizer", texts: Sequence[str], threads: int) -> None:
        self._tokenizer = tokenizer
        unique = list(dict.fromkeys(texts))
        self._ids = dict(zip(unique, tokenizer.encode_batch(unique, threads), strict=True))

    def encode(self, text: str) -> list[int]:
        ids = self._ids.get(text)
        return self._tokenizer.encode(text) if ids is None else ids

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


def _tokens(
    records: Sequence[Document | Dialogue],
    tokenizer: "Tokenizer",
    render: Render | None,
    threads: int,
) -> Iterator[Sequence[int]]:
    encoded = _Encoded(tokenizer, [text for record in records for text in _texts(record)], threads)
    if render is None:
        from tinychat.dialogue import render as template

        def render(dialogue: Dialogue, tokenizer: "Tokenizer") -> Sequence[int]:
            return template(dialogue, tokenizer).tokens

    for record in records:
        if isinstance(record, Document):
            yield [tokenizer.bos_id, *encoded.encode(record.text)]
        else:
            yield render(record, encoded)  # type: ignore[arg-type]
