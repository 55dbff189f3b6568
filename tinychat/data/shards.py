"""Token shards: the documents of one source and split, end to end in one file of uint16.

`NAME.bin` holds the tokens, little-endian; `NAME.json` says how many, of which documents, and by
which tokenizer. The index is written last, so a shard with an index is whole.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.runtime.errors import DataError
from tinychat.runtime.files import file_sha256, reason, write_atomic

FORMAT = 1
REMEDY = "delete it and prepare the data again"


@dataclass(frozen=True)
class TokenShard:
    """An open shard. `array` is a read-only view of the file: nothing is loaded until read."""

    path: Path
    "without a suffix"
    tokens: int
    documents: int
    source: str
    split: str
    tokenizer_sha256: str
    sha256: str
    array: np.ndarray = field(repr=False, compare=False)
    "uint16 `[tokens]`"

    @classmethod
    def open(
        cls, path: str | Path, tokenizer_sha256: str | None = None, *, verify: bool = True
    ) -> "TokenShard":
        """Open a shard; DataError where it is missing, cut off, changed or of another tokenizer.

        `verify` False skips the checksum, which reads the whole file once.
        """
        stem = stem_of(path)
        index = _read_index(stem)
        if tokenizer_sha256 is not None and index["tokenizer_sha256"] != tokenizer_sha256:
            raise DataError(
                f"the shard {stem} was made with the tokenizer {index['tokenizer_sha256'][:12]}, "
                f"not with this one ({tokenizer_sha256[:12]}): {REMEDY}"
            )
        data = with_suffix(stem, ".bin")
        try:
            size = data.stat().st_size
            if size != 2 * index["tokens"]:
                raise DataError(
                    f"the shard {data} has {size} bytes where its index says "
                    f"{2 * index['tokens']}: {REMEDY}"
                )
            if verify and file_sha256(data) != index["sha256"]:
                raise DataError(f"the shard {data} has changed since it was written: {REMEDY}")
            array = np.memmap(data, dtype="<u2", mode="r")
        except OSError as error:
            raise DataError(f"the shard {data} can't be read: {reason(error)}") from error
        del index["format"]
        return cls(path=stem, array=array, **index)


def stem_of(path: str | Path) -> Path:
    """Return a shard's path without `.bin` or `.json`; other dots belong to the name."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".json") else path


def with_suffix(stem: Path, suffix: str) -> Path:
    """Append a suffix, whatever dots the name holds (`own.txt.train` + `.bin`)."""
    return stem.with_name(stem.name + suffix)


def _read_index(stem: Path) -> dict[str, Any]:
    path = with_suffix(stem, ".json")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"there is no shard {stem}: {reason(error)}") from error
    except ValueError as error:
        raise DataError(f"the shard index {path} is not JSON: {REMEDY}") from error
    kinds = {
        "format": int,
        "tokens": int,
        "documents": int,
        "source": str,
        "split": str,
        "tokenizer_sha256": str,
        "sha256": str,
    }
    if not isinstance(index, dict) or any(
        not isinstance(index.get(key), kind) for key, kind in kinds.items()
    ):
        raise DataError(f"the shard index {path} lacks one of {', '.join(kinds)}: {REMEDY}")
    if index["format"] != FORMAT:
        raise DataError(
            f"the shard {stem} has format {index['format']}; this version reads {FORMAT}: {REMEDY}"
        )
    if index["tokens"] < 1:
        raise DataError(f"the shard {stem} says that it holds {index['tokens']} tokens: {REMEDY}")
    return {key: index[key] for key in kinds}


def write_shard(
    path: str | Path,
    token_lists: Iterable[Sequence[int]],
    *,
    tokenizer_sha256: str,
    source: str,
    split: str,
) -> TokenShard:
    """Write one shard, a list of tokens a document, and open it.

    Streams: the documents need not fit into memory. Until the last byte is on disk, the shard of
    that name is the old one or none. Raises DataError for no tokens, an id above 65535, a full
    disk.
    """
    stem = stem_of(path)
    counts = {"tokens": 0, "documents": 0}
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        for tokens in token_lists:
            array = np.asarray(tokens, dtype=np.int64)
            if array.size and not 0 <= array.min() <= array.max() < 1 << 16:
                raise DataError(f"a shard holds token ids up to 65535; {source} has a larger one")
            data = array.astype("<u2").tobytes()
            digest.update(data)
            counts["tokens"] += array.size
            counts["documents"] += 1
            yield data
        if not counts["tokens"]:
            raise DataError(f"the source {source} has no text for its {split} part")

    try:
        with_suffix(stem, ".json").unlink(missing_ok=True)
        write_atomic(with_suffix(stem, ".bin"), chunks())
        index = {
            "format": FORMAT,
            **counts,
            "source": source,
            "split": split,
            "tokenizer_sha256": tokenizer_sha256,
            "sha256": digest.hexdigest(),
        }
        write_atomic(with_suffix(stem, ".json"), [json.dumps(index, indent=1).encode() + b"\n"])
    except OSError as error:
        raise DataError(f"the shard {stem} can't be written: {reason(error)}") from error
    return TokenShard.open(stem, verify=False)


def open_shards(
    folder: str | Path, split: str = "train", tokenizer_sha256: str | None = None
) -> dict[str, TokenShard]:
    """Open every shard of a split in a folder, by source name, in alphabetical order."""
    found = sorted(Path(folder).glob(f"*.{split}.json"))
    if not found:
        raise DataError(f"the folder {folder} holds no {split} shards: prepare the data first")
    shards = [TokenShard.open(path, tokenizer_sha256) for path in found]
    return {shard.source: shard for shard in shards}
