"""The model card: a page about the shipped checkpoints, made from their own metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tinychat.cli.info import machine, size
from tinychat.cli.lineage import descent
from tinychat.runtime.checkpoint import STAGES, CheckpointInfo, read_info
from tinychat.runtime.errors import CheckpointError

REPORT = {
    "score": "reward of a reply, mean",
    "judge": "the judge's mark, mean",
    "right": "right answers to unseen questions, share",
    "kl": "distance from sft, nats a reply",
    "length": "tokens a reply",
    "ended": "ends by itself, share",
    "distinct_2": "different pairs of tokens, share",
    "repetition": "repeated runs of three tokens, share",
    "entropy": "entropy, nats a token",
}


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
        "`tinychat info NAME --json` shows all of it. Very small models, trained by this "
        "repository's code from random weights: they make things up and are often wrong.",
        "",
        "| file | stage | parameters | size | tokens read (base: in all; rlhf: drawn) | minutes "
        "| hardware |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for info in infos:
        lineage = info.lineage
        place = machine(lineage.get("hardware", {}))
        # Before a base there are only other bases: what it has read is what all of them have.
        runs = list(descent(lineage)) if info.stage == "base" else [lineage]
        tokens, minutes = _total(runs, "tokens"), _total(runs, "minutes")
        lines.append(
            f"| {info.path.name} | {info.stage} | {info.parameters:,} | {size(info.bytes)}, "
            f"{info.dtype} | {'not recorded' if tokens is None else f'{tokens:,}'} | "
            f"{'not recorded' if minutes is None else f'{minutes:g}'} | {place} |"
        )
    for info in infos:
        lines += ["", f"## {info.path.name}", "", *figures(info), "", *sources(info.lineage)]
        if older := readings_before(info.lineage):
            lines += ["", f"And all that the models before it read: {'; '.join(older)}."]
    lines += [
        "",
        "The texts are not in this repository. Weights learned from them are published with "
        "the attributions above; the share-alike licences among them are named so that you can "
        "judge for yourself.",
    ]
    return "\n".join(lines) + "\n"


def _total(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The sum over the runs; None where one of them does not tell."""
    found = [run[key] for run in runs if run.get(key) is not None]
    return round(sum(found), 1) if len(found) == len(runs) else None


def readings_before(lineage: Mapping[str, Any]) -> list[str]:
    """Tokens and minutes of each training that a model went on from, the latest first."""
    found = []
    for older in islice(descent(lineage), 1, None):
        tokens, minutes = older.get("tokens"), older.get("minutes")
        spent = "" if minutes is None else f" in {minutes:g} minutes"
        found.append("not recorded" if tokens is None else f"{tokens:,} tokens{spent}")
    return found


def figures(info: CheckpointInfo) -> list[str]:
    metrics = info.metrics
    if info.stage == "reward":
        rows = ["| held-out pairs | in the right order | by words alone | pairs |"]
        rows += ["| --- | --- | --- | --- |"]
        rows += [
            f"| {name} | {right:.1%} | {words:.1%} | {count:,} |"
            for name, (right, count, words) in metrics.get("by_source", {}).items()
        ]
    elif info.stage == "rlhf":
        before, after = metrics.get("before", {}), metrics.get("after", {})
        rows = [f"| {metrics.get('held_out_prompts', 0)} unseen prompts | before | after |"]
        rows += ["| --- | --- | --- |"]
        rows += [
            f"| {meaning} | {before[name]:.3f} | {after[name]:.3f} |"
            for name, meaning in REPORT.items()
            if name in before and name in after
        ]
    else:
        rows = ["| unseen text | bits per byte |", "| --- | --- |"]
        bits = metrics.get("bits_per_byte", {})
        rows += [f"| {name} | {value:.3f} |" for name, value in bits.items()]
    cost = metrics.get("storage_cost_percent")
    if cost is not None:
        rows += ["", f"Storing it as {info.dtype} costs {cost:+.2f} % in bits per byte."]
    return rows


def sources(lineage: Mapping[str, Any]) -> list[str]:
    rows = ["| read | passes | licence | from |", "| --- | --- | --- | --- |"]
    for name, entry in texts(lineage).items():
        passes = entry.get("passes")
        rows.append(
            f"| {name} | {'' if passes is None else f'{passes:.2f}'} | {licence(entry)} | "
            f"{owner(entry)} |"
        )
    return rows


def texts(lineage: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was read, by name; texts that were there and never read are left out."""
    data: Mapping[str, Mapping[str, Any]] = lineage.get("data", {})
    return {name: entry for name, entry in data.items() if entry.get("passes") != 0}


def all_texts(lineage: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The same, with all that the models before it read: weights owe their sources through them."""
    found = texts(lineage)
    for ancestor in lineage.get("ancestors", []):
        found = all_texts(ancestor) | found
    return found


def licence(entry: Mapping[str, Any]) -> str:
    return str(entry.get("licence", "not recorded"))


def owner(entry: Mapping[str, Any]) -> str:
    """Whom a text is from. Ours is CC0; another one without a name came from whoever trained."""
    ours = "tinychat corpus" if licence(entry) == "CC0-1.0" else "the user"
    return str(entry.get("attribution", ours))
