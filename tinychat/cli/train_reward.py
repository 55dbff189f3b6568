"""`tinychat train reward`: wires ranked replies to the reward model, and reports how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.outcome import curve, last_loss, lineage_of, print_next, stop_here, write_reward
from tinychat.cli.progress import training_progress
from tinychat.cli.reward_exam import print_exam, print_readers, readers_order, sit_exam
from tinychat.cli.reward_report import print_report, report
from tinychat.cli.reward_samples import in_turn, take_samples, unwritten
from tinychat.cli.runs import (
    budget_of,
    check_as_begun,
    check_minutes,
    check_sequence,
    check_unchanged,
    data_as_begun,
    find_checkpoint,
    is_finished,
    override,
    read_record,
    run_folder,
    settings_of,
    update_record,
    write_record,
)
from tinychat.cli.train import Data, Device, Minutes, Resume, Settings, train_app
from tinychat.runtime.device import reuse_memory
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.groups import Group
    from tinychat.reward_model import RewardModel

OWN_SAMPLES = "on_policy.jsonl"
SAMPLES = 300
GRADED = 2  # readings of the readers' marks: few prompts, and what PPO asks for
EXCHANGED = 300  # of each kind of exchanged replies; thousands of them drown the readers' marks
REFERENCES = 1000  # good replies that set mean, deviation and the slope against length
HELD_OUT = 250  # of each kind in the validation part and in the test part
UNSEEN_PROMPTS = 80  # held-out prompts that the sampler answers too, to measure on


@train_app.command()
def reward(
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="CKPT", help="The chat model to begin with; `sft` if left out."
        ),
    ] = None,
    minutes: Minutes = None,
    data: Data = None,
    resume: Resume = False,
    run: Annotated[str, typer.Option(metavar="NAME", help="Folder name under runs/.")] = "reward",
    judge: Annotated[
        bool,
        typer.Option("--judge", help="Learn from the other half of the prompts, only to measure."),
    ] = False,
    votes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own comparisons, as `tinychat duel` writes them."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Prompts that a model answers itself, to learn its flaws; {SAMPLES} if left out.",
        ),
    ] = None,
    exchanged: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pairs in which the worse reply is a good one to another question, of each of "
            f"three kinds; {EXCHANGED} if left out, 5000 for a model that reads questions closely.",
        ),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CKPT",
            help="A model that answers, may be repeated; the one of --from if left out.",
        ),
    ] = None,
    average: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CKPT",
            help="An earlier reward model from the same chat model, to average the weights with; "
            "may be repeated.",
        ),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Train a reward model on ranked replies, to `runs/NAME/reward.safetensors`.

    Example: tinychat train reward --from sft --votes votes.jsonl
    """
    reuse_memory()
    import torch

    from tinychat.data.corpus import basics
    from tinychat.data.exchange import exchanged as exchange
    from tinychat.data.groups import tokenize_groups
    from tinychat.data.preferences import (
        by_part,
        corpus_answered,
        corpus_flawed,
        corpus_graded,
        corpus_ranked,
        for_judge,
        prompt_key,
        public_ranked,
        read_ranked,
        read_rated,
        read_votes,
        written,
    )
    from tinychat.data.public import data_folder
    from tinychat.data.split import by_split
    from tinychat.gpt import load_model
    from tinychat.reward_model import (
        RewardConfig,
        RewardModel,
        add_words,
        average_weights,
        bag_of_words,
        fit_reward,
        normalize,
    )
    from tinychat.runtime.checkpoint import file_sha256
    from tinychat.runtime.device import pick_device, set_threads

    # 1. Everything that can be wrong is found before the first minute is spent.
    if minutes is not None:
        check_minutes(minutes, resume)
    if samples is not None and samples < 0:
        raise ConfigError(f"--samples is {samples}; give 0 for none, or a number of prompts.")
    if exchanged is not None and exchanged < 0:
        raise ConfigError(f"--exchanged is {exchanged}; give 0 for none, or a number of prompts.")
    folder = run_folder(run, resume)
    samplers_named = [str(find_checkpoint(name)) for name in sampler or []]
    twins_named = [str(find_checkpoint(name)) for name in average or []]
    if resume:  # the run goes on with what it began with
        record = read_record(folder, "reward_of")
        check_as_begun(
            folder,
            {
                "--from": (start and str(find_checkpoint(start)), record["reward_of"]),
                "--judge": (judge or None, record["judge"]),
                "--votes": (votes and str(votes), record["votes"]),
                "--samples": (samples, record["samples"]),
                "--exchanged": (exchanged, record.get("exchanged", EXCHANGED)),
                "--sampler": (samplers_named or None, record["sampler"]),
                "--average": (twins_named or None, record.get("average", [])),
            },
        )
        data = data_as_begun(folder, record, data)
    else:
        record = {
            "reward_of": str(find_checkpoint(start or "sft")),
            "judge": judge,
            "votes": str(votes) if votes else None,
            "samples": SAMPLES if samples is None else samples,
            "exchanged": EXCHANGED if exchanged is None else exchanged,
            "sampler": samplers_named,
            "average": twins_named,
            "data": str(data) if data else None,
        }
        record["sha256"] = file_sha256(record["reward_of"])
    chosen = settings_of(record, settings, minutes)
    config = override(RewardConfig(), chosen)
    path = folder / "reward.safetensors"
    if resume and is_finished(path, minutes, settings, "--minutes or --set epochs=N"):
        return
    check_unchanged(record["reward_of"], file_sha256(record["reward_of"]), record["sha256"])
    minutes = minutes or budget_of(record, folder)
    place = pick_device(device)
    set_threads()
    gpt, pieces, info = load_model(record["reward_of"])
    check_sequence(config.sequence, gpt.config.context)
    twins = [load_twin(name, record, config.surety) for name in record.get("average", [])]
    public = data_folder(data)
    samplers = [gpt]
    if record["sampler"]:
        others = [load_model(name) for name in record["sampler"]]
        for name, (_, its_pieces, _) in zip(record["sampler"], others, strict=True):
            if its_pieces.sha256 != pieces.sha256:
                raise ConfigError(f"{name} has another tokenizer than {record['reward_of']}.")
        samplers = [other for other, _, _ in others]

    # 2. Ranked replies. Half of the training prompts are the judge's alone; votes never are.
    own_votes = read_votes(Path(record["votes"])) if record["votes"] else []
    ranked = [*corpus_ranked(), *corpus_flawed(), *corpus_graded()]
    ranked += public_ranked(public) if public else []
    rated = list(read_rated(public)) if public else []
    parts = by_part(ranked)
    half = [group for group in parts["train"] if for_judge(group.prompt) == record["judge"]]
    strangers = [group for group in parts["train"] if for_judge(group.prompt) != record["judge"]]
    unseen = [*parts["validation"], *parts["test"]]
    if not resume:
        write_record(folder, record | {"set": chosen, "minutes": minutes})
    else:
        update_record(folder, record, set=chosen, minutes=minutes, data=data and str(data))
    answered = by_part(corpus_answered())
    answered["train"] = [
        one for one in answered["train"] if for_judge(one.prompt) == record["judge"]
    ]
    simple, held = by_split(basics()), {prompt_key(group.prompt) for group in unseen}
    simple["train"] = [
        one
        for one in simple["train"]
        if for_judge(one.messages[:-1]) == record["judge"]
        and prompt_key(one.messages[:-1]) not in held
    ]
    foreign = {
        "train": exchange(answered["train"], simple["train"], record.get("exchanged", EXCHANGED)),
        "validation": exchange(answered["validation"], simple["validation"], HELD_OUT),
        "test": exchange(answered["test"], simple["test"], HELD_OUT),
    }
    kept = folder / OWN_SAMPLES
    if record["samples"] and not kept.is_file():
        of_basics = {side: written(some, "basics") for side, some in simple.items()}
        prompts = in_turn(answered["train"], of_basics["train"], unwritten(public, record["judge"]))
        held_out_prompts = in_turn(answered["validation"], of_basics["validation"])
        asked = [
            *islice(prompts, record["samples"]),
            *islice(held_out_prompts, min(UNSEEN_PROMPTS, record["samples"])),
        ]
        take_samples([one.to(place) for one in samplers], pieces, asked, kept, config.seed)
    extra = read_ranked(kept, "on-policy", 0.5) if kept.is_file() else []
    more = by_part(extra)
    votes_of = by_part([] if record["judge"] else own_votes)
    # `duel` asks held-out questions too. One on which a vote teaches measures nothing any more.
    taught = {prompt_key(group.prompt) for group in votes_of["train"] if group.pairs}
    for groups in (parts, foreign, more, votes_of):
        for side in ("validation", "test"):
            groups[side] = [one for one in groups[side] if prompt_key(one.prompt) not in taught]

    def tokens_of(groups: Sequence[Any]) -> list[Group]:
        return tokenize_groups(groups, pieces, sequence=config.sequence, most=config.replies)

    train = tokens_of([*half, *foreign["train"], *more["train"], *votes_of["train"]])
    validation, test = (
        tokens_of([*parts[side], *foreign[side], *more[side], *votes_of[side]])
        for side in ("validation", "test")
    )
    again = [group for group in train if group.ranked.source == "graded"]
    held_out = validation + test
    references = [
        group.tokens[0] for group in tokens_of([g for g in strangers if g.source == "corpus"])
    ][:REFERENCES]

    # 3. Train.
    torch.manual_seed(config.seed)
    model = RewardModel(gpt, pieces.assistant_id, config.surety).to(place).train()
    title = f"reward: {len(train):,} prompts"
    with training_progress(title, gpt.config.parameters, True) as (show, stop):
        result = fit_reward(
            model,
            train + again * (GRADED - 1),
            config,
            folder,
            pad=pieces.pad_id,
            minutes=minutes or 0.0,
            validation=[group for group in validation if group.ranked.source == "corpus"],
            resume=resume,
            on_step=show,
            should_stop=stop,
        )
    if not result.finished:
        stop_here("reward", run, result.step)

    # 4. Set zero and yardstick, measure, write, show.
    model.eval()
    average_weights(model, twins)
    words = bag_of_words(train, pieces.vocab_size)
    add_words(model, words, references, pieces.pad_id, share=config.words)
    normalize(model, references, pieces.pad_id)
    metrics = report(model, words, held_out, pieces, rated)
    chat = load_model(record["reward_of"])[0].to(place)  # `gpt` has become the reward model
    exam = sit_exam(model, chat, pieces, [*simple["validation"], *simple["test"]], config.seed)
    metrics["exam"] = exam
    metrics["readers"] = readers = readers_order(model, chat, pieces, held_out)
    metrics |= {"loss": last_loss(result, folder), "curve": curve(folder)}
    lineage = lineage_of(
        result,
        data=sources_of(train, votes=record["votes"]),
        settings=asdict(config),
        parent=record["reward_of"],
        parent_sha256=record["sha256"],
        half="judge" if record["judge"] else "reward",
        sampler=", ".join(record["sampler"]) or record["reward_of"],
        averaged_with=[file_sha256(name) for name in record.get("average", [])],
        ancestors=[info.lineage],
    )
    saved = write_reward(path, model, pieces, lineage, metrics, references)
    print_report(metrics)
    print_exam(exam)
    print_readers(readers)
    print(f"\n{path}: {saved.bytes / 1e6:.1f} MB.")
    if record["judge"]:
        print("A judge: measure with it, and never train a policy on it.")
    else:
        print_next(run, f"Next: tinychat train ppo --from {record['reward_of']} --reward {path}")


