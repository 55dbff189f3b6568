"""Metrics of a run: one JSON object a line, so that a killed run loses at most its last line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tinychat.runtime.errors import DataError


class MetricsWriter:
    """Append rows to a JSONL file, each on disk's doorstep (flushed) when `write` returns.

    `resume_step`: drop the rows of later steps first. A run that was killed after its last saved
    state computes those steps again, and each must appear once.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._repair(resume_step)
            self._file: TextIO = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise DataError(
                f"Cannot write metrics to {self.path} ({error.strerror}): "
                "choose a folder that you may write to."
            ) from error

    def _repair(self, resume_step: int | None) -> None:
        """Remove lines that a crash tore, and the rows after `resume_step`."""
        data = self.path.read_bytes()
        lines = [line for line in data.split(b"\n") if _row(line) is not None]
        if resume_step is not None:
            lines = [line for line in lines if not _after(_row(line), resume_step)]
        kept = b"".join(line + b"\n" for line in lines)
        if kept != data:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_bytes(kept)
            os.replace(temporary, self.path)

    def write(self, row: Mapping[str, Any] | None = None, /, **values: Any) -> None:
        """Append one row. NaN and infinity become null, which every JSON reader accepts."""
        merged = {**(row or {}), **values}
        self._file.write(json.dumps(_plain(merged), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, in order. A torn last line is left out.

    Raises DataError where the file cannot be read or a line within it is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"Cannot read metrics from {path} ({error.strerror}): "
            "name the metrics.jsonl of a run, such as runs/base/metrics.jsonl."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):  # what follows the last newline may be torn
            raise DataError(
                f"Line {number} of {path} is not a JSON object: "
                "remove the line, or name a file that tinychat wrote."
            )
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _after(row: dict[str, Any] | None, step: int) -> bool:
    at = (row or {}).get("step")
    return isinstance(at, int | float) and at > step


def _plain(value: Any) -> Any:
    """`value` as JSON types: numpy and torch scalars become numbers, non-finite ones None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)
