"""Find a checkpoint by name."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinychat.runtime.errors import CheckpointError

RUNS = Path("runs")  # where `tinychat train` leaves what it makes
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


def installed() -> list[tuple[str, Path]]:
    """(name, file) of each checkpoint in `search_folders`, in their order: the first one counts."""
    return [(file.stem, file) for folder in search_folders() for file in _checkpoints(folder)]


def find(name: str | Path) -> Path:
    """The checkpoint that `name` means: a path, a name (`rlhf`) in one of `search_folders`, a run.

    `.safetensors` may be left out. A folder, and a run below `runs/`, stands for the checkpoint in
    it where there is one only. Raises CheckpointError that names the nearest and lists what is
    there.
    """
    given = os.fspath(name)
    if not given.strip() or "\0" in given:
        raise CheckpointError(f"{given!r} names no checkpoint: {_offer('')}.")
    path = Path(os.path.expanduser(given))  # unlike Path.expanduser, leaves an unknown ~name
    if found := _look_up(path):
        return found
    if folder := _folder_of(path):
        inside = _named(folder)
        listed = ", ".join(os.path.join(given, one) for one in inside)
        if (folder / "run.json").is_file() and not inside:
            advice = "its training isn't finished; --resume goes on with it"
        else:
            advice = f"name one in it: {listed}" if listed else "it holds no checkpoint"
        raise CheckpointError(f"{given!r} is a folder: {advice}.")
    raise CheckpointError(f"No checkpoint {given!r}: {_offer(path.name)}.")


def _look_up(path: Path) -> Path | None:
    """The file that `path` means, or the only checkpoint of the folder that it means."""
    if file := _file_of(path):
        return file
    folder = _folder_of(path)
    inside = list(_named(folder).values()) if folder else []
    return inside[0] if len(inside) == 1 else None


def _file_of(path: Path) -> Path | None:
    return next(filter(_is_file, _candidates(path)), None)


def _folder_of(path: Path) -> Path | None:
    """The folder that `path` means: itself, or a run; one with checkpoints before one without."""
    plain = not path.is_absolute() and ".." not in path.parts and path.parts
    places = [at for at in ((path, RUNS / path) if plain else (path,)) if os.path.isdir(at)]
    return next(filter(_named, places), None) or next(iter(places), None)


def _candidates(path: Path) -> Iterator[Path]:
    """Where `path` may be; the folders are asked for only when it isn't where it says."""
    yield from (path, Path(f"{path}{_SUFFIX}"))
    if not path.is_absolute():
        for folder in (*search_folders(), RUNS):
            yield from (folder / path, folder / f"{path}{_SUFFIX}")


def runs() -> dict[str, Path]:
    """The checkpoints below `runs/` by the shortest names that `find` takes: `n1`, `all/sft`.

    `runs/n1` where `n1` is another checkpoint.
    """
    found: dict[str, Path] = {}
    for folder in _folders(RUNS):
        inside = _named(folder)
        for name, file in inside.items():
            short = folder.name if len(inside) == 1 else f"{folder.name}/{name}"
            means = _look_up(Path(os.path.expanduser(short)))
            found[short if means == file else f"{RUNS}/{short}"] = file
    return found


def _named(folder: Path) -> dict[str, Path]:
    """A folder's checkpoints by name; those of the folders in it where it has none itself."""
    if files := _checkpoints(folder):
        return {file.stem: file for file in files}
    found: dict[str, Path] = {}
    inner_folders = _folders(folder) if RUNS.resolve() in folder.resolve().parents else []
    for inner in inner_folders:  # the stages of `train all`
        files = _checkpoints(inner)
        alone = len(files) == 1
        found |= {inner.name if alone else f"{inner.name}/{f.stem}": f for f in files}
    return found


def find_first(*names: str) -> Path | None:
    """The first of these that lies in one of `search_folders`, or here; None where none does.

    A run that happens to have such a name is not meant.
    """
    return next(filter(None, (_file_of(Path(name)) for name in names)), None)


def labels_of(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """What to call checkpoints: their files' names, a run by its own, paths where two are alike."""
    short = [
        path.stem if Path(name).stem == path.stem else name
        for name, path in zip(names, paths, strict=True)
    ]
    return [
        label if short.count(label) == 1 else str(path)
        for label, path in zip(short, paths, strict=True)
    ]


def _offer(name: str) -> str:
    """What there is instead, the nearest first."""
    there = runs() | dict(reversed(installed()))
    if not there:
        return "none is installed, make one with `tinychat train base` or name a .safetensors file"
    listed = "there is " + ", ".join(f"{stem} ({there[stem].parent})" for stem in sorted(there))
    near = difflib.get_close_matches(name.removesuffix(_SUFFIX), there, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? {listed}".replace("? there", "? There") if near else listed


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints right in a folder; a training's `state-*` files are none."""
    names = (file for file in _entries(folder) if file.suffix == _SUFFIX)
    return [file for file in names if not file.name.startswith("state-") and _is_file(file)]


def _folders(folder: Path) -> list[Path]:
    return [inner for inner in _entries(folder) if os.path.isdir(inner)]


def _entries(folder: Path) -> list[Path]:
    """What a folder shows, sorted; nothing where it can't be read."""
    try:
        return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError:
        return []


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # unlike Path.is_file, False for names the system refuses
