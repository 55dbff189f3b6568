"""How a training run begins: its folder, settings and data."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tinychat.runtime.errors import ConfigError
from tinychat.runtime.search import RUNS

if TYPE_CHECKING:
    from tinychat.data.shards import TokenShard
    from tinychat.tokenizer import Tokenizer

C = TypeVar("C")
COMPILING = 5.0  # minutes of training from which on compiling pays: it takes one to two


def check_minutes(minutes: float | None, resume: bool) -> None:
    """Refuse a budget that can't work; a resumed run may keep the one it had."""
    if minutes is None:
        if not resume:
            raise ConfigError("How long? Give a budget, for instance --minutes 10.")
    elif not 0 < minutes < 1e6:
        raise ConfigError(f"--minutes is {minutes:g}; give a number above 0, for instance 10.")


def override(config: C, settings: Iterable[str]) -> C:
    """Return the config with `key=value` texts applied, each parsed as the type of its field."""
    kinds = {field.name: type(getattr(config, field.name)) for field in fields(config)}  # type: ignore[arg-type]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}."
            raise ConfigError(f"--set {setting} names no setting; {hint}")
        try:
            if kinds[key] is bool:
                parsed: Any = {"true": True, "false": False}[value.lower()]
            else:
                parsed = kinds[key](value)
            if kinds[key] is float and not math.isfinite(parsed):
                raise ValueError
        except (ValueError, KeyError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}
            raise ConfigError(
                f"--set {setting}: {value!r} won't do; {key} must be {wanted[kinds[key]]}."
            ) from None
        config = replace(config, **{key: parsed})  # type: ignore[type-var]
    return config


def check_sequence(sequence: int, context: int) -> None:
    """Refuse rows that are longer than the model reads."""
    if sequence > context:
        raise ConfigError(f"sequence is {sequence}; this model reads at most {context} tokens.")


def run_folder(name: str, resume: bool) -> Path:
    """Return `runs/NAME`; ConfigError for a name that leads elsewhere, or a folder in use.

    NAME/STAGE is a stage of `train all`.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ConfigError(
            f"--run {name!r} can't name a folder in runs; use letters, digits, '-', '_' and '.'."
        )
    folder = RUNS / name
    if not resume and folder.exists() and (not folder.is_dir() or _in_use(folder)):
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    return folder


def _in_use(folder: Path) -> bool:
    """True if a folder holds more than the hidden files of writers that were killed."""
    return any(not file.name.startswith(".") for file in folder.iterdir())


def read_record(folder: Path, needed: str) -> dict[str, Any]:
    """Return what a run was started with; ConfigError where there is none of this kind."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if isinstance(record.get(needed), str):
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(
        f"There is no run to resume in {folder}; start one without --resume, "
        "or name another with --run."
    )


