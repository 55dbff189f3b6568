"""The model card: a page about the shipped checkpoints, made from their own metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinychat.cli.info import machine, size
from tinychat.runtime.checkpoint import STAGES, CheckpointInfo, read_info
from tinychat.runtime.errors import CheckpointError


def card(folder: Path) -> str:
    """Return the card of the checkpoints in `folder` as Markdown; CheckpointError for none."""
    infos = [read_info(path) for path in sorted(folder.glob("*.safetensors"))]
    if not infos:
        raise CheckpointError(f"{folder} holds no checkpoint; name a folder that does.")
    infos.sort(key=lambda info: (STAGES.index(info.stage), info.path.name))
    lines = [
        "# The shipped checkpoints",
        "",
        "Made from the files' own metadata by `tinychat models --card checkpoints`; "
        "`tinychat info NAME` shows all of it. Very small models, trained by this repository's "
        "code from random weights: they make things up and are often wrong.",
        "",
        "| file | stage | parameters | size | tokens read | minutes | hardware |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for info in infos:
        lineage = info.lineage
        place = machine(lineage["hardware"])
        lines.append(
            f"| {info.path.name} | {info.stage} | {info.parameters:,} | {size(info.bytes)}, "
            f"{info.dtype} | {lineage['tokens']:,} | {lineage['minutes']:g} | {place} |"
        )
    for info in infos:
        lines += ["", f"## {info.path.name}", "", *figures(info), "", *sources(info)]
    lines += [
        "",
        "The texts are not in this repository. Weights learned from them are published with "
        "the attributions above; the share-alike licences among them are named so that you can "
        "judge for yourself.",
    ]
    return "\n".join(lines) + "\n"


def figures(info: CheckpointInfo) -> list[str]:
    rows = ["| unseen text | bits per byte |", "| --- | --- |"]
    bits = info.metrics.get("bits_per_byte", {})
    rows += [f"| {name} | {value:.3f} |" for name, value in bits.items()]
    cost = info.metrics.get("storage_cost_percent")
    if cost is not None:
        rows += ["", f"Storing it as {info.dtype} costs {cost:+.2f} % in bits per byte."]
    return rows


def sources(info: CheckpointInfo) -> list[str]:
    rows = ["| read | passes | licence | from |", "| --- | --- | --- | --- |"]
    data: dict[str, Any] = info.lineage.get("data", {})
    for name, entry in data.items():
        passes = entry.get("passes")
        if passes == 0:
            continue
        rows.append(
            f"| {name} | {'' if passes is None else f'{passes:.2f}'} | {entry['licence']} | "
            f"{entry.get('attribution', 'tinychat corpus')} |"
        )
    return rows
