"""`tinychat train all`: every stage one after the other, in pieces as long as one likes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinychat.cli.plan import BY_NAME, Plan, Stage, check_plan, check_stage, parse_shares
from tinychat.cli.progress import clock, millions
from tinychat.cli.runs import (
    check_as_begun,
    check_minutes,
    data_as_begun,
    override,
    run_folder,
)
from tinychat.cli.stages import (
    COMMANDS,
    check_sources,
    config_of,
    has_begun,
    learn_vocabulary,
    path_of,
    tokenize,
    trained_minutes,
)
from tinychat.cli.train import Data, Device, Minutes, train_app
from tinychat.cli.train_base import read_tokenizer
from tinychat.runtime.device import environment_number, reuse_memory
from tinychat.runtime.errors import ConfigError
from tinychat.runtime.state import lock_run

if TYPE_CHECKING:
    from tinychat.runtime.checkpoint import CheckpointInfo


@train_app.command("all")
def train_all(
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Size: nano, mini (the default), small or medium."),
    ] = None,
    minutes: Minutes = None,
    data: Data = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run that was stopped or killed; --minutes M makes its whole "
            "budget M.",
        ),
    ] = False,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder name under runs/; the preset's if left out."),
    ] = None,
    tokenizer_file: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", metavar="FILE|new", help="One of your own, or `new` to learn one first."
        ),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE=X", help="A stage's part of the minutes; 0 leaves the stage out."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.KEY=VALUE",
            help="Override a setting of a stage, for instance sft.epochs=4.",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop when this stage is done.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train everything: base, sft, reward, judge, ppo, a second round, and a report.

    Each stage runs as its own command does, in runs/NAME/STAGE. Kill it at any moment: the same
    command with --resume goes on. Example: tinychat train all --preset nano --minutes 5
    """
    reuse_memory()
    plan = read_plan(preset, minutes, data, resume, run, tokenizer_file, share, settings)
    if until is not None:
        check_stage(until, f"--until {until}", {"shards": None} | BY_NAME)
    check_sources(plan, until)
    again = f"tinychat train all --run {plan.folder.name} --resume"
    if not plan.left:
        print(f"{plan.folder} is finished already: {plan.folder / plan.stages[-1].result}.")
        return
    print_plan(plan, device)
    plan.folder.mkdir(parents=True, exist_ok=True)
    lock_run(plan.folder)
    plan.save()
    try:
        run_stages(plan, device, until)
    except (KeyboardInterrupt, typer.Exit):
        print(f"Stopped. Everything so far is kept; go on with: {again}")
        raise typer.Exit(130) from None
    if plan.left:
        print(f"\n{plan.folder} is done until {until}. Go on with: {again}")
    else:
        print_results(plan)


def read_plan(
    preset: str | None,
    minutes: float | None,
    data: Path | None,
    resume: bool,
    run: str | None,
    tokenizer_file: str | None,
    share: list[str] | None,
    settings: list[str] | None,
) -> Plan:
    """A new plan, or the one that is resumed with what was named anew; all of it checked."""
    from tinychat.data.public import data_folder
    from tinychat.gpt import preset as model_preset

    if environment_number("WORLD_SIZE", 1) > 1:
        raise ConfigError(
            "`train all` is one process; start it without torchrun, "
            "or train the stages one by one, the base under torchrun."
        )
    name = run or preset or "mini"
    if "/" in name:
        raise ConfigError(f"--run {name!r} names a stage; name the run, as in --run mini.")
    folder = run_folder(name, resume)
    resume = resume and ((folder / "plan.json").exists() or minutes is None)
    check_minutes(minutes, resume)
    if resume:
        plan = Plan.read(folder)
        check_as_begun(
            folder,
            {
                "--preset": (preset, plan.preset),
                "--tokenizer": (tokenizer_file, plan.tokenizer),
            },
        )
        if any(has_begun(plan, stage) for stage in plan.left):
            data = data_as_begun(folder, {"data": plan.data}, data)
        check_settings_come_in_time(plan, settings or [])
        plan.minutes = minutes or plan.minutes
    else:
        assert minutes is not None
        run_folder(name, resume=False)
        plan = Plan(folder, preset or "mini", minutes, tokenizer=tokenizer_file)
    plan.data = str(data) if data else plan.data
    plan.shares |= parse_shares(share or [])
    again = settings or []
    plan.settings = [*(old for old in plan.settings if old not in again), *again]
    check_plan(plan)
    model_preset(plan.preset)
    for stage in plan.left:
        override(config_of(plan, stage), plan.settings_of(stage))
    data_folder(path_of(plan.data))
    if plan.tokenizer != "new":
        read_tokenizer(path_of(plan.tokenizer))
    return plan


