"""The models that `tinychat eval` measures, who may judge them, and what they are asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat.runtime.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tinychat.data.unseen import Prompt
    from tinychat.gpt import GPT
    from tinychat.reward_model import RewardModel
    from tinychat.runtime.checkpoint import CheckpointInfo
    from tinychat.tokenizer import Tokenizer

LONGEST = 128  # tokens of a prompt, as in `tinychat train ppo`


@dataclass(frozen=True)
class Contestant:
    """A model to measure, under a name that no other has."""

    name: str
    info: CheckpointInfo
    model: GPT
    tokenizer: Tokenizer


def find_models(names: Sequence[str]) -> dict[str, CheckpointInfo]:
    """The checkpoints under names that tell them apart; CheckpointError for a reward model."""
    from tinychat.runtime.checkpoint import find, read_info
    from tinychat.runtime.search import labels_of

    infos = [read_info(find(name)) for name in names]
    for info in infos:
        if info.stage == "reward":
            raise CheckpointError(
                f"{info.path} is a reward model and writes no replies; "
                "name a chat model, and this one with --judge if it is a judge."
            )
    labels = labels_of(names, [info.path for info in infos])
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ConfigError(f"{twice} is named twice; a model always draws with itself.")
    return dict(zip(labels, infos, strict=True))


def find_judge(name: str, infos: Iterable[CheckpointInfo]) -> CheckpointInfo:
    """The judge's checkpoint, refused where it is a teacher of one of the models."""
    from tinychat.evaluation import check_judge

    info = _find_marker(name, "a judge", "tinychat train reward --judge")
    check_judge(info, infos)
    return info


def find_reward() -> Path:
    """The reward model of `train ppo` where none is named; an error that says how to make one."""
    from tinychat.runtime.search import RUNS, find, find_first

    if find_first("reward") or (RUNS / "reward").is_dir():
        return find("reward")
    raise CheckpointError(
        "There is no reward model yet: make one with `tinychat train reward`, "
        "or name one with --reward CKPT."
    )


def find_teacher(name: str, judge: CheckpointInfo | None) -> CheckpointInfo:
    """The reward model that chooses replies, refused where it is the judge too."""
    from tinychat.runtime.files import file_sha256

    info = _find_marker(name, "a reward model", "tinychat train reward")
    if judge and file_sha256(judge.path) == file_sha256(info.path):
        raise ConfigError(f"{info.path} can't choose and judge; name another one with --judge.")
    return info


def _find_marker(name: str, what: str, made_by: str) -> CheckpointInfo:
    from tinychat.runtime.checkpoint import find, read_info

    info = read_info(find(name))
    if info.stage != "reward":
        raise CheckpointError(
            f"{info.path} is of the stage {info.stage} and gives no marks; "
            f"name {what}, or make one with `{made_by}`."
        )
    return info


def load(name: str, info: CheckpointInfo, place: torch.device) -> Contestant:
    from tinychat.gpt import load_model

    model, tokenizer, _ = load_model(info.path)
    return Contestant(name, info, model.to(place).requires_grad_(False), tokenizer)


def load_judge(info: CheckpointInfo, place: torch.device) -> tuple[RewardModel, Tokenizer]:
    from tinychat.reward_model import load_reward

    marker, tokenizer, _ = load_reward(info.path)
    return marker.to(place), tokenizer


def choose_prompts(
    count: int,
    data: Path | None,
    seed: int,
    max_tokens: int,
    contestants: Sequence[Contestant],
    marker: tuple[RewardModel, Tokenizer] | None,
    screen: Console,
) -> list[Prompt]:
    """Unseen prompts that every model and the judge can read whole, with room for a reply."""
    from tinychat.data.public import data_folder
    from tinychat.data.unseen import unseen_prompts
    from tinychat.dialogue import render_prompt

    readers = {one.tokenizer.sha256: one.tokenizer for one in contestants}
    reads = [one.model.config.context for one in contestants]
    if marker:
        readers[marker[1].sha256] = marker[1]
        reads.append(marker[0].gpt.config.context)
    room = min(LONGEST, min(reads) - max_tokens - 8)
    if room < 1:
        raise ConfigError(
            f"--max-tokens {max_tokens} leaves no room for a prompt: one of the models reads "
            f"{min(reads)} tokens; give fewer."
        )

    def fits(prompt: Prompt) -> bool:
        return all(len(render_prompt(prompt, reader)) <= room for reader in readers.values())

    with screen.status("Choosing prompts that no training has seen ..."):
        return unseen_prompts(count, data_folder(data), seed=seed, fits=fits)
