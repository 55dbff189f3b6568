"""What each stage of `train all` calls: the training commands themselves, with a plan's values."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinychat.cli.evaluate import evaluate
from tinychat.cli.plan import BY_NAME, Plan, Stage
from tinychat.cli.progress import clock
from tinychat.cli.runs import first_run, override, without_compiling
from tinychat.cli.train import tokenizer
from tinychat.cli.train_base import base, read_text, read_tokenizer
from tinychat.cli.train_ppo import ppo
from tinychat.cli.train_reward import reward
from tinychat.cli.train_sft import sft

SAVE = "save_minutes=1"  # what a kill may cost
QUICK = 10.0  # minutes in all below which the steps are small: otherwise too few would fit
SMALL_STEPS = {
    "base": ["batch=8"],
    "sft": ["batch=4"],
    "reward": ["batch=4"],
    "ppo": ["episodes=16", "minibatch=8", "max_tokens=32"],
}
PROMPTS_A_MINUTE = 12  # of the whole budget, up to 300: for sampling and for the report


def config_of(plan: Plan, stage: Stage) -> Any:
    """The settings of a stage before `--set`."""
    from tinychat.ppo import PPOConfig
    from tinychat.pretraining import TrainConfig, train_preset
    from tinychat.reward_model import RewardConfig
    from tinychat.sft import SFTConfig

    if stage.kind == "base":
        return train_preset(plan.preset)
    return {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}.get(
        stage.kind, TrainConfig
    )()


def learn_vocabulary(plan: Plan) -> None:
    out = plan.folder / "tokenizer.model"
    if plan.tokenizer == "new" and not out.exists():
        tokenizer(data=path_of(plan.data), vocab_size=8192, out=out)


def tokenize(plan: Plan) -> None:
    """Make the token shards that the base will read: its own command finds them made."""
    from tinychat.data.public import data_folder

    started = time.monotonic()
    shards = read_text(data_folder(path_of(plan.data)), read_tokenizer(tokenizer_of(plan)), {})[1]
    tokens = sum(shard.tokens for shard in shards["train"].values())
    print(
        f"\n{tokens / 1e6:.1f} M tokens of {len(shards['train'])} sources, "
        f"{clock(time.monotonic() - started)}"
    )


def path_of(name: str | None) -> Path | None:
    return Path(name) if name else None


def tokenizer_of(plan: Plan) -> Path | None:
    return plan.folder / "tokenizer.model" if plan.tokenizer == "new" else path_of(plan.tokenizer)


def has_begun(plan: Plan, stage: Stage) -> bool:
    """True where a stage has a record of what it began with, and keeps to it."""
    return (plan.folder / stage.name / "run.json").is_file()


def check_sources(plan: Plan, until: str | None) -> None:
    """Refuse a data folder that lacks what a stage still to come will read, hours later.

    The base takes what is there.
    """
    from tinychat.data.preferences import PUBLIC, RATINGS
    from tinychat.data.public import data_folder, source_path
    from tinychat.data.sample import SAMPLE
    from tinychat.data.unseen import PUBLIC_PROMPTS

    public = data_folder(path_of(plan.data))
    if public is None:
        return
    names = [*SAMPLE] if plan.tokenizer == "new" and "tokenizer" not in plan.used else []
    for stage in plan.stages if until != "shards" else ():
        if stage.name not in plan.used:
            names += [*PUBLIC, RATINGS] if stage.kind == "reward" else []
            names += [PUBLIC_PROMPTS] if stage.kind in ("reward", "ppo", "eval") else []
        if stage.name == until:
            break
    for name in names:
        source_path(name, public)


def common(
    plan: Plan,
    stage: Stage,
    device: str,
    more: list[str] | None = None,
    **begun_with: Any,
) -> dict[str, Any]:
    """What every training command is called with: a new run, or the one that was begun."""
    run = f"{plan.folder.name}/{stage.name}"
    if first_run(plan.folder / stage.name):
        small = SMALL_STEPS[stage.kind] if plan.minutes < QUICK else []
        settings = [SAVE, *small, *(more or []), *plan.settings_of(stage)]
        minutes: float | None = plan.trained[stage.name]
    else:  # it knows what it was begun with, its minutes and settings too
        settings, minutes, begun_with = [], None, {}
    return {
        **begun_with,
        "run": run,
        "minutes": minutes,
        "settings": settings or None,
        "resume": not settings,
        "device": device,
    }


def compiling(plan: Plan, stage: Stage) -> list[str]:
    """What a stage's minutes say of compiling; it is kept with the run, whatever minutes follow."""
    return without_compiling(plan.trained[stage.name], [])


