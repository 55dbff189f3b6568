"""`tinychat train ppo`: wires policy, reward model and prompts to the loop, and reports."""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.card import REPORT
from tinychat.cli.conditions import with_all
from tinychat.cli.contestants import find_judge, find_reward, load_judge
from tinychat.cli.outcome import lineage_of, print_next, stop_here, write_checkpoint
from tinychat.cli.ppo_prompts import (
    checked_prompts,
    conversations_of,
    find_prompts,
    in_chats,
    unseen_batches,
    written_texts,
)
from tinychat.cli.processes import check_shared_alike, join_processes
from tinychat.cli.progress import millions, ppo_progress
from tinychat.cli.reward_exam import right_share
from tinychat.cli.runs import (
    budget_of,
    check_as_begun,
    check_minutes,
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
    from torch import Tensor

    from tinychat.gpt import GPT
    from tinychat.ppo import RewardFunction
    from tinychat.reward_model import RewardModel
    from tinychat.tokenizer import Tokenizer

WEIGHTS = {  # if left out; chapters/lab_notes.md has the runs that chose them
    "marks": 1.0,
    "fit": 0.0,
    "sure": 0.5,
    "rules": 1.0,
    "facts": 1.0,
    "stock": 1.5,
}
# What a chat model's PPO begins with; PPOConfig's own defaults are those of chapter 12's toy.
RECIPE = (
    *("episodes=256", "samples=4", "max_tokens=96", "temperature=0.7"),
    *("epochs=2", "minibatch=128", "lr=0.00012", "warmup=0.2"),
    *("lam=1", "beta=0.1", "kl_target=1", "ptx=0.3"),
)
READ, READ_TOKENS = 8, 256  # rows of conversations beside each minibatch, and their length
PROMPT_TOKENS = 128  # longer prompts are left out: they cost much and say little about the reply


@train_app.command()
def ppo(
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="CKPT", help="The chat model to begin with; `sft` if left out."
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            metavar="CKPT",
            help="The reward model that gives marks; `reward` if left out.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="A reward model of `tinychat train reward --judge` that only looks on: its marks "
            "are written beside the others, so that you see the reward being fooled.",
        ),
    ] = None,
    fit: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much a reply loses that fits its question worse than written ones do; "
            "0, for nothing, if left out.",
        ),
    ] = None,
    marks: Annotated[
        float | None,
        typer.Option(metavar="X", help="How much the reward model's marks count; 1 if left out."),
    ] = None,
    sure: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much a reply earns for each nat a token that the chat model it began with "
            "holds it for likelier; 0 for nothing, 0.5 if left out.",
        ),
    ] = None,
    rules: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much a reply loses that breaks a rule: a word that doesn't exist, one thing "
            "said over and over, no end; 0 for nothing, 1 if left out.",
        ),
    ] = None,
    facts: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much a reply earns that answers a question of the basics right, and loses "
            "that answers it wrong; 0 asks none of them for that, 1 if left out.",
        ),
    ] = None,
    stock: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much a reply loses for stock phrases, for each nat by which more replies to "
            "other questions begin a sentence so than written ones do; 0 for nothing, 1.5 if "
            "left out.",
        ),
    ] = None,
    minutes: Minutes = None,
    data: Data = None,
    resume: Resume = False,
    run: Annotated[str, typer.Option(metavar="NAME", help="Folder name under runs/.")] = "ppo",
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Raise a chat model's marks by PPO, to `runs/NAME/rlhf.safetensors`.

    Example: tinychat train ppo --from sft --reward reward --minutes 30
    """
    reuse_memory()
    from tinychat.data import corpus
    from tinychat.data.facts import Facts
    from tinychat.data.split import by_split
    from tinychat.gpt import load_model
    from tinychat.ppo import ActorCritic, PPOConfig, collect, summary, train_ppo
    from tinychat.pretraining import LossFunction, Result, bits_per_byte, bytes_of_tokens
    from tinychat.reward_model import load_reward, score
    from tinychat.runtime.checkpoint import file_sha256
    from tinychat.runtime.device import pick_device, set_threads
    from tinychat.sft import PackedConversations, SFTConfig

    # 1. Everything that can be wrong is found before the first minute is spent.
    given = {
        "marks": marks,
        "fit": fit,
        "sure": sure,
        "rules": rules,
        "facts": facts,
        "stock": stock,
    }
    for name, weight in given.items():
        if weight is not None and not 0 <= weight < float("inf"):
            raise ConfigError(f"--{name} is {weight}; give 0 or a number above it.")
    if minutes is not None:
        check_minutes(minutes, resume)
    folder = run_folder(run, resume)
    if resume:  # the run goes on with what it began with
        record = read_record(folder, "reward")
        for name, named in (("from", start), ("reward", reward), ("judge", judge)):
            found = str(find_checkpoint(named)) if named else None
            check_as_begun(folder, {f"--{name}": (found, record.get(name))})
        check_as_begun(folder, {f"--{name}": (x, record.get(name)) for name, x in given.items()})
        data = data_as_begun(folder, record, data)
    else:
        record = {
            "from": str(find_checkpoint(start or "sft")),
            "reward": str(find_checkpoint(reward) if reward else find_reward()),
        }
        if judge:
            record["judge"] = str(find_checkpoint(judge))
        record["sha256"] = {name: file_sha256(path) for name, path in record.items()}
        record |= WEIGHTS | {name: x for name, x in given.items() if x is not None}
    new = settings if resume else [*RECIPE, *(settings or [])]
    chosen = settings_of(record, new, minutes, ("steps",))  # epochs are those of each rollout
    config = override(PPOConfig(), chosen)
    path = folder / "rlhf.safetensors"
    if resume and is_finished(path, minutes, settings, "--minutes or --set steps=N"):
        return
    for name, digest in record["sha256"].items():
        check_unchanged(record[name], file_sha256(record[name]), digest)
    minutes = minutes or budget_of(record, folder)
    if not minutes and not config.steps and not resume:
        raise ConfigError("How long? Give a budget, for instance --minutes 30 or --set steps=100.")
    rank, world = join_processes()
    shared = {"processes": world, "rows": config.episodes * world}
    if resume:
        check_shared_alike(folder, record, world, shared["rows"], "episodes")
    place = pick_device(device)
    set_threads()
    reference, pieces, info = load_model(record["from"])
    if info.stage == "base":
        raise ConfigError(
            f"{record['from']} is a base model and has no manners to keep yet; "
            "fine-tune it with `tinychat train sft` first."
        )
    marker, its_pieces, reward_info = load_reward(record["reward"])
    check_reads_alike(record["reward"], its_pieces, record["from"], pieces, "a reward model")
    onlooker = None
    if record.get("judge"):
        judge_info = find_judge(record["judge"], [info])
        if record["sha256"]["judge"] == record["sha256"]["reward"]:
            raise ConfigError(
                f"{record['judge']} gives the rewards already; a judge must be another one, "
                "made with `tinychat train reward --judge`."
            )
        onlooker, judge_pieces = load_judge(judge_info, place)
        check_reads_alike(record["judge"], judge_pieces, record["from"], pieces, "a judge")
    reads = min(
        model.config.context
        for model in (reference, marker.gpt, onlooker and onlooker.gpt)
        if model
    )
    room = min(PROMPT_TOKENS, reads - config.max_tokens)
    basics = by_split(corpus.basics())
    known = Facts(basics["train"] if record.get("facts") else ())
    checked = checked_prompts(known, pieces, room)
    prompts, held_out, sources = find_prompts(data, pieces, room, config.max_tokens, checked)
    written = written_texts(checked)  # before a question stands among the checked ones twice
    prompts, checked = in_chats(prompts, checked, pieces, room)
    kept = {"set": chosen, "minutes": minutes, "data": str(data) if data else None} | shared
    if not resume and rank == 0:
        write_record(folder, record | kept)
    elif rank == 0:
        update_record(folder, record, **kept)

    def marks_of(model: RewardModel) -> RewardFunction:
        def read(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
            texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
            return score(model, texts, pieces.pad_id)

        return read

    # 2. The same held-out prompts and the same dice, before and after.
    from tinychat.generation import make_generator, stop_ids

    reference = reference.to(place)
    rewards = with_all(
        marks_of(marker.to(place)),
        record,
        reference,
        pieces,
        known,
        checked,
        written,
    )
    unseen_facts = Facts(basics["validation"])
    tokens: dict[str, Any] = {"stop": stop_ids(pieces), "end": pieces.end_id, "pad": pieces.pad_id}

    def measure(gpt: GPT) -> tuple[list[list[int]], list[float], dict[str, float]]:
        look = collect(
            ActorCritic(gpt),
            reference,
            held_out,
            rewards,
            replace(config, samples=1),
            beta=0.0,
            **tokens,
            generator=make_generator(0, place),
        )
        found = summary(look)
        found["right"] = right_share(gpt, pieces, unseen_facts)
        if onlooker:
            found["judge"] = float(marks_of(onlooker)(held_out, look.replies).mean())
        return look.replies, look.scores_B.tolist(), found

    policy = ActorCritic(copy.deepcopy(reference))
    reference.requires_grad_(False)
    if rank == 0:
        old_replies, old_scores, before = measure(reference)

    conversations = None
    if config.ptx:
        read = conversations_of(pieces, READ_TOKENS + 1)
        packed = PackedConversations(
            read, SFTConfig(batch=READ, sequence=READ_TOKENS), pieces.pad_id
        )
        conversations = partial(packed.batches, rank=rank, world=world)

    # 3. Train.
    title = f"ppo: {len(prompts):,} prompts, {millions(reference.config.parameters)}"
    with ppo_progress(title, rank == 0) as (show, stop):
        done = train_ppo(
            policy,
            reference,
            prompts,
            rewards,
            config,
            folder,
            **tokens,
            minutes=minutes or 0.0,
            judge=marks_of(onlooker) if onlooker else None,
            conversations=conversations,
            resume=resume,
            on_step=show,
            should_stop=stop,
        )
    if rank:
        return
    if not done.finished:
        stop_here("ppo", run, done.step)

    # 4. Measure, write, show.
    gpt = policy.gpt.eval()
    result = Result(done.step, done.steps, done.tokens, done.seconds, 0.0, {})
    lineage = lineage_of(
        result,
        data=sources,
        settings=asdict(config),
        parent=record["from"],
        parent_sha256=record["sha256"]["from"],
        reward=record["reward"],
        reward_sha256=record["sha256"]["reward"],
        ancestors=[info.lineage, reward_info.lineage],
    )
    metrics = {
        "held_out_prompts": len(held_out),
        "before": before,
        "curve": score_curve(folder),
    }
    token_bytes_V = bytes_of_tokens(pieces)

    def stored_bits(stored: GPT) -> float:
        exact = LossFunction(stored.to(place), compiled=False, dtype=PPOConfig().dtype)
        return bits_per_byte(exact, unseen_batches(pieces, stored.config.context), token_bytes_V)

    def figures_of(stored: GPT) -> dict[str, Any]:
        replies, scores, after = measure(stored.to(place))
        write_samples(
            folder / "samples.txt", pieces, held_out, (old_replies, old_scores), (replies, scores)
        )
        return {"after": after}

    # PPO moves most weights by less than half an int8 step: on the grid that they came from they
    # would be rounded back, and the policy would be the model it began with.
    saved = write_checkpoint(
        path,
        gpt,
        "rlhf",
        pieces,
        lineage,
        metrics,
        stored_bits,
        levels=113 if info.stage == "rlhf" else 120,
        figures_of=figures_of,
    )
    after = saved.metrics["after"]
    print(f"{f'On {len(held_out)} unseen prompts:':42}    before    after")
    for name, meaning in REPORT.items():
        if name in before:
            print(f"  {meaning:40} {before[name]:9.3f} {after[name]:9.3f}")
    print(f"{path}: {saved.bytes / 1e6:.1f} MB. Replies side by side: {folder / 'samples.txt'}")
    print_next(run, f"Talk to it: tinychat chat --ckpt {path}")


def check_reads_alike(
    name: str, its_pieces: Tokenizer, start: str, pieces: Tokenizer, what: str
) -> None:
    if its_pieces.sha256 != pieces.sha256:
        raise ConfigError(
            f"{name} has another tokenizer than {start}; train {what} from this chat model."
        )


def score_curve(folder: Path, points: int = 60) -> list[list[float]]:
    """About `points` rows of the run: step, score, KL and, where one looked on, a judge's mark."""
    from tinychat.runtime.metrics import read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    every = max(1, len(rows) // points)
    shown = [name for name in ("score", "kl", "judge") if rows and name in rows[0]]
    return [[r["step"], *(round(r[name], 4) for name in shown)] for r in rows[::every]]


def write_samples(
    path: Path,
    pieces: Tokenizer,
    prompts: list[list[int]],
    before: tuple[list[list[int]], list[float]],
    after: tuple[list[list[int]], list[float]],
) -> None:
    """Every held-out prompt with both replies and their marks: read them, marks can be fooled."""
    lines = []
    for prompt, old, old_score, new, new_score in zip(prompts, *before, *after, strict=True):
        openers = [n for n, id in enumerate(prompt) if id in (pieces.user_id, pieces.assistant_id)]
        lines += [
            f"{pieces.piece(prompt[begin])} {pieces.decode(prompt[begin:stop]).strip()}"
            for begin, stop in itertools.pairwise(openers)
        ]
        for name, reply, value in (("before", old, old_score), ("after", new, new_score)):
            cut = "" if reply[-1] == pieces.end_id else " [cut]"
            lines.append(f"{name:>6} {value:+.2f}  {pieces.decode(reply).strip()}{cut}")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
