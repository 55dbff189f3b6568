"""How a training run ends: stopped, or with a checkpoint, its figures and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from tinychat.data.shards import TokenShard
    from tinychat.gpt import GPT
    from tinychat.pretraining import Result
    from tinychat.reward_model import RewardModel
    from tinychat.runtime.checkpoint import CheckpointInfo
    from tinychat.tokenizer import Tokenizer

PROBED = 400  # references that tell how far int8 moves a reward model's marks
Kind = Literal["int8", "bf16"]
M = TypeVar("M")


def stop_here(stage: str, run: str, step: int) -> NoReturn:
    """Say how to go on with a run that Ctrl-C stopped, and leave as the shell expects."""
    import typer

    print(
        f"Stopped and saved at step {step}. Go on with: tinychat train {stage} --run {run} --resume"
    )
    raise typer.Exit(130)


def print_next(run: str, hint: str) -> None:
    """Say what to do next, unless the run is a part of `train all`, which does it by itself."""
    if "/" not in run:
        print(hint)


def source_record(name: str, shard: TokenShard, passes: Mapping[str, float]) -> dict[str, Any]:
    """What a model card must say of a source."""
    from tinychat.data.prepare import EMBEDDED
    from tinychat.data.public import sources

    public = {entry.name: entry for entry in sources()}.get(name)
    own, theirs = "the user's", "the user"
    if name in EMBEDDED:
        own, theirs = "CC0-1.0", "tinychat corpus"
    return {
        "licence": public.licence if public else own,
        "attribution": public.attribution if public else theirs,
        "sha256": public.sha256 if public else shard.sha256,
        "tokens": shard.tokens,
        "passes": round(passes[shard.source], 6),
    }


def lineage_of(result: Result, *, data: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Where a checkpoint comes from."""
    from tinychat import __version__
    from tinychat.pretraining import processes
    from tinychat.runtime.device import describe_hardware

    world = processes()[1]
    return {
        "data": dict(data),
        "tokens": result.tokens,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "hardware": describe_hardware(),
        **({"processes": world} if world > 1 else {}),  # each read `batch` rows a step
        "tinychat": __version__,
        **{key: value for key, value in more.items() if value is not None},
    }


def write_checkpoint(
    path: Path,
    model: GPT,
    stage: str,
    pieces: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: dict[str, Any],
    bits_of: Callable[[GPT], float],
    levels: int = 127,
    figures_of: Callable[[GPT], dict[str, Any]] = lambda stored: {},
) -> CheckpointInfo:
    """Write int8 where that costs less than 0.5 % in bits per byte, else bfloat16.

    `bits_of` measures a model; the cost is measured on a file, read back, and so are the further
    metrics that `figures_of` gives.
    """
    from tinychat.gpt import load_model, save_model

    def save(file: Path, kind: Kind) -> CheckpointInfo:
        return save_model(
            file,
            model,
            stage=stage,
            tokenizer=pieces,
            lineage=lineage,
            metrics=metrics,
            quantize=kind,
            levels=levels,
        )

    exact = bits_of(model)

    def cost_of(trial: Path) -> tuple[GPT, float]:
        stored = load_model(trial)[0]
        return stored, 100 * (bits_of(stored) / exact - 1)

    def figures(stored: GPT, cost: float) -> None:
        metrics.update({"storage_cost_percent": round(cost, 3), **figures_of(stored)})

    return _save_smallest(path, save, cost_of, 0.5, figures)


def write_reward(
    path: Path,
    model: RewardModel,
    pieces: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: dict[str, Any],
    references: Sequence[Sequence[int]],
) -> CheckpointInfo:
    """Write int8 where marks move by less than a tenth of a deviation on average, else bf16."""
    from tinychat.reward_model import load_reward, save_reward, score

    probed = references[:PROBED]
    exact = score(model, probed, pieces.pad_id)

    def save(file: Path, kind: Kind) -> CheckpointInfo:
        return save_reward(
            file, model, tokenizer=pieces, lineage=lineage, metrics=metrics, quantize=kind
        )

    def cost_of(trial: Path) -> tuple[RewardModel, float]:
        stored = load_reward(trial)[0].to(model.device)
        return stored, float((score(stored, probed, pieces.pad_id) - exact).abs().mean())

    def figures(stored: RewardModel, cost: float) -> None:
        metrics["storage_moves_marks_by"] = round(cost, 4)

    return _save_smallest(path, save, cost_of, 0.1, figures)


def _save_smallest(
    path: Path,
    save: Callable[[Path, Kind], CheckpointInfo],
    cost_of: Callable[[Path], tuple[M, float]],
    limit: float,
    figures: Callable[[M, float], None],
) -> CheckpointInfo:
    """Try int8 on a file of its own. `path` itself is written last, when all is known.

    For a run whose checkpoint is there is finished.
    """
    trial = path.with_name(".trial.safetensors")  # hidden: nobody takes it for the result
    kinds: tuple[Kind, ...] = ("int8", "bf16")
    for kind in kinds:
        save(trial, kind)
        stored, cost = cost_of(trial)
        if cost < limit:
            break
    figures(stored, cost)
    info = save(path, kind)
    trial.unlink(missing_ok=True)
    return info


def last_loss(result: Result, folder: Path) -> float | None:
    """The loss of the last step, also when this process only finished what another had trained."""
    from tinychat.runtime.metrics import read_metrics

    if result.loss == result.loss:
        return result.loss
    rows = read_metrics(folder / "metrics.jsonl")
    return rows[-1]["loss"] if rows else None


def curve(folder: Path, points: int = 60) -> list[list[float]]:
    """Return about `points` pairs (tokens, mean loss since the last point) of the run."""
    from tinychat.runtime.metrics import read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    size = max(1, len(rows) // points)
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [
        [group[-1]["tokens"], round(sum(row["loss"] for row in group) / len(group), 4)]
        for group in groups
    ]
