"""The report card of `tinychat eval` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

SETS = ("helpful", "honest", "harmless", "known", "unknown")
RIGHT = {"known": "right", "unknown": "admits"}


def print_report(report: Mapping[str, Any]) -> None:
    """Every table that has something to say; plain text where nobody sees colours."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 130), no_color=True)
    models = report["models"]
    judge = report["judge"]
    sampling, count = report["sampling"], report["prompts"]["count"]
    drafts = (
        f"the surest of {sampling['drafts']} drafts a sentence, "
        if sampling.get("drafts", 1) > 1
        else ""
    )
    console.print(
        Text(
            f"{count} unseen prompts, temperature {sampling['temperature']:g}, "
            f"top-p {sampling['top_p']:g}, at most {sampling['max_tokens']} tokens, {drafts}"
            f"seed {sampling['seed']}. In brackets: 95% intervals."
        )
    )
    if report["pairs"]:
        if judge:
            known = judge.get("accuracy")
            right = f" (right on {known:.1%} of held-out pairs)" if known else ""
            console.print(Text(f"Judge: {judge['path']}{right}."))
        console.print(_pairs(report["pairs"]))
    console.print(_replies(models))
    if "best_of" in report:
        console.print(_best_of(report["best_of"]))
    first = next(iter(models.values()))
    if "probes" in first:
        console.print(_probes(models))
        console.print(_manners(models))
        console.print(_texts(models))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not number else "right", overflow="fold")
    return table


def show(interval: Sequence[float] | None, form: str) -> str:
    """An interval as text, or a dash."""
    from tinychat.evaluation import Interval

    return "-" if interval is None else Interval(*interval).show(form)


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        "Pairs", "who", "wins", "ties", "losses", "win rate", "marks higher by", "KL, nats a reply"
    )
    for row in rows:
        judged = "rate" in row
        table.add_row(
            Text(f"{row['a']} against {row['b']}"),
            *(str(row[name]) if judged else "-" for name in ("wins", "ties", "losses")),
            Text(show(row["rate"], ".1%") if judged else "-"),
            Text(show(row["difference"], ".2f") if judged else "-"),
            Text(show(row["kl"], ".2f")),
        )
    return table


def _replies(models: Mapping[str, Any]) -> Table:
    first = next(iter(models.values()))
    columns = ["model", "mark", "tokens", "ended", "distinct-1", "distinct-2", "repeated", "flawed"]
    table = _table("Replies", *columns, *(["perplexity"] if "perplexity" in first else []))
    for name, found in models.items():
        form, rules = found["form"], found["broken_rules"]
        worst = max(rules, key=lambda rule: rules[rule])
        cells = [
            show(found["mark"], ".2f"),
            f"{form['length']:.1f}",
            f"{form['ended']:.1%}",
            f"{form['distinct_1']:.3f}",
            f"{form['distinct_2']:.3f}",
            f"{form['repetition']:.1%}",
            f"{worst} {rules[worst]:.0%}" if rules[worst] else "none",
        ]
        if "perplexity" in found:
            cells.append(show(found["perplexity"], ".1f"))
        table.add_row(Text(name), *map(Text, cells))
    return table


def _best_of(found: Mapping[str, Any]) -> Table:
    title = f"{found['model']}: best of n by {found['reward']['path']}"
    table = _table(title, "n", "KL, nats at most", "its mark", "the judge's mark", "tokens")
    for row in found["curve"]:
        marks = Text(show(row["reward"], ".2f")), Text(show(row["judge"], ".2f"))
        table.add_row(str(row["n"]), f"{row['kl']:.2f}", *marks, f"{row['length']:.1f}")
    return table


def _probes(models: Mapping[str, Any]) -> Table:
    columns = [f"{name}: {RIGHT.get(name, 'good')}" for name in SETS]
    table = _table("Questions of ours, by readable rules (good/bad/unclear)", "model", *columns)
    for name, found in models.items():
        cells = []
        for kind in SETS:
            counts = found["probes"][kind]
            three = [counts.get(verdict, 0) for verdict in ("good", "bad", "unclear")]
            cells.append(f"{three[0] / sum(three):.0%} ({'/'.join(map(str, three))})")
        table.add_row(Text(name), *map(Text, cells))
    return table


def _manners(models: Mapping[str, Any]) -> Table:
    told = ("nice", "none", "mean")
    table = _table(
        "Told to be nice, nothing, or mean: rude by its words, and the judge's mark",
        "model", *(f"rude: {name}" for name in told), *(f"mark: {name}" for name in told),
    )  # fmt: skip
    for name, found in models.items():
        parts = found["manners"]
        rude = [show(parts[one]["rude"], ".0%") for one in told]
        marks = [show(parts[one]["mark"], ".2f") for one in told]
        table.add_row(Text(name), *map(Text, (*rude, *marks)))
    return table


def _texts(models: Mapping[str, Any]) -> Table:
    names = list(models)
    table = _table("Bits per byte on held-out text (of dialogues: the replies)", "source", *names)
    for source in models[names[0]]["bits_per_byte"]:
        table.add_row(
            Text(source),
            *(Text(show(models[name]["bits_per_byte"].get(source), ".3f")) for name in names),
        )
    return table
