"""What there is: checkpoints and data sources, as tables or JSON. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from tinychat.cli.console import print_json, printable
from tinychat.runtime.checkpoint import CheckpointInfo, find, read_info, search_folders
from tinychat.runtime.errors import CheckpointError, DataError
from tinychat.runtime.search import RUNS, installed, runs


def show_info(name: str, as_json: bool) -> None:
    """Print the header of one checkpoint."""
    info = read_info(find(name))
    if as_json:
        print_json({**asdict(info), "path": str(info.path)})
        return
    table = Table(title=Text(str(info.path)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("stage", info.stage)
    table.add_row("parameters", f"{info.parameters:,}")
    table.add_row("on disk", f"{size(info.bytes)}, {info.dtype}, format {info.format}")
    table.add_row("chat template", Text(printable(info.chat_template)))
    table.add_row("tokenizer", Text(info.tokenizer_sha256))
    table.add_section()
    table.add_row("config", Text(printable(plain("config", info.config))))
    parts = [("metrics", info.metrics), *(("lineage", one) for one in trainings(info.lineage))]
    for number, (part, entries) in enumerate(parts):
        table.add_section()
        if number > 1:
            table.add_row("built on", Text("an earlier training", style="dim"))
        if not entries:
            table.add_row(part, Text("nothing recorded", style="dim"))
        for key, value in entries.items():
            told = (str(key).replace("_", " "), plain(str(key), value))
            table.add_row(*(Text(printable(text)) for text in told))
    table.caption = Text(f"Everything, curves and checksums too: tinychat info {name} --json")
    Console().print(table)


def trainings(lineage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A lineage and those of its ancestors, of theirs too, each once and without its ancestors."""
    older = lineage.get("ancestors")
    older = older if isinstance(older, list) and all(isinstance(o, Mapping) for o in older) else []
    found = [{key: x for key, x in lineage.items() if key != "ancestors" or not older}]
    for one in older:
        found += [entry for entry in trainings(one) if entry not in found]
    return found


def show_models(as_json: bool) -> None:
    """Print the checkpoints that a name can mean."""
    if as_json:
        rows = [
            {"name": name, "path": str(path), "from": origin(path), **_summary(info)}
            for name, path, info in found_models()
        ]
        print_json(rows)
        return
    Console().print(models_table())


def models_table() -> RenderableType:
    """What is there: where from, how large, how old, how good."""
    found = found_models()
    if not found:
        return Text(f"No checkpoint in {', '.join(str(folder) for folder in search_folders())}.")
    fixed = [Column(name, no_wrap=True) for name in ("name", "stage", "weights", "size", "date")]
    table = Table(*fixed, "score", Column("from", overflow="fold"), box=SIMPLE_HEAD, pad_edge=False)
    for name, path, info in found:
        row = ["damaged", "", "", "", ""]
        if isinstance(info, CheckpointInfo):
            weights = f"{info.parameters / 1e6:.1f} M"
            row = [info.stage, weights, size(info.bytes), date(info), score(info)[1]]
        came = origin(path)
        where = {"shipped": came, "run": str(path.parent)}.get(came, f"{came}: {path.parent}")
        table.add_row(Text(name), *map(Text, row), Text(where))
    return table


def found_models() -> list[tuple[str, Path, CheckpointInfo | CheckpointError]]:
    """Every checkpoint that a name can mean, each file once; an error where it is unreadable."""
    found: dict[Path, tuple[str, Path, CheckpointInfo | CheckpointError]] = {}
    for name, path in (*installed(), *runs().items()):
        if path.resolve() not in found:
            try:
                found[path.resolve()] = (name, path, read_info(path))
            except CheckpointError as error:
                found[path.resolve()] = (name, path, error)
    return list(found.values())


def origin(path: Path) -> str:
    """Where a checkpoint came from: shipped (with the package), yours (data folder), run, local."""
    from platformdirs import user_data_dir

    package = Path(__file__).resolve().parents[1]
    folder = path.resolve().parent
    shipped = [package / "checkpoints"]
    if (package.parent / "pyproject.toml").is_file():
        shipped.append(package.parent / "checkpoints")
    if folder in shipped:
        return "shipped"
    if folder.is_relative_to(RUNS.resolve()):
        return "run"
    return "yours" if folder.is_relative_to(Path(user_data_dir("tinychat")).resolve()) else "local"


