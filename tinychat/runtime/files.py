"""Files that are whole or absent: atomic writes, hashes, and big files in pieces."""

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinychat.runtime.errors import CheckpointError, ConfigError

_CHUNK = 1 << 20
_ABANDONED_SECONDS = 900.0


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write `chunks` to `path` so that at every moment the old file or the new one is there.

    The bytes go to a hidden file in the same folder, reach the disk (fsync), take the name
    (rename), and the folder reaches the disk too. Hidden files that killed writers of the same
    name left behind, untouched for a quarter of an hour, are removed. Raises OSError.
    """
    path = Path(os.path.realpath(path))  # a symbolic link keeps pointing, its target is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{_escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime >= _ABANDONED_SECONDS:
                old.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too: leave nothing half-written behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def check_target(path: Path) -> None:
    """Raise ConfigError, before long work, where `write_atomic` could not write; leave no trace.

    A device such as /dev/null would be replaced, and is refused.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; name a file.")
    there = next(one for one in Path(os.path.realpath(path)).parents if one.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written to {there} ({reason(error)}); "
            "name a file in a folder that you may write to."
        ) from None


def take_lock(file: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where another process has it.

    With `wait`, never False. Windows and file systems without locks go on without one.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: OSError) -> str:
    """Why the system refused, without errno and path: "Permission denied"."""
    return error.strerror or str(error) or type(error).__name__


def file_sha256(path: str | Path) -> str:
    """The hex sha256 of a file. Raises CheckpointError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"Cannot read {path} ({why}): check the path.") from error


def split(
    path: str | Path, piece_bytes: int = 16_000_000, folder: str | Path | None = None
) -> Path:
    """Cut a file into pieces beside it (or in `folder`), and return the manifest that joins them.

    NAME.parts.json names the whole file and its pieces NAME.part-1, NAME.part-2, ... with sizes
    and sha256. It is written last: a manifest means that every piece is complete.
    """
    path, piece_bytes = Path(path), int(piece_bytes)
    if piece_bytes < 1:
        raise CheckpointError(f"piece_bytes = {piece_bytes} cuts nothing: give 1 or more.")
    digest = file_sha256(path)
    size = path.stat().st_size
    folder = path.parent if folder is None else Path(folder)
    count = max(1, -(-size // piece_bytes))
    pieces = []
    try:
        with path.open("rb") as file:
            for number in range(1, count + 1):
                data = file.read(piece_bytes)
                piece = folder / f"{path.name}.part-{number:0{len(str(count))}d}"
                write_atomic(piece, [data])
                pieces.append(
                    {
                        "file": piece.name,
                        "bytes": len(data),
                        "sha256": hashlib.sha256(data).hexdigest(),
                    }
                )
        whole = {"file": path.name, "bytes": size, "sha256": digest, "pieces": pieces}
        manifest = folder / f"{path.name}.parts.json"
        write_atomic(manifest, [(json.dumps(whole, indent=1) + "\n").encode()])
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the pieces of {path} to {folder} ({reason(error)}): "
            "choose a folder with room that you may write to."
        ) from error
    return manifest


def join(manifest: str | Path, path: str | Path | None = None) -> Path:
    """Put the pieces of a manifest together again, and return the file (default: beside it).

    Every piece and the whole are checked by size and sha256 before the file takes its name.
    Raises CheckpointError and writes nothing where one is missing or differs.
    """
    manifest = Path(manifest)
    whole = _read_manifest(manifest)
    target = manifest.parent / whole["file"] if path is None else Path(path)
    try:
        write_atomic(target, _checked_pieces(manifest, whole))
    except OSError as error:
        raise CheckpointError(
            f"Cannot join {manifest} into {target} ({reason(error)}): "
            "choose a folder with room that you may write to."
        ) from error
    return target


def _checked_pieces(manifest: Path, whole: dict[str, Any]) -> Iterator[bytes]:
    total, size = hashlib.sha256(), 0
    for piece in whole["pieces"]:
        source = manifest.parent / piece["file"]
        digest, length = hashlib.sha256(), 0
        try:
            with source.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    total.update(chunk)
                    length += len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(
                f"Cannot read {source} ({reason(error)}), a piece that {manifest.name} names: "
                "fetch it again."
            ) from error
        if (length, digest.hexdigest()) != (piece["bytes"], piece["sha256"]):
            raise CheckpointError(
                f"{source} differs from what {manifest.name} says: fetch this piece again."
            )
        size += length
    if (size, total.hexdigest()) != (whole["bytes"], whole["sha256"]):
        raise CheckpointError(
            f"The pieces of {manifest} do not make the file it describes: "
            "fetch the manifest and its pieces again."
        )


def _read_manifest(manifest: Path) -> dict[str, Any]:
    try:
        whole = json.loads(manifest.read_bytes().decode("utf-8"))
        parts = [whole, *whole["pieces"]]
        sound = all(
            isinstance(part["file"], str)
            and part["file"] not in ("", ".", "..")
            and not any(mark in part["file"] for mark in "/\\:\0")  # never out of the folder
            and type(part["bytes"]) is int
            and isinstance(part["sha256"], str)
            for part in parts
        )
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {manifest} ({reason(error)}): name the .parts.json file of a split."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{manifest} is not a list of pieces: name the .parts.json file that split() wrote."
        )
    return whole


def _escape(name: str) -> str:
    """`name` for glob, taken literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