def check_settings_come_in_time(plan: Plan, settings: list[str]) -> None:
    """Refuse a new setting of a stage that keeps to those it has begun with."""
    for setting in settings:
        for stage in plan.stages:
            meant = setting.partition(".")[0] in (stage.kind, stage.name)
            if meant and setting not in plan.settings and has_begun(plan, stage):
                raise ConfigError(
                    f"--set {setting} comes too late: {plan.folder / stage.name} has begun with "
                    "its settings; leave it out, or set it for a stage still to come."
                )


def run_stages(plan: Plan, device: str, until: str | None) -> None:
    """Do what is left, stage by stage; what a stage needs of the ones before lies in their files.

    1. a vocabulary, if a new one is wanted; 2. text to tokens; 3. the stages.
    """
    import torch

    for name, work in (("tokenizer", learn_vocabulary), ("shards", tokenize)):
        if name not in plan.used:
            started = time.monotonic()
            work(plan)
            plan.finish(name, (time.monotonic() - started) / 60)
            if name == until:
                return
    count = len(plan.stages)
    for number, stage in enumerate(plan.stages, 1):
        if stage.name not in plan.used:
            started = time.monotonic()
            begun = plan.allot(stage)
            print(f"\n[{number}/{count}] {stage.name}: {stage.about}, {clock(begun * 60)}")
            plan.begin(stage, begun)
            COMMANDS[stage.kind](plan, stage, device)
            took = (time.monotonic() - started) / 60
            print(f"[{number}/{count}] {figures(plan, stage)}, {clock(took * 60)} in this process")
            plan.finish(stage.name, max(took, trained_minutes(plan, stage)))
            torch.compiler.reset()  # the next model is another one
            torch.cuda.empty_cache()
        if stage.name == until:
            return


def figures(plan: Plan, stage: Stage) -> str:
    """What came out of a stage, in one line."""
    from tinychat.runtime.checkpoint import read_info

    path = plan.folder / stage.result
    if stage.kind == "eval":
        pairs = json.loads(path.read_text(encoding="utf-8"))["pairs"]
        rates = [
            f"{row['a']} beats {row['b']} in {row['rate'][0]:.0%}" for row in pairs if "rate" in row
        ]
        return ", ".join([str(path), *rates])
    info = read_info(path)
    return f"{path}: {info.bytes / 1e6:.1f} MB, {figure(info)}"


def figure(info: CheckpointInfo) -> str:
    """The one number of a stage that says how good it is."""
    metrics = info.metrics
    if info.stage == "reward":
        return f"right on {metrics['accuracy']:.1%} of held-out pairs"
    if info.stage == "rlhf":
        before, after = metrics["before"], metrics["after"]
        return f"mark {before['score']:+.2f} to {after['score']:+.2f}, KL {after['kl']:.1f} nats"
    bits = metrics["bits_per_byte"]
    return f"{sum(bits.values()) / len(bits):.3f} bits per byte on unseen text"


def print_plan(plan: Plan, device: str) -> None:
    """What will be done, and where; what is done already is said too."""
    from tinychat.gpt import preset as model_preset
    from tinychat.runtime.device import pick_device

    place = pick_device(device)
    parameters = millions(model_preset(plan.preset).parameters)
    source = plan.data or "the embedded corpus"
    print(f"{plan.preset}: {parameters}, {plan.minutes:g} minutes on {place}, reading {source}")
    for stage in plan.stages:
        path = plan.folder / stage.result
        if stage.name in plan.used:
            when = "done"
        else:
            when = clock(plan.allot(stage) * 60) if stage.kind != "eval" else ""
        print(f"  {stage.name:9} {when:>7}  {stage.about:42} {path}")


def print_results(plan: Plan) -> None:
    total = sum(plan.used.values())
    print(f"\n{plan.folder}: all done in {clock(total * 60)}.")
    for stage in plan.stages:
        print(f"  {stage.name:9} {clock(plan.used[stage.name] * 60):>7}  {figures(plan, stage)}")
    talks = [stage for stage in plan.stages if stage.kind in ("sft", "ppo")]
    if talks:
        print(f"Talk to it: tinychat chat --ckpt {plan.folder / talks[-1].result}")
