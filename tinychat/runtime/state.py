"""Training state: what a run needs to go on to the very same numbers after it was killed.

One file a save, `state-00001200.safetensors`, with the tensors bit for bit and the scalars as
JSON in its metadata; nothing is pickled. The newest and the one before it are kept.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.runtime import tensorfile
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.runtime.files import reason, take_lock

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"state-(\d{8,18})\.safetensors")
_KEY = "tinychat-state"
_locked: dict[tuple[int, int], int] = {}  # folder as (device, inode): its open handle


def save_state(
    folder: str | Path, tensors: "Mapping[str, torch.Tensor]", scalars: Mapping[str, Any]
) -> Path:
    """Save a training state into `folder`, and return its file.

    `scalars["step"]` (an int) names the file. Floats come back exactly, NaN and infinity too;
    tuples come back as lists. Older states but one, and states of later steps (which an earlier
    attempt left), are removed once the new one is on the disk. One process saves at a time.
    Raises CheckpointError where it cannot be written; what was there stays.
    """
    folder = Path(folder)
    step = scalars.get("step")
    if type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(
            f"Cannot save a training state in {folder}: its step is {step!r}, give a whole number."
        )
    if not all(name and name != "__metadata__" for name in tensors):
        raise CheckpointError(f"Cannot save a training state in {folder}: a tensor has no name.")
    try:
        text = json.dumps(dict(scalars))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot save a training state in {folder}: its scalars do not fit JSON ({error}), "
            "give arrays as tensors."
        ) from error
    for leftover in folder.glob(".state-*.safetensors.*.tmp"):  # of writers that were killed
        leftover.unlink(missing_ok=True)
    path = folder / f"state-{step:08d}.safetensors"
    tensorfile.write(path, tensors, {_KEY: text})
    there = _steps(folder)
    previous = next((number for number in there if number < step), step)
    for number, file in there.items():
        if number not in (step, previous):
            file.unlink(missing_ok=True)
    return path


def lock_run(folder: str | Path) -> None:
    """Keep a run's folder for this process, until the process ends, be it by SIGKILL.

    The lock is on the folder itself, so that nothing is left behind. Raises ConfigError where
    another process has it: two would throw each other's states away.
    """
    if os.name == "nt":  # which can't open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    found = os.fstat(handle)
    place = found.st_dev, found.st_ino
    if place in _locked:
        os.close(handle)
        return
    if not take_lock(handle):
        os.close(handle)
        raise ConfigError(
            f"Another tinychat is training in {folder}; wait until it ends, or stop it first."
        )
    _locked[place] = handle


def load_state(folder: str | Path) -> "tuple[dict[str, torch.Tensor], dict[str, Any]] | None":
    """The newest state in `folder` that is whole, as (tensors on the CPU, scalars).

    None where there is none. A damaged newest falls back, with a warning in the log, to the one
    before it. Raises CheckpointError where states are there but all are damaged: a run that
    was to be resumed must not silently start again.
    """
    problem: CheckpointError | None = None
    for file in _steps(Path(folder)).values():
        try:
            header, data = tensorfile.read(file)
            scalars = _scalars(header)
            tensors = {name: tensorfile.tensor(header, data, name) for name in header.entries}
        except CheckpointError as error:
            problem = problem or error
            continue
        if problem:
            logging.getLogger("tinychat").warning("%s Resuming from %s.", problem, file.name)
        return tensors, scalars
    if problem:
        raise problem
    return None


def _steps(folder: Path) -> dict[int, Path]:
    """The states of a folder by step, newest first."""
    try:
        files = list(folder.iterdir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(
            f"Cannot read training states from {folder} ({reason(error)}): name a run's folder."
        ) from error
    found = {int(match[1]): file for file in files if (match := _NAME.fullmatch(file.name))}
    return dict(sorted(found.items(), reverse=True))


def _scalars(header: tensorfile.Header) -> dict[str, Any]:
    try:
        scalars = json.loads(header.metadata[_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise tensorfile.damaged(header.path, "it holds no training state") from error
    if not isinstance(scalars, dict):
        raise tensorfile.damaged(header.path, "it holds no training state")
    return scalars
