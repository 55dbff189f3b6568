"""Curves of PPO runs for the site: the mark against the KL, from the metrics that a run wrote.

`python -m tinychat.book curve METRICS` makes the small files in chapters/assets/curves, which the
PPO playground draws.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinychat.book.chapter import BookError
from tinychat.runtime.errors import DataError
from tinychat.runtime.metrics import read_metrics

FOLDER = Path("chapters/assets/curves")
# What is kept of a run's metrics, and to how many decimals: finer than a page can show.
COLUMNS = {
    "step": 0,
    "score": 3,
    "kl": 3,
    "length": 1,
    "repetition": 4,
    "distinct_2": 3,
    "entropy": 3,
    "clip_fraction": 5,
    "beta": 4,
}
JUDGE = "judge"  # another judge's mean mark, kept out of the training; only some runs have it
REACH = 2  # a step's mean takes as many steps on either side: one batch is a noisy witness
SHOWN = 6  # steps of a run in the table

Curve = dict[str, Any]
"""a run: `title`, `about`, `from`, `columns` (names) and `rows` (a list of numbers a step)"""


def curve(metrics: Path, title: str, about: str) -> Curve:
    """Return what the site keeps of a PPO run's metrics.jsonl. Raises BookError, DataError."""
    steps = read_metrics(metrics)
    names = [*COLUMNS, *([JUDGE] if any(JUDGE in step for step in steps) else [])]
    missing = [name for name in COLUMNS for step in steps[:1] if name not in step]
    if missing or not steps:
        lack = f"no {missing[0]!r}" if missing else "no step"
        raise BookError(f"{metrics} has {lack}: name the metrics.jsonl of a PPO run")
    rows = [[_rounded(step.get(name), COLUMNS.get(name, 3)) for name in names] for step in steps]
    digest = hashlib.sha256(metrics.read_bytes()).hexdigest()
    origin = f"{metrics.parent.name}/{metrics.name}, sha256 {digest}"
    made = "python -m tinychat.book curve"
    head = {"title": title, "about": about, "from": origin, "made": made, "columns": names}
    return {**head, "rows": rows}


def write(metrics: Path, title: str, about: str, path: Path) -> str:
    """Write the curve of a run and return a line about it. Raises BookError, DataError."""
    run = curve(metrics, title, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(run), encoding="utf-8", newline="\n")
    return f"{path}: {len(run['rows'])} steps"


def text(run: Curve) -> str:
    """Return a curve as JSON with a line a step, which a person and git can read."""

    head = [f'"{key}": {json.dumps(run[key], ensure_ascii=False)}' for key in run if key != "rows"]
    rows = ",\n    ".join(map(json.dumps, run["rows"]))
    return "{\n  " + ",\n  ".join([*head, f'"rows": [\n    {rows}\n  ]']) + "\n}\n"


def load(folder: Path) -> list[Curve]:
    """Return the curves of a folder, by their files' names. Raises BookError for a damaged one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not (set(COLUMNS) <= set(run["columns"]) and run["title"] and run["rows"]):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise BookError(f"{path} is no curve: make it with `... book curve`") from error
        found.append(run)
    if not found:
        raise BookError(f"{folder} holds no curve: make one with `... book curve METRICS`")
    return found


def column(run: Curve, name: str) -> list[Any]:
    """Return one number of each step; None where it was not measured."""
    place = run["columns"].index(name)
    return [row[place] for row in run["rows"]]


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """Return for each step the mean of its neighbourhood, of what was measured there."""
    means: list[float | None] = []
    for i, value in enumerate(values):
        near = [x for x in values[max(0, i - REACH) : i + REACH + 1] if x is not None]
        means.append(None if value is None else sum(near) / len(near))
    return means


def best(run: Curve, beta: float) -> int:
    """Return the row at which the mark less `beta` times the KL is highest along the run."""
    marks, kls = (smooth(column(run, name)) for name in ("score", "kl"))
    aims = [
        -math.inf if mark is None or kl is None else mark - beta * kl
        for mark, kl in zip(marks, kls, strict=True)
    ]
    return aims.index(max(aims))


def playground(root: Path) -> dict[str, Any]:
    """Return the widget's data, and a table of a few steps for readers without scripts."""
    runs = load(root / FOLDER)
    head = ["run", "step", "KL, nats a reply", "mark", "tokens a reply", "distinct-2", "entropy"]
    rows = [head]
    for run in runs:
        smoothed = {name: smooth(column(run, name)) for name in COLUMNS}
        steps = len(run["rows"])
        for i in sorted({round(n * (steps - 1) / (SHOWN - 1)) for n in range(SHOWN)}):
            at = {name: values[i] or 0.0 for name, values in smoothed.items()}
            rows.append(
                [
                    run["title"],
                    str(run["rows"][i][0]),
                    f"{at['kl']:.2f}",
                    f"{at['score']:.2f}",
                    f"{at['length']:.0f}",
                    f"{at['distinct_2']:.2f}",
                    f"{at['entropy']:.2f}",
                ]
            )
    kept = ("title", "about", "columns", "rows")
    data = [{key: run[key] for key in kept} for run in runs]
    return {"data": {"reach": REACH, "runs": data}, "rows": rows}


def _rounded(value: Any, digits: int) -> float | int | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise DataError(f"{value!r} is no number: name the metrics.jsonl of a PPO run.")
    return round(value) if not digits else round(value, digits)