def load_twin(name: str, record: dict[str, Any], surety: float) -> RewardModel:
    """A reward model to average with.

    ConfigError unless it began with the same chat model and surety, and learned from the same half.
    """
    from tinychat.reward_model import load_reward

    twin, _, info = load_reward(name)
    if info.lineage.get("parent_sha256") != record["sha256"]:
        raise ConfigError(
            f"{name} began with another chat model than {record['reward_of']}; "
            "only twins can be averaged."
        )
    half = "judge" if record["judge"] else "reward"
    if info.lineage.get("half") != half:
        raise ConfigError(
            f"{name} learned from the half of the prompts named {info.lineage.get('half')!r}, "
            f"and this one must only know {half!r}; average it with one of its own half."
        )
    its = float(twin.surety)
    if abs(its - surety) > 1e-6:
        raise ConfigError(
            f"{name} was trained with surety {its:g}, and this one would be with {surety:g}; "
            f"add --set surety={its:g}."
        )
    return twin


def sources_of(train: Sequence[Group], votes: str | None) -> dict[str, Any]:
    """What a model card must say of the data."""
    from tinychat.data.public import sources

    public = {entry.name: entry for entry in sources("preference")}
    found: dict[str, Any] = {}
    for group in train:
        name = group.ranked.source
        entry = public.get(name)
        line = found.setdefault(name, {"licence": "CC0-1.0", "prompts": 0})
        line["prompts"] += 1
        if entry:
            line |= {"licence": entry.licence, "attribution": entry.attribution}
            line["sha256"] = entry.sha256
        elif name == "votes":
            line |= {"licence": "the user's", "file": votes}
    return found
