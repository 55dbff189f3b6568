"""Read and write safetensors files that can prove they are whole.

The layout is that of safetensors: eight bytes of header length, a JSON header that names dtype,
shape and place of each tensor, the bytes. (https://github.com/huggingface/safetensors) Any
safetensors reader opens these files. Two checksums in `__metadata__` are our own addition:
`payload_sha256` covers the tensor bytes, `header_sha256` the header with its own 64 digits
replaced by zeros. Together they find any flipped bit. Nothing here imports torch until a
tensor is made.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.runtime.errors import CheckpointError
from tinychat.runtime.files import reason, write_atomic
from tinychat.runtime.foreign import damaged, not_safetensors

if TYPE_CHECKING:
    import torch

MAX_HEADER = 16 << 20  # a real header is a few kilobytes; more means that these are other bytes
_ZEROS = "0" * 64
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Entry:
    """One tensor's line in the header; `begin` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself. `payload` and `bytes` (the whole file) are in bytes."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    payload: int
    bytes: int


def read_header(path: str | Path) -> Header:
    """Read and check the header alone. Raises CheckpointError."""
    path = Path(path)
    with _open(path) as file:
        return _header(file, path)


def read(path: str | Path) -> tuple[Header, bytearray]:
    """Read a whole file: header and tensor bytes, both checked. Raises CheckpointError."""
    path = Path(path)
    with _open(path) as file:
        header = _header(file, path)
        try:
            data = bytearray(header.payload)
        except (MemoryError, OverflowError) as error:
            raise CheckpointError(
                f"{path} needs {header.payload / 1e9:.1f} GB of memory, more than is free: "
                "close other programs or take a smaller file."
            ) from error
        view, filled = memoryview(data), 0
        try:
            while filled < len(data) and (got := file.readinto(view[filled:])):
                filled += got
        except OSError as error:
            raise CheckpointError(f"Cannot read {path} ({reason(error)}): try again.") from error
    if filled < len(data):
        raise damaged(path, "it became shorter while it was read")
    if hashlib.sha256(data).hexdigest() != header.metadata.get("payload_sha256"):
        raise damaged(path, "the checksum of its tensors does not match")
    return header, data


def tensor(header: Header, data: bytearray, name: str) -> "torch.Tensor":
    """The tensor of that name as a view into `data`: no copy, dtype and shape of the header."""
    import torch

    entry = header.entries[name]
    dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
    if not entry.count:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=entry.count, offset=entry.begin)
    return flat.reshape(entry.shape)


def write(
    path: str | Path,
    tensors: "Mapping[str, torch.Tensor]",
    metadata: Mapping[str, str],
) -> None:
    """Write tensors and metadata to `path`, atomically. Raises CheckpointError, leaving what was.

    Tensors lie sorted by falling item size, so that each begins on a multiple of its own.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {}
    chunks: list[memoryview] = []
    digest, end = hashlib.sha256(), 0
    for name in order:
        dtype = _dtype_name(path, name, tensors[name])
        chunk = _raw(tensors[name])
        digest.update(chunk)
        chunks.append(chunk)
        begin, end = end, end + len(chunk)
        shape = list(tensors[name].shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    sums = {"payload_sha256": digest.hexdigest(), "header_sha256": _ZEROS}
    text = json.dumps({"__metadata__": {**metadata, **sums}, **table}, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise CheckpointError(
            f"Cannot write {path}: its metadata takes {len(raw):,} bytes, "
            f"keep it under {MAX_HEADER:,}."
        )
    length = len(raw).to_bytes(8, "little")
    own = hashlib.sha256(length + raw).hexdigest()
    blank = f'"header_sha256":"{_ZEROS}"'.encode()
    raw = raw.replace(blank, f'"header_sha256":"{own}"'.encode(), 1)
    try:
        write_atomic(path, [length, raw, *chunks])
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"Cannot write {path} ({why}): choose a place with room that you may write to."
        ) from error


def _raw(value: "torch.Tensor") -> memoryview:
    import torch

    if not value.numel():
        return memoryview(b"")
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _dtype_name(path: Path, name: str, value: "torch.Tensor") -> str:
    wanted = str(value.dtype).removeprefix("torch.")
    for dtype, torch_name in _TORCH_NAMES.items():
        if torch_name == wanted:
            return dtype
    raise CheckpointError(f"Cannot write {path}: tensor {name!r} is {wanted}, convert it first.")


def _open(path: Path) -> FileIO:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a folder: name a .safetensors file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file: name a .safetensors file.")
        return path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: check the path.") from error
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"Cannot read {path} ({why}): check the path.") from error


def _header(file: FileIO, path: Path) -> Header:
    # 1. The length: eight bytes, and as many bytes of header as it says.
    try:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{" or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise not_safetensors(path, head, size, length)
        file.seek(0)
        raw = file.read(8 + length)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path} ({reason(error)}): try again.") from error

    # 2. The JSON, its strings, and its own checksum.
    try:
        header = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, "its header is not readable") from error
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise damaged(path, "its metadata is not a table of strings")
    own = metadata.get("header_sha256")
    if own is None or "payload_sha256" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file without tinychat's checksums: "
            "name a file that tinychat wrote, such as rlhf.safetensors."
        )
    if not re.fullmatch("[0-9a-f]{64}", own):
        raise damaged(path, "the checksum of its header is none")
    digits = own.encode()
    blanked = raw.replace(digits, _ZEROS.encode())
    if raw.count(digits) != 1 or hashlib.sha256(blanked).hexdigest() != own:
        raise damaged(path, "the checksum of its header does not match")

    # 3. The table: each line sound, and together they fill the file without gap or overlap.
    entries = {name: _entry(path, name, line) for name, line in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            word = "overlaps the one before" if entry.begin < end else "leaves a gap before it"
            raise damaged(path, f"tensor {name!r} {word}")
        end = entry.end
    payload = size - 8 - length
    if payload != end:
        word = "truncated" if payload < end else "too long"
        raise damaged(path, f"{word}: {payload:,} bytes of tensors instead of {end:,}")
    return Header(path, entries, metadata, payload, size)


def _entry(path: Path, name: str, line: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = line["dtype"], line["shape"], line["data_offsets"]
        sound = (
            dtype in _ITEM_BYTES
            and isinstance(shape, list)
            and len(shape) <= 8
            and all(type(number) is int and number >= 0 for number in [*shape, begin, end])
            and end - begin == math.prod(shape) * _ITEM_BYTES[dtype]
            and begin % _ITEM_BYTES[dtype] == 0
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise damaged(path, f"tensor {name!r} has an impossible type, shape or place")
    return Entry(dtype, tuple(shape), begin, end)


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name twice")
    return table