def check_as_begun(folder: Path, options: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse options of a resumed run that say something else than when it began.

    Each as (now, then), now None where it was left out: the run goes on as it began.
    """

    def told(name: str, value: Any) -> str:
        if value is None or value is False or value == []:
            return f"without {name}"
        values = value if isinstance(value, list) else [value]
        return "with " + " ".join(name if one is True else f"{name} {one}" for one in values)

    def plain(value: Any) -> Any:
        """The same for two ways to write a path."""
        if isinstance(value, list):
            return [plain(one) for one in value]
        return Path(value).resolve() if isinstance(value, str) else value

    for name, (now, then) in options.items():
        if now is not None and plain(now) != plain(then):
            raise ConfigError(
                f"{folder} was begun {told(name, then)}; "
                f"leave {told(name, now).removeprefix('with ')} out, "
                "or start another run with --run NAME."
            )


def data_as_begun(folder: Path, record: Mapping[str, Any], data: Path | None) -> Path | None:
    """The data folder that a run began with; one that has been moved since may be named anew."""
    then = record.get("data")
    if data is not None and then is not None and not Path(then).is_dir():
        return data
    given = str(data) if data is not None else None
    check_as_begun(folder, {"--data (or TINYCHAT_DATA)": (given, then)})
    return Path(then) if then is not None else None


def budget_of(record: Mapping[str, Any], folder: Path) -> float | None:
    """Minutes of a run that was stopped before its number of steps was known, else None.

    Once a state is saved, it knows the number of steps that the first minutes gave.
    """
    return None if any(folder.glob("state-*.safetensors")) else record.get("minutes")


def is_written(path: Path) -> bool:
    """True if the last thing that a run did was to write its checkpoint."""
    states = [state.stat().st_mtime for state in path.parent.glob("state-*.safetensors")]
    return path.exists() and path.stat().st_mtime >= max(states, default=0.0)


def is_finished(path: Path, minutes: float | None, settings: list[str] | None, longer: str) -> bool:
    """True, and said, where a run that is to be resumed has nothing left to do."""
    if minutes is not None or settings or not is_written(path):
        return False
    print(f"{path} is finished already; give {longer} to train it longer.")
    return True


def first_run(folder: Path) -> bool:
    """True where no run has begun; one that was killed while it began leaves nothing to keep."""
    record = folder / "run.json"
    try:
        json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except ValueError:
        if any(folder.glob("state-*.safetensors")):
            return False
        record.unlink()
        return True
    return False


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Remember what a new run was started with; two that start at once can't share a folder.

    The record is whole or absent: half of one could be neither resumed nor begun anew. This
    process keeps the folder for itself until it ends.
    """
    from tinychat.runtime.files import write_atomic
    from tinychat.runtime.state import lock_run

    folder.mkdir(parents=True, exist_ok=True)
    lock_run(folder)
    path, trial = folder / "run.json", folder / f".run.json.{secrets.token_hex(6)}"
    try:
        write_atomic(trial, [_text_of(record)])
        try:
            os.link(trial, path)  # unlike a rename, it takes no name that is taken
        except OSError:  # taken, or a file system without links
            with path.open("xb") as file:
                file.write(_text_of(record))
    except FileExistsError:
        raise ConfigError(
            f"{folder} already holds a run; choose another name with --run."
        ) from None
    finally:
        trial.unlink(missing_ok=True)


def update_record(folder: Path, record: Mapping[str, Any], **now: Any) -> None:
    """Remember what a resumed run goes on with `now`, so that the next one does too.

    None leaves a value as it was. This process keeps the folder for itself until it ends.
    """
    from tinychat.runtime.files import write_atomic
    from tinychat.runtime.state import lock_run

    lock_run(folder)
    new = dict(record) | {name: value for name, value in now.items() if value is not None}
    if new != record:
        write_atomic(folder / "run.json", [_text_of(new)])


def _text_of(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def settings_of(
    record: Mapping[str, Any],
    new: list[str] | None,
    minutes: float | None,
    length: Collection[str] = ("steps", "epochs"),
) -> list[str]:
    """The run's own settings, then the new ones; new minutes undo those that tell its length."""
    old = [
        setting
        for setting in record.get("set", [])
        if minutes is None or setting.partition("=")[0] not in length
    ]
    return [*old, *(new or [])]


def without_compiling(minutes: float | None, chosen: list[str]) -> list[str]:
    """The settings of a short run: it goes without compiling, unless it is told otherwise."""
    return ["compiled=false", *chosen] if minutes and minutes < COMPILING else chosen


def find_checkpoint(name: str) -> Path:
    from tinychat.runtime.checkpoint import find

    return find(name)


def cache_folder(pieces: Tokenizer) -> Path:
    """Where token shards of this tokenizer are kept."""
    root = os.environ.get("TINYCHAT_CACHE")
    if not root:
        from platformdirs import user_cache_dir

        root = user_cache_dir("tinychat")
    return Path(root) / "shards" / pieces.sha256[:12]


def make_shards(
    public: Path | None,
    pieces: Tokenizer,
    names: list[str],
    own_files: Mapping[str, str],
    report: Callable[[Any], None],
) -> dict[str, dict[str, TokenShard]]:
    """Return token shards `[split][source]`, in the order of `names`.

    Public files never change. Our corpus changes with the version and a user's file at any time,
    so their shards lie in folders that are named after their contents.
    """
    from importlib.resources import files

    from tinychat.data.prepare import EMBEDDED, SPLITS, prepare, shard_name

    cache = cache_folder(pieces)
    corpus = sorted(files("tinychat.data").joinpath("corpus").iterdir(), key=lambda f: f.name)
    texts = [file.read_bytes() for file in corpus if file.name.endswith(".jsonl")]
    version = hashlib.sha256(b"".join(texts)).hexdigest()
    parts: dict[Path, list[str]] = {}
    for name in names:
        digest = version if name in EMBEDDED else own_files.get(name)
        place = cache / f"of-{digest[:16]}" if digest else cache
        parts.setdefault(place, []).append(name)
    labels = [shard_name(name) for name in names]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"Two sources have the name {doubled.pop()}; rename a file.")
    made: dict[str, dict[str, TokenShard]] = {split: {} for split in SPLITS}
    for place, some in parts.items():
        for split, shards in prepare(public, place, pieces, some, progress=report).items():
            made[split] |= shards
    return {
        split: {label: shards[label] for label in labels if label in shards}
        for split, shards in made.items()
    }


def make_mix(
    train: Mapping[str, TokenShard],
    sequence: int,
    seed: int,
    total: int,
    read: Mapping[str, float] | None = None,
) -> Any:
    """The recipe's mix for a run of `total` sequences: a main phase and a final one.

    `read`: the tokens by source that the weights have met before this run.
    """
    from tinychat.data.mix import Mix, Phase
    from tinychat.data.recipe import FINAL, shares

    sizes = {name: shard.tokens for name, shard in train.items()}
    tokens = float(total * sequence)
    phases = [
        Phase(1 - FINAL, shares(sizes, tokens, final=False, read=read)),
        Phase(1.0, shares(sizes, tokens, final=True, read=read)),
    ]
    return Mix(train, phases, sequence=sequence, seed=seed, total=total, read=read)


def check_unchanged(path: str, now: str, begun_with: str) -> None:
    """Raise ConfigError where a file's sha256 is another than when the run began."""
    if now != begun_with:
        raise ConfigError(
            f"{path} has changed since this run began; "
            "put the old file back, or start another run with --run NAME."
        )
