"""Checkpoints: one self-describing safetensors file a stage, that any machine can check and load.

Inside: the weights, the tokenizer model as bytes (tensor `tokenizer.model`, uint8), and under the
metadata key `tinychat` one JSON text with format, stage, config, chat template, lineage and
metrics. `int8` files hold each matrix as `name` (int8) and `name.scale` (float32, [rows, 1]),
symmetric, so that weight = int8 x scale; vectors stay float32. torch is imported only to load
or save.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinychat.runtime import tensorfile
from tinychat.runtime.errors import CheckpointError
from tinychat.runtime.files import file_sha256, join, split
from tinychat.runtime.search import find, search_folders
from tinychat.runtime.tensorfile import Header, damaged

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT",
    "STAGES",
    "Checkpoint",
    "CheckpointInfo",
    "file_sha256",
    "find",
    "join",
    "load",
    "read_info",
    "save",
    "search_folders",
    "split",
]

FORMAT = 1
STAGES = ("base", "sft", "reward", "rlhf")
_TOKENIZER = "tokenizer.model"
_MATRIX_DTYPE = {"int8": "I8", "bf16": "BF16", "fp32": "F32"}
_COUNTS = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "hidden", "context")
_NUMBERS = ("rope_theta", "norm_eps")
_LARGEST = 3.4028234663852886e38  # float32


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself, from its header alone."""

    path: Path
    stage: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    metrics: dict[str, Any]
    tokenizer_sha256: str
    parameters: int
    "numbers in the weights, the scales of int8 not counted"
    bytes: int
    "size of the file"
    dtype: str
    "how matrices are stored: int8, bf16 or fp32"
    format: int
    chat_template: str


@dataclass(frozen=True)
class Checkpoint:
    """A loaded file: `state` maps names to float32 tensors that share no memory with it."""

    info: CheckpointInfo
    state: "dict[str, torch.Tensor]"
    tokenizer: bytes


def read_info(path: str | Path) -> CheckpointInfo:
    """Read the header alone, in a millisecond and without torch. Raises CheckpointError."""
    return _info(tensorfile.read_header(path))


def load(path: str | Path) -> Checkpoint:
    """Load a checkpoint after checking all of it. Raises CheckpointError with one sentence.

    Names and shapes are compared with the model's by `tinychat.gpt.load_model`.
    """
    import torch

    header, data = tensorfile.read(path)
    info = _info(header)
    place = header.entries[_TOKENIZER]
    tokenizer = bytes(memoryview(data)[place.begin : place.end])
    if hashlib.sha256(tokenizer).hexdigest() != info.tokenizer_sha256:
        raise damaged(header.path, "its tokenizer is not the one that its metadata names")

    stored = {name: tensorfile.tensor(header, data, name) for name in header.entries}
    # All checks come before the first weight is allocated: int8 x scale is finite for every int8
    # exactly when 128 x scale is.
    for name, values in stored.items():
        if values.is_floating_point():
            low, high = (float(end) for end in values.aminmax())
            bound = _LARGEST / 128 if _scaled(header, name) else _LARGEST
            if not (-bound <= low and high <= bound):
                raise damaged(header.path, f"{name!r} holds values that are not finite")

    state = {}
    for name, values in stored.items():
        if name == _TOKENIZER or _scaled(header, name):
            continue
        if values.dtype == torch.int8:
            state[name] = values.to(torch.float32).mul_(stored[f"{name}.scale"])
        else:
            state[name] = values.to(torch.float32, copy=True)
    return Checkpoint(info, state, tokenizer)


def save(
    path: str | Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    state: "Mapping[str, torch.Tensor]",
    tokenizer: bytes,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    chat_template: str = "tinychat-1",
    quantize: Literal["int8", "bf16", "fp32"] = "int8",
    levels: int = 127,
) -> CheckpointInfo:
    """Write a checkpoint atomically, and return what its header says.

    `levels`: the int8 number of each row's largest weight, up to 127. Weights that came out of
    an int8 file and were then moved by less than half a step would be rounded back to where they
    began; another number of levels puts them elsewhere on the grid, so that the moves survive.
    Raises CheckpointError before anything is written where the input would make a file that
    `load` refuses, and leaves the old file where writing fails.
    """
    path = Path(path)
    refuse = f"Cannot write {path}: "
    if quantize not in _MATRIX_DTYPE:
        raise CheckpointError(f"{refuse}quantize = {quantize!r}, choose int8, bf16 or fp32.")
    if not 1 <= levels <= 127:
        raise CheckpointError(f"{refuse}levels = {levels}, int8 has 1 to 127 on each side.")
    if os.path.isdir(path):  # unlike Path.is_dir, False for names the system refuses
        raise CheckpointError(f"{path} is a folder: name a .safetensors file in it.")
    record = {
        "format": FORMAT,
        "stage": stage,
        "config": dict(config),
        "chat_template": chat_template,
        "dtype": quantize,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "lineage": dict(lineage),
        "metrics": dict(metrics),
    }
    if problem := _problem(record):
        raise CheckpointError(f"{refuse}{problem}.")
    if not tokenizer:
        raise CheckpointError(f"{refuse}the tokenizer has no bytes, give a trained model.")
    try:
        text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{refuse}its config, lineage or metrics do not fit JSON ({error}), "
            "use finite numbers, strings, lists and dicts."
        ) from error
    tensors = _stored(refuse, state, quantize, levels)
    tensors[_TOKENIZER] = _bytes_tensor(tokenizer)
    tensorfile.write(path, tensors, {"tinychat": text})
    return read_info(path)


