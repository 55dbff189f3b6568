"""`tinychat eval`: asks models the same unseen questions, and writes a report card."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.contestants import (
    Contestant,
    choose_prompts,
    find_judge,
    find_models,
    find_teacher,
    load,
    load_judge,
)
from tinychat.cli.flags import checkpoint_names
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.unseen import Prompt
    from tinychat.evaluation import Answer
    from tinychat.runtime.checkpoint import CheckpointInfo

TEXTS = 20  # held-out texts of each source


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL [OTHER ...]",
            help="A checkpoint to measure, and others to compare it with.",
            autocompletion=checkpoint_names,
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="A reward model that compares the replies: one of `tinychat train reward "
            "--judge`, which no model was trained to please.",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="The reward model that chooses, with --best-of."),
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            "--best-of",
            metavar="N",
            help="Draw N replies to each prompt, and show what the best of 1, 2, 4, ... by "
            "--reward is worth to it and to the judge.",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(metavar="N", help="Unseen prompts to answer.")] = 300,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="TINYCHAT_DATA",
            metavar="DIR",
            help="Folder with public text: half of the prompts and more of the texts are from it.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides prompts and dice.")] = 0,
    temperature: Annotated[float, typer.Option(metavar="X", help="Of the replies.")] = 0.5,
    top_p: Annotated[float, typer.Option(metavar="X", help="Of the replies; 1 is off.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest reply in tokens.")] = 200,
    drafts: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Drafts of each sentence, of which the surest is said; the chat writes 8.",
        ),
    ] = 1,
    brief: Annotated[
        bool, typer.Option("--brief", help="Only replies, win rates and KL: no texts, no probes.")
    ] = False,
    fluency: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="A language model for transformers (a folder, or a .gguf file) that tells how "
            "surprising the replies are to it.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JSON too.")
    ] = None,
    save_pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all prompts, replies and marks as JSON lines."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write pairs of replies to read blind, and FILE.key beside it."
        ),
    ] = None,
    pair_count: Annotated[int, typer.Option(metavar="N", help="How many such pairs.")] = 50,
    count: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Count the verdicts in such a file, and do no more."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Measure models: win rates with intervals, KL, held-out text, honesty, manners.

    Example: tinychat eval ppo sft base --judge judge --out report.json
    """
    from rich.console import Console

    from tinychat.cli.blind import count_verdicts, key_path, write_blind

    if count is not None:
        if models:
            raise ConfigError(f"--count {count} takes no model; the file tells whose replies.")
        count_verdicts(count)
        return
    if not models:
        raise ConfigError("There is no model to measure; name one, as in tinychat eval ppo sft.")
    if (best_of is None) != (reward is None):
        raise ConfigError("--best-of and --reward go together: how many replies, and who chooses.")
    if best_of is not None and best_of < 2:
        raise ConfigError(f"--best-of is {best_of}; a choice takes at least 2.")
    if pairs and len(models) < 2:
        raise ConfigError("Pairs to read need two models; name a second one.")
    from tinychat.cli.eval_report import print_report
    from tinychat.evaluation import answer_all, give_marks
    from tinychat.generation import Sampling
    from tinychat.runtime.device import pick_device, set_threads
    from tinychat.runtime.files import check_target, write_atomic

    # 1. Everything that can be wrong is found before the work begins.
    if pair_count < 1:
        raise ConfigError(f"--pair-count is {pair_count}; ask for at least 1.")
    for path in (pairs, key_path(pairs)) if pairs else ():
        if path.exists():
            raise ConfigError(f"{path} exists, perhaps with verdicts in it; name another file.")
    targets = [path for path in (out, save_pairs, pairs) if path is not None]
    if len({path.resolve() for path in targets}) < len(targets):
        raise ConfigError("--out, --save-pairs and --pairs name one file; give each its own.")
    sampling = Sampling(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, drafts=drafts, seed=seed
    )
    infos = find_models(models)
    judge_info = find_judge(judge, infos.values()) if judge else None
    teacher_info = find_teacher(reward, judge_info) if reward else None
    for path in targets:
        check_target(path)
    place = pick_device(device)
    set_threads()
    screen, started = Console(stderr=True, highlight=False), time.monotonic()
    with screen.status("Loading ..."):
        contestants = [load(name, info, place) for name, info in infos.items()]
        marker = load_judge(judge_info, place) if judge_info else None
    reader = None
    if fluency:
        from tinychat.cli.fluency import load_reader, perplexities

        reader = load_reader(fluency)
    asked = choose_prompts(prompts, data, seed, max_tokens, contestants, marker, screen)

    # 2. The same questions and the same dice for all.
    answers: dict[str, list[Answer]] = {}
    marks: dict[str, list[float]] = {}
    for one in contestants:
        with screen.status(f"{one.name} answers {len(asked)} prompts ..."):
            answers[one.name] = answer_all(one.model, one.tokenizer, asked, sampling)
            if marker:
                marks[one.name] = give_marks(*marker, asked, answers[one.name])

    # 3. Measure.
    report: dict[str, Any] = {
        "models": {
            one.name: describe(one, asked, answers[one.name], marks.get(one.name))
            for one in contestants
        },
        "judge": describe_judge(judge_info) if judge_info else None,
        "prompts": {"count": len(asked), "seed": seed, "public": data is not None},
        "sampling": asdict(sampling),
    }
    with screen.status("Comparing ..."):
        report["pairs"] = compare(contestants, asked, marks, max_tokens, seed)
    if not brief:
        from tinychat.cli.examine import examine_models

        for name, more in examine_models(contestants, marker, sampling, data, TEXTS, screen):
            report["models"][name] |= more
    if teacher_info and best_of:
        from tinychat.cli.best_of import best_of_curve

        teacher, first = load_judge(teacher_info, place), contestants[0]
        with screen.status(f"{first.name} answers {len(asked)} prompts {best_of} times ..."):
            report["best_of"] = {
                "model": first.name,
                "reward": describe_judge(teacher_info),
                "curve": best_of_curve(first, asked, teacher, marker, best_of, max_tokens, seed),
            }
    if reader:
        with screen.status(f"{fluency} reads the replies ..."):
            for name, value in perplexities(reader, asked, answers).items():
                report["models"][name]["perplexity"] = value
    report |= footnotes(time.monotonic() - started)

    # 4. Show, then write: a full disk must not cost the figures.
    print_report(report)
    if out:
        write_atomic(out, [(json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()])
    if save_pairs:
        save_answers(save_pairs, asked, answers, marks)
    if pairs:
        first, second = contestants[:2]
        both = [
            {"name": one.name, "path": str(one.info.path)}
            | {"answers": answers[one.name], "marks": marks.get(one.name)}
            for one in (first, second)
        ]
        written = write_blind(pairs, asked, both[0], both[1], pair_count, seed)
        print(
            f"\n{written} pairs to read: {pairs}. Write A, B, tie or bad behind each verdict, "
            f"then: tinychat eval --count {pairs}"
        )


def describe(
    one: Contestant, asked: Sequence[Prompt], answers: list[Answer], marks: list[float] | None
) -> dict[str, Any]:
    """What a model is and what its replies look like."""
    from tinychat.evaluation import bootstrap, broken_rules, form
    from tinychat.runtime.files import file_sha256

    return {
        "path": str(one.info.path),
        "sha256": file_sha256(one.info.path),
        "stage": one.info.stage,
        "parameters": one.info.parameters,
        "mark": bootstrap(marks) if marks else None,
        "form": form(answers),
        "broken_rules": broken_rules(asked, answers),
    }


def describe_judge(info: CheckpointInfo) -> dict[str, Any]:
    from tinychat.runtime.files import file_sha256

    return {
        "path": str(info.path),
        "sha256": file_sha256(info.path),
        "accuracy": info.metrics.get("accuracy"),
        "length_correlation": info.metrics.get("length_correlation"),
    }


def compare(
    contestants: Sequence[Contestant],
    asked: Sequence[Prompt],
    marks: dict[str, list[float]],
    max_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The first model against each other one: win rate, difference of marks, KL."""
    from tinychat.dialogue import render_prompt
    from tinychat.evaluation import WinRate, bootstrap, draw_replies, kl_nats

    if len(contestants) < 2:
        return []
    first, *others = contestants
    context, pieces = first.model.config.context, first.tokenizer
    prompts = [render_prompt(p, pieces, context=context, reserve=max_tokens) for p in asked]
    replies = draw_replies(first.model, pieces, prompts, max_tokens=max_tokens, seed=seed)
    rows = []
    for other in others:
        row: dict[str, Any] = {"a": first.name, "b": other.name, "kl": None}
        if marks:
            ours, theirs = marks[first.name], marks[other.name]
            found = WinRate.of(ours, theirs)
            row |= asdict(found) | {"rate": found.rate}
            row["difference"] = bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])
        if other.tokenizer.sha256 == pieces.sha256:
            nats = kl_nats(first.model, other.model, prompts, replies, pad=pieces.pad_id)
            row["kl"] = bootstrap(nats)
        rows.append(row)
    return rows


def save_answers(
    path: Path,
    asked: Sequence[Prompt],
    answers: dict[str, list[Answer]],
    marks: dict[str, list[float]],
) -> None:
    """One line a prompt: what every model said, and the judge's mark."""
    from tinychat.runtime.files import write_atomic

    lines = []
    for number, prompt in enumerate(asked):
        replies = {
            name: {"text": some[number].text, "ended": some[number].ended}
            | ({"mark": round(marks[name][number], 4)} if marks else {})
            for name, some in answers.items()
        }
        messages = [{"role": m.role, "content": m.content} for m in prompt]
        line = json.dumps({"prompt": messages, "replies": replies}, ensure_ascii=False)
        lines.append(line.encode() + b"\n")
    write_atomic(path, lines)


def footnotes(seconds: float) -> dict[str, Any]:
    from tinychat import __version__
    from tinychat.runtime.device import describe_hardware

    return {
        "seconds": round(seconds, 1),
        "hardware": describe_hardware(),
        "tinychat": __version__,
    }
