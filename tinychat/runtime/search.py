"""Find a checkpoint by name."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from tinychat.runtime.errors import CheckpointError

_SUFFIX = ".safetensors"


def search_folders() -> list[Path]:
    """Where a bare name is looked for, in order: here, the user's data folder, the package."""
    from platformdirs import user_data_dir

    package = Path(__file__).resolve().parents[1]
    folders = [
        Path("checkpoints"),
        Path(user_data_dir("tinychat")) / "checkpoints",
        package / "checkpoints",
    ]
    if (package.parent / "pyproject.toml").is_file():  # a clone, run from another folder
        folders.append(package.parent / "checkpoints")
    return folders


def find(name: str | Path) -> Path:
    """The checkpoint that `name` means: a path, or a name (`rlhf`) in one of `search_folders`.

    `.safetensors` may be left out. Raises CheckpointError that names the nearest and lists what
    is there.
    """
    given = os.fspath(name)
    if not given.strip() or "\0" in given:
        raise CheckpointError(f"{given!r} names no checkpoint: {_offer('')}.")
    path = Path(os.path.expanduser(given))  # unlike Path.expanduser, leaves an unknown ~name
    for candidate in _candidates(path):
        if _is_file(candidate):
            return candidate
    if os.path.isdir(path):
        inside = sorted(file.name for file in _checkpoints(path))
        advice = f"name one in it: {', '.join(inside)}" if inside else "it holds no checkpoint"
        raise CheckpointError(f"{given!r} is a folder: {advice}.")
    raise CheckpointError(f"No checkpoint {given!r}: {_offer(path.name)}.")


def _candidates(path: Path) -> Iterator[Path]:
    """Where `path` may be; the folders are asked for only when it isn't where it says."""
    yield from (path, Path(f"{path}{_SUFFIX}"))
    if not path.is_absolute():
        for folder in search_folders():
            yield from (folder / path, folder / f"{path}{_SUFFIX}")


def find_first(*names: str) -> Path | None:
    """The first of these checkpoints that is there, as `find` finds them; None where none is."""
    for name in names:
        try:
            return find(name)
        except CheckpointError:
            continue
    return None


def _offer(name: str) -> str:
    """What there is instead, the nearest first."""
    there: dict[str, Path] = {}
    for folder in search_folders():
        for file in _checkpoints(folder):
            there.setdefault(file.stem, file)
    if not there:
        return "none is installed, make one with `tinychat train base` or name a .safetensors file"
    listed = "there is " + ", ".join(f"{stem} ({there[stem].parent})" for stem in sorted(there))
    near = difflib.get_close_matches(name.removesuffix(_SUFFIX), there, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? {listed}".replace("? there", "? There") if near else listed


def _checkpoints(folder: Path) -> list[Path]:
    try:
        files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    except OSError:
        return []
    return sorted(file for file in files if file.suffix == _SUFFIX and _is_file(file))


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # unlike Path.is_file, False for names the system refuses
