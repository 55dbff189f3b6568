"""The plan of `tinychat train all`: which stages, how many minutes each, and what is done.

Kept in `runs/NAME/plan.json`, which is written anew at every turn, so that a run that was killed
at any moment knows where it was. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinychat.cli.errors import nearest
from tinychat.runtime.errors import ConfigError
from tinychat.runtime.files import write_atomic


@dataclass(frozen=True)
class Stage:
    """One step of the way. Its folder is `runs/NAME/` and its name."""

    name: str
    share: float
    "of the minutes that are left when it begins, among the stages still to come"
    kind: str
    "the command that it is: `tinychat train KIND`"
    about: str
    result: str
    "the file that it leaves, below `runs/NAME`"
    needs: tuple[str, ...] = ()


# Pretraining is what a small model lacks most. The rest needs little: fine-tuning and the reward
# models end by themselves after a few readings, and what they leave goes to the stages after them.
STAGES = (
    Stage("base", 0.64, "base", "predict the next token", "base/base.safetensors"),
    Stage("sft", 0.06, "sft", "answer as in our conversations", "sft/sft.safetensors", ("base",)),
    Stage("reward", 0.05, "reward", "tell good replies", "reward/reward.safetensors", ("sft",)),
    Stage("judge", 0.05, "reward", "one to measure with", "judge/reward.safetensors", ("sft",)),
    Stage("ppo", 0.07, "ppo", "raise the marks", "ppo/rlhf.safetensors", ("reward",)),
    Stage("reward-2", 0.04, "reward", "learn from what ppo found", "reward-2/reward.safetensors",
          ("ppo",)),
    Stage("ppo-2", 0.07, "ppo", "raise the new marks, from sft", "ppo-2/rlhf.safetensors",
          ("reward-2",)),
    Stage("report", 0.02, "eval", "measure them all", "report.json", ("sft",)),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
LATE = 0.2  # a stage gets at least this part of its share, however late it is
OVERHEAD = 0.3  # minutes a stage for loading, measuring and writing; at most half of all minutes


@dataclass
class Plan:
    """What a run was asked for, and how far it is."""

    folder: Path
    preset: str
    minutes: float
    data: str | None = None
    tokenizer: str | None = None
    settings: list[str] = field(default_factory=list)
    "as `--set` gave them: STAGE.KEY=VALUE"
    shares: dict[str, float] = field(default_factory=dict)
    "as `--share` gave them"
    trained: dict[str, float] = field(default_factory=dict)
    "minutes that a stage was begun with"
    used: dict[str, float] = field(default_factory=dict)
    "minutes that a finished stage took, in all"

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a folder. Raises ConfigError where there is none."""
        try:
            record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            return cls(folder, **record)
        except (OSError, ValueError, TypeError):
            raise ConfigError(
                f"There is no `train all` to resume in {folder}; start one without --resume, "
                "or name another with --run."
            ) from None

    def save(self) -> None:
        record = asdict(self)
        del record["folder"]
        write_atomic(self.folder / "plan.json", [(json.dumps(record, indent=1) + "\n").encode()])

    def share(self, stage: Stage) -> float:
        return self.shares.get(stage.name, stage.share)

    @property
    def stages(self) -> list[Stage]:
        """The stages of this run in order: a share of 0 leaves one out."""
        return [stage for stage in STAGES if self.share(stage)]

    @property
    def left(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.name not in self.used]

    def allot(self, stage: Stage) -> float:
        """Minutes to train in a waiting stage: its part of what the finished ones left."""
        if stage.name in self.trained:
            return self.trained[stage.name]
        overhead = min(OVERHEAD, self.minutes / 2 / len(self.stages)) * len(self.left)
        rest = self.minutes - sum(self.used.values()) - overhead
        fair = rest * self.share(stage) / sum(self.share(one) for one in self.left)
        whole = sum(self.share(one) for one in self.stages)
        return max(fair, LATE * self.minutes * self.share(stage) / whole)

    def begin(self, stage: Stage, minutes: float) -> None:
        self.trained[stage.name] = minutes
        self.save()

    def finish(self, name: str, minutes: float) -> None:
        self.used[name] = minutes
        self.save()

    def settings_of(self, stage: Stage) -> list[str]:
        """The `--set` texts of a stage: those of its kind first, then its own."""
        found = []
        for prefix in dict.fromkeys((stage.kind, stage.name)):
            found += [
                setting.partition(".")[2]
                for setting in self.settings
                if setting.partition(".")[0] == prefix
            ]
        return found


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """`["base=0.7", "judge=0"]` as a table. Raises ConfigError."""
    shares = {}
    for text in texts:
        name, equals, value = text.partition("=")
        check_stage(name, f"--share {text}", BY_NAME)
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not equals or not 0 <= share < 1e6:
            raise ConfigError(f"--share {text}: give a number from 0, as in --share {name}=0.1.")
        shares[name] = share
    return shares


def check_stage(name: str, where: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(f"{where} names no stage.{hint} There are {', '.join(known)}.")


def check_plan(plan: Plan) -> None:
    """Refuse a plan in which a stage lacks what it builds on, or a setting has no stage."""
    names = {stage.name for stage in plan.stages}
    if not names:
        raise ConfigError("Every stage has a share of 0; leave one in.")
    for stage in plan.stages:
        for need in stage.needs:
            if need not in names:
                raise ConfigError(
                    f"{stage.name} builds on {need}, whose share is 0; "
                    f"give {stage.name} a share of 0 too."
                )
    known = {stage.name: None for stage in STAGES if stage.kind != "eval"}
    for setting in plan.settings:
        name, dot, _ = setting.partition(".")
        check_stage(name if dot else "", f"--set {setting}", known)
