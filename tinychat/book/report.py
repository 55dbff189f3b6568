"""The report card of the shipped models: what their own metadata and the last evaluation say."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinychat.book.cards import WORDS, shipped, table
from tinychat.book.chapter import BookError
from tinychat.cli.info import score, size
from tinychat.runtime.checkpoint import STAGES, CheckpointInfo
from tinychat.runtime.files import file_sha256

EVALUATION = "report.json"  # beside the checkpoints: `tinychat eval ... --out` writes it
COMMAND = f"tinychat eval rlhf sft base --judge judge --out checkpoints/{EVALUATION}"
FORM = {  # what it is, and how it is written
    "length": ("tokens a reply", ".1f"),
    "ended": ("replies that end by themselves", ".1%"),
    "distinct_1": ("distinct-1", ".2f"),
    "distinct_2": ("distinct-2", ".2f"),
    "repetition": ("repeated runs of three tokens", ".1%"),
}
SIDES = {  # of a PPO run's report
    "score": ("mark of the reward model", ".2f"),
    "judge": ("mark of a judge that only looked on", ".2f"),
    "kl": ("KL to the model it began with, nats a reply", ".2f"),
    "entropy": ("entropy, nats a token", ".2f"),
    **FORM,
}
SETS = {
    "helpful": "helpful",
    "honest": "honest",
    "harmless": "harmless",
    "known": "known facts: right",
    "unknown": "unknowable things: admits it",
}
TONES = {
    "nice": "told to be nice: rude",
    "none": "told nothing: rude",
    "mean": "told to be mean: rude",
}


def report_card(folder: Path) -> str:
    """Return the page of what the checkpoints in `folder` can do. Raises BookError."""
    found = shipped(folder)
    parts = [
        "# Report card",
        "What the models can do, measured on texts and questions that none of them was trained on. "
        "Every number comes out of the files themselves, each time this site is built.\n"
        "{ .summary }",
        "## The four stages",
        _stages(found),
        "What each model is made from and meant for stands in [the model cards](model_card.md).",
        "## Unseen text",
        *_texts(found),
        "## The reward model",
        *_reward(found.get("reward")),
        "## Before and after PPO",
        *_ppo(found.get("rlhf")),
        "## Side by side",
        *_evaluation(folder, found),
    ]
    return "\n\n".join(parts) + "\n"


def _stages(found: Mapping[str, CheckpointInfo]) -> str:
    rows = []
    for stage in STAGES:
        name, info = f"[{stage}](model_card.md#{stage})", found.get(stage)
        if info is None:
            rows.append([name, "not shipped yet", "", "", ""])
        else:
            tokens = info.lineage.get("tokens")
            rows.append(
                [
                    name,
                    f"{info.parameters:,}",
                    "not recorded" if tokens is None else f"{tokens:,}",
                    f"{size(info.bytes)}, {info.dtype}",
                    score(info)[1],
                ]
            )
    return table(["stage", "parameters", "tokens in training", "file", "measured"], rows)


def _texts(found: Mapping[str, CheckpointInfo]) -> list[str]:
    """Bits per byte, the lowest first; a model that did not measure a text has a dash."""
    bits = {
        stage: info.metrics["bits_per_byte"]
        for stage, info in found.items()
        if info.metrics.get("bits_per_byte")
    }
    if not bits:
        return ["Nothing is recorded."]
    names = sorted(
        {name for values in bits.values() for name in values},
        key=lambda name: min(values[name] for values in bits.values() if name in values),
    )
    rows = [
        [name, *(_level(values.get(name)) for values in bits.values())] for name in names
    ]  # fmt: skip
    return [
        "How many bits the model needs for each byte of a text that it has never read. Eight would "
        "be knowing nothing; less is better. Chapter 02 explains it.",
        table(["text", *bits], rows),
    ]


def _level(bits: float | None) -> str:
    if bits is None:
        return "–"
    return f'{bits:.3f} <span class="level" style="--level: {bits / 2:.3f}"></span>'


def _reward(info: CheckpointInfo | None) -> list[str]:
    if info is None:
        return [_missing("reward")]
    metrics = info.metrics
    parts = []
    if "accuracy" in metrics:
        told = [f"It puts {metrics['accuracy']:.1%} of the held-out pairs in the order that we did"]
        if "baseline" in metrics:
            told.append(f"its words alone give {metrics['baseline']:.1%}")
        if "length_correlation" in metrics:
            of_length = metrics["length_correlation"]
            told.append(f"its marks and the replies' lengths correlate by {of_length:+.2f}")
        parts.append("; ".join(told) + ".")
    for key, title in (
        ("by_flaw", "flaw of the worse reply"),
        ("by_flaw_everyday", "flaw, of everyday messages"),
        ("by_source", "pairs from"),
    ):
        if metrics.get(key):
            rows = [
                [name, f"{count:,}", f"{right:.1%}", f"{words:.1%}"]
                for name, (right, count, words) in metrics[key].items()
            ]
            parts.append(table([title, "pairs", "right", "by words alone"], rows))
    return parts or ["Nothing is recorded."]


def _ppo(info: CheckpointInfo | None) -> list[str]:
    if info is None:
        return [_missing("rlhf")]
    before, after = info.metrics.get("before", {}), info.metrics.get("after", {})
    rows = [
        [words, format(before[name], form), format(after[name], form)]
        for name, (words, form) in SIDES.items()
        if name in before and name in after
    ]
    if not rows:
        return ["Nothing is recorded."]
    count = info.metrics.get("held_out_prompts", "unseen")
    return [
        f"On {count} prompts of the held-out part, with the same dice before and after. A mark "
        "that rises proves little: read the replies, as the lab notes do.",
        table(["measured", "before", "after"], rows),
    ]


def _evaluation(folder: Path, found: Mapping[str, CheckpointInfo]) -> list[str]:
    path = folder / EVALUATION
    if not path.exists():
        return [
            f"No evaluation is stored beside the checkpoints so far. `{COMMAND}` writes one, and "
            "this page shows it. Chapter 13 builds the measurements."
        ]
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return _tables(report, {file_sha256(info.path) for info in found.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BookError(f"{path} is no report ({error!r}): make it with `{COMMAND}`") from error


def _tables(report: Mapping[str, Any], digests: set[str]) -> list[str]:
    models, sampling = report["models"], report["sampling"]
    parts = [
        f"{report['prompts']['count']} unseen prompts, temperature {sampling['temperature']:g}, "
        f"top-p {sampling['top_p']:g}, at most {sampling['max_tokens']} tokens. In brackets: 95 % "
        "intervals. Chapter 13 explains each line."
    ]
    others = [name for name, found in models.items() if found["sha256"] not in digests]
    if others:
        parts.append(
            '!!! warning "Measured on other files"\n\n    The report is about another version of '
            f"{', '.join(others)} than the one that is shipped now."
        )
    judge = report["judge"]
    if judge and judge.get("accuracy"):
        parts.append(f"The judge is right on {judge['accuracy']:.1%} of its held-out pairs.")
    pairs = [
        [
            f"{row['a']} against {row['b']}",
            *(str(row.get(key, "–")) for key in ("wins", "ties", "losses")),
            _interval(row.get("rate"), ".1%"),
            _interval(row.get("kl"), ".2f"),
        ]
        for row in report["pairs"]
    ]
    if pairs:
        parts.append(table(["who", "won", "tied", "lost", "win rate", "KL, nats a reply"], pairs))
    rows = [["judge's mark", *(_interval(one["mark"], ".2f") for one in models.values())]]
    for key, (words, form) in FORM.items():
        rows.append([words, *(format(one["form"][key], form) for one in models.values())])
    if all("probes" in one for one in models.values()):
        for kind, words in SETS.items():
            rows.append([words, *(_verdicts(one["probes"][kind]) for one in models.values())])
        for tone, words in TONES.items():
            rude = [_interval(one["manners"][tone]["rude"], ".0%") for one in models.values()]
            rows.append([words, *rude])
        for text in next(iter(models.values()))["bits_per_byte"]:
            bits = [_interval(one["bits_per_byte"].get(text), ".3f") for one in models.values()]
            rows.append([f"bits per byte, {text}", *bits])
    parts.append(table(["measured", *models], rows))
    if "best_of" in report:
        parts += _best_of(report["best_of"])
    return parts


def _best_of(found: Mapping[str, Any]) -> list[str]:
    """The rival of PPO that needs no training: draw n replies, keep the best one."""
    rows = [
        [
            str(row["n"]),
            f"{row['kl']:.2f}",
            _interval(row["reward"], ".2f"),
            _interval(row["judge"], ".2f"),
            f"{row['length']:.1f}",
        ]
        for row in found["curve"]
    ]
    header = ["n", "KL, nats at most", "its mark", "the judge's mark", "tokens a reply"]
    return [f"**Best of n** replies of {found['model']}, by the reward model:", table(header, rows)]


def _interval(value: Sequence[float] | None, form: str) -> str:
    if value is None:
        return "–"
    middle, low, high = (format(number, form) for number in value)
    return f"{middle} [{low}, {high}]"


def _verdicts(counts: Mapping[str, int]) -> str:
    return f"{counts.get('good', 0)} of {sum(counts.values())}"


def _missing(stage: str) -> str:
    words = WORDS[stage]
    return (
        f"There is no `{stage}.safetensors` among the shipped checkpoints yet, so nothing is shown "
        f"here. Chapter {words.chapter} builds it."
    )