def _stored(
    refuse: str, state: "Mapping[str, torch.Tensor]", quantize: str, levels: int
) -> "dict[str, torch.Tensor]":
    """The tensors as the file holds them. Raises CheckpointError for what cannot be stored."""
    import torch

    if not state:
        raise CheckpointError(f"{refuse}there are no weights in it, give the model's state.")
    tensors: dict[str, torch.Tensor] = {}
    for name, given in state.items():
        if name in (_TOKENIZER, "__metadata__", "") or name in tensors:
            raise CheckpointError(f"{refuse}the name {name!r} is taken, rename this tensor.")
        if not given.is_floating_point() or not given.numel() or given.ndim > 8:
            raise CheckpointError(
                f"{refuse}{name!r} is {str(given.dtype).removeprefix('torch.')} of shape "
                f"{list(given.shape)}, weights are non-empty floats."
            )
        values = given.detach().to("cpu", torch.float32)
        if quantize == "bf16" and values.ndim == 2:
            values = values.to(torch.bfloat16)
        # The last int8 step is 128 scales: a hair more than the largest weight must be finite too.
        largest = _LARGEST * 127 / 129 if quantize == "int8" and values.ndim == 2 else _LARGEST
        if not float(values.abs().max()) <= largest:  # not (a <= b): NaN fails it too
            raise CheckpointError(
                f"{refuse}{name!r} holds values that are not finite, the training diverged: "
                "go back to an earlier state or lower the learning rate."
            )
        if quantize == "int8" and values.ndim == 2:
            scale_name = f"{name}.scale"
            if scale_name in state:
                raise CheckpointError(
                    f"{refuse}the name {scale_name!r} is taken, rename this tensor."
                )
            values, tensors[scale_name] = _quantize_rows(values, levels)
        tensors[name] = values
    return tensors


def _quantize_rows(weights: "torch.Tensor", levels: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """float32 [rows, columns] -> int8 [rows, columns] and float32 scales [rows, 1].

    Off by at most half a scale. A row of zeros has scale 0 and stays zero.
    """
    import torch

    scale = weights.abs().amax(dim=1, keepdim=True) / levels
    # Rows so small that their scale is rounded (or vanishes) would leave the range of int8.
    steps = (weights / torch.where(scale > 0, scale, 1.0)).round_().clamp_(-127, 127)
    return steps.to(torch.int8), scale


def _bytes_tensor(data: bytes) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _scaled(header: Header, name: str) -> bool:
    """Whether `name` holds the scales of an int8 matrix."""
    owner = header.entries.get(name.removesuffix(".scale"))
    return name.endswith(".scale") and owner is not None and owner.dtype == "I8"


def _info(header: Header) -> CheckpointInfo:
    path = header.path
    try:
        record = json.loads(header.metadata["tinychat"])
        number = record["format"]
    except KeyError as error:
        raise CheckpointError(
            f"{path} holds no tinychat checkpoint: name one, such as rlhf.safetensors."
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(path, "its description is not readable") from error
    if type(number) is not int or number < 1:
        raise damaged(path, f"its format is {number!r}")
    if number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, newer than the {FORMAT} that this tinychat reads: "
            "upgrade tinychat."
        )
    if problem := _problem(record):
        raise damaged(path, problem)

    parameters = 0
    for name, entry in header.entries.items():
        if name == _TOKENIZER or _scaled(header, name):
            continue
        expected = _MATRIX_DTYPE[record["dtype"]] if len(entry.shape) == 2 else "F32"
        if entry.dtype != expected or not entry.count:
            raise damaged(path, f"{name!r} is {entry.dtype} {list(entry.shape)}, not {expected}")
        if entry.dtype == "I8":
            scale = header.entries.get(f"{name}.scale")
            if scale is None or (scale.dtype, scale.shape) != ("F32", (entry.shape[0], 1)):
                raise damaged(path, f"the scales of {name!r} are missing or misshapen")
        parameters += entry.count
    tokenizer = header.entries.get(_TOKENIZER)
    if tokenizer is None or tokenizer.dtype != "U8" or len(tokenizer.shape) != 1:
        raise damaged(path, "its tokenizer is missing")
    if not parameters:
        raise damaged(path, "there are no weights in it")
    return CheckpointInfo(
        path=path,
        stage=record["stage"],
        config=record["config"],
        lineage=record["lineage"],
        metrics=record["metrics"],
        tokenizer_sha256=record["tokenizer_sha256"],
        parameters=parameters,
        bytes=header.bytes,
        dtype=record["dtype"],
        format=number,
        chat_template=record["chat_template"],
    )


def _problem(record: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's description, or None; the same for save and load."""
    for key in ("config", "lineage", "metrics"):
        if not isinstance(record.get(key), dict):
            return f"its {key} is not a table"
    for key in ("stage", "chat_template", "dtype", "tokenizer_sha256"):
        if not isinstance(record.get(key), str):
            return f"its {key} is missing"
    if record["stage"] not in STAGES:
        return f"its stage is {record['stage']!r}, not one of {', '.join(STAGES)}"
    if record["dtype"] not in _MATRIX_DTYPE:
        return f"its dtype is {record['dtype']!r}, not int8, bf16 or fp32"
    config = record["config"]
    for key in (*_COUNTS, *_NUMBERS):
        if key not in config:
            return f"its config lacks {key!r}"
        value = config[key]
        number = type(value) is int or (key in _NUMBERS and type(value) is float)
        if not number or not 0 < value < math.inf:
            return f"its config says {key} = {value!r}"
    return None