def date(info: CheckpointInfo) -> str:
    """The day that the metadata names, else the file's."""
    told = info.lineage.get("date")
    if isinstance(told, str) and told:
        return told[:10]
    return time.strftime("%Y-%m-%d", time.localtime(info.path.stat().st_mtime))


def score(info: CheckpointInfo) -> tuple[float | None, str]:
    """What the metadata says of its quality, as a number and for people; stages differ in kind."""
    bits = info.metrics.get("bits_per_byte")
    if (
        isinstance(bits, Mapping)
        and bits
        and all(isinstance(b, int | float) for b in bits.values())
    ):
        mean = sum(bits.values()) / len(bits)
        of = next(iter(bits)) if len(bits) == 1 else f"{len(bits)} texts"
        return mean, f"{mean:.3f} bits/byte, {of}"
    for name, form in (("accuracy", "{:.1%} of pairs"), ("loss", "loss {:.3f}")):
        value = info.metrics.get(name)
        if isinstance(value, int | float):
            return value, form.format(value)
    return None, ""


def _summary(info: CheckpointInfo | CheckpointError) -> dict[str, Any]:
    if isinstance(info, CheckpointError):
        return {"error": str(info)}
    value, text = score(info)
    return {
        "stage": info.stage,
        "parameters": info.parameters,
        "bytes": info.bytes,
        "date": date(info),
        "score": value,
        "score_of": text,
    }


def show_sources(folder: Path | None) -> None:
    """Print the public sources, and which of them the data folder holds."""
    from tinychat.data.public import data_folder, sources

    held = data_folder(folder)
    table = Table(Column("source", overflow="fold"), "kind", "records", "licence", "here")
    for source in sources():
        here = "yes" if held is not None and (held / source.file).is_file() else "no"
        table.add_row(source.name, source.kind, f"{source.records:,}", source.licence, here)
    Console().print(table)


def verify_sources(folder: Path | None) -> None:
    """Compare the data folder's files with their checksums. DataError when one has changed."""
    from tinychat.data.public import data_folder, verify

    held = data_folder(folder)
    if held is None:
        raise DataError("There is no data folder to verify; name it with --data DIR.")
    rows = verify(held)
    table = Table(Column("source", overflow="fold"), "state", "size")
    for row in rows:
        table.add_row(row.source.name, row.state, size(row.bytes) if row.bytes else "")
    Console().print(table)
    changed = [row.source.file for row in rows if row.state == "changed"]
    if changed:
        raise DataError(f"{held}: {', '.join(changed)} changed; fetch it again.")


def plain(key: str, value: Any) -> str:
    """A value of the metadata for people: thousands, hours, a line for each group of things."""
    if isinstance(value, Mapping):
        if key == "hardware" and (part := machine(value)) != UNKNOWN:
            return part
        if len(value) > 1:  # a data source's
            value = {name: x for name, x in value.items() if name != "sha256"}
        if any(isinstance(inner, Mapping | list) for inner in value.values()):
            return "\n".join(f"{name}: {plain(name, inner)}" for name, inner in value.items())
        return ", ".join(f"{name} {plain(name, x)}" for name, x in value.items()) or "none"
    if isinstance(value, list):
        told = [plain("" if key == "curve" else key, entry) for entry in value]
        if key == "curve" and len(told) > 2:
            return f"{len(told)} points\nfirst: {told[0]}\nlast: {told[-1]}"
        nested = any(isinstance(entry, Mapping | list) for entry in value)
        return ("\n" if nested else ", ").join(told) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float) and key.endswith("seconds") and math.isfinite(value):
        return duration(value)
    if isinstance(value, int):
        return f"{value:,}" if key not in ("seed", "format") else str(value)
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """4000 -> "1 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


UNKNOWN = "not recorded"


def machine(hardware: Mapping[str, Any]) -> str:
    """The part that did the work: "NVIDIA H100", or "2 cores of AMD EPYC"."""
    if not {"cores", "cpu", "gpus"} <= hardware.keys() or not isinstance(hardware["gpus"], list):
        return UNKNOWN
    gpus = [gpu.get("name") if isinstance(gpu, Mapping) else gpu for gpu in hardware["gpus"]]
    cores = f"{hardware['cores']} core{'s' * (hardware['cores'] != 1)} of {hardware['cpu']}"
    return ", ".join(map(str, gpus)) or cores


def size(count: int) -> str:
    """15000000 -> "15.0 MB"."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