def result(plan: Plan, name: str) -> str:
    return str(plan.folder / BY_NAME[name].result)


def pretrain_base(plan: Plan, stage: Stage, device: str) -> None:
    base(
        preset=plan.preset,
        data=path_of(plan.data),
        tokenizer_file=tokenizer_of(plan),
        **common(plan, stage, device, compiling(plan, stage)),
    )


def finetune_sft(plan: Plan, stage: Stage, device: str) -> None:
    given = common(plan, stage, device, compiling(plan, stage))
    if given["minutes"] is not None and by_epochs(plan, stage):
        given["minutes"] = None
    sft(start=result(plan, "base"), **given)


def by_epochs(plan: Plan, stage: Stage) -> bool:
    """Whether all readings of the conversations fit into the stage's minutes.

    Then it ends by itself, for more readings would only be learned by heart. The base has met
    the same conversations: it knows how many tokens they are, and how many it reads a minute.
    """
    from tinychat.runtime.checkpoint import read_info

    config = override(config_of(plan, stage), plan.settings_of(stage))
    lineage = read_info(result(plan, "base")).lineage
    data = lineage["data"]
    epoch = sum(data[name]["tokens"] for name in ("dialogues", "basics") if name in data)
    speed = lineage["tokens"] / max(lineage["minutes"], 0.05)
    return config.epochs * epoch / speed < plan.trained[stage.name]


def fit_marks(plan: Plan, stage: Stage, device: str) -> None:
    """The reward model, the judge, and the second reward model with both writers' samples."""
    second = stage.name == "reward-2"
    given = common(
        plan,
        stage,
        device,
        ["seed=1"] if stage.name == "judge" else [],
        samples=questions(plan),  # more minutes ask more, but not of a stage that has begun
    )
    reward(
        start=result(plan, "sft"),
        data=path_of(plan.data),
        judge=stage.name == "judge",
        sampler=[result(plan, "sft"), result(plan, "ppo")] if second else None,
        **given,
    )


def raise_marks(plan: Plan, stage: Stage, device: str) -> None:
    (teacher,) = stage.needs
    judge = result(plan, "judge") if BY_NAME["judge"] in plan.stages else None
    ppo(
        start=result(plan, "sft"),
        reward=result(plan, teacher),
        data=path_of(plan.data),
        **common(plan, stage, device, judge=judge),  # one may join later, but not a stage begun
    )


def measure_all(plan: Plan, stage: Stage, device: str) -> None:
    """The report card of all models, judged by the one that taught none of them."""
    names = [one.name for one in reversed(plan.stages) if one.kind in ("ppo", "sft", "base")]
    judge = result(plan, "judge") if BY_NAME["judge"] in plan.stages else None
    evaluate(
        models=[result(plan, name) for name in names],
        judge=judge,
        prompts=questions(plan),
        data=path_of(plan.data),
        brief=plan.minutes < QUICK,
        out=plan.folder / stage.result,
        device=device,
    )


def questions(plan: Plan) -> int:
    return max(16, min(300, round(PROMPTS_A_MINUTE * plan.minutes)))


COMMANDS: dict[str, Callable[[Plan, Stage, str], None]] = {
    "base": pretrain_base,
    "sft": finetune_sft,
    "reward": fit_marks,
    "ppo": raise_marks,
    "eval": measure_all,
}


def trained_minutes(plan: Plan, stage: Stage) -> float:
    """What a stage took over all its pieces; 0 for the report, which trains nothing."""
    from tinychat.runtime.checkpoint import read_info

    path = plan.folder / stage.result
    return read_info(path).lineage["minutes"] if stage.kind != "eval" else 0.0
