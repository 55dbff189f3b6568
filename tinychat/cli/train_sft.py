"""`tinychat train sft`: wires conversations, base model and loop together, and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.outcome import (
    curve,
    last_loss,
    lineage_of,
    print_next,
    stop_here,
    write_checkpoint,
)
from tinychat.cli.processes import check_shared_alike, join_processes
from tinychat.cli.progress import print_samples, training_progress
from tinychat.cli.runs import (
    budget_of,
    check_as_begun,
    check_minutes,
    check_sequence,
    find_checkpoint,
    is_finished,
    override,
    read_record,
    run_folder,
    settings_of,
    update_record,
    without_compiling,
    write_record,
)
from tinychat.cli.train import Device, Minutes, Resume, Settings, train_app
from tinychat.runtime.device import reuse_memory
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.batch import Batch
    from tinychat.data.records import Dialogue
    from tinychat.dialogue import Rendered
    from tinychat.gpt import GPT


def own_dialogues(
    files: Sequence[str],
    keep_all: bool,
    brief: Callable[[Dialogue], bool] | None = None,
    tell: Callable[[str], None] = print,
) -> list[Dialogue]:
    """Return the conversations of the user's files, and tell what was left out and why.

    A file may hold as many as it likes: the cap of chapter 09 is for many people's prompts.
    `brief` tells whether a conversation's replies are short enough.
    """
    from tinychat.data.public import read_dialogues
    from tinychat.dialogue import curate

    if not files:
        return []
    kept = found = [dialogue for file in files for dialogue in read_dialogues(file)]
    left_out = {}
    if brief:
        kept = list(filter(brief, found))
        left_out["a reply over --longest"] = len(found) - len(kept)
    curated = None if keep_all else curate(kept, cap=None)
    if curated:
        kept = curated.kept
        left_out |= {reason: len(ids) for reason, ids in curated.removed.items()}
    if brief or curated:
        tell(f"{', '.join(files)}: learning from {len(kept):,} of {len(found):,} conversations")
    for reason, count in left_out.items():
        tell(f"  left out: {reason}, {count:,}")
    if curated and curated.removed:
        tell("  (--keep-all learns from these too)")
    return kept


def records_of(files: Sequence[str]) -> dict[str, dict[str, str]]:
    """What a model card must say of each file: a public source is known by its contents."""
    from tinychat.data.public import sources
    from tinychat.runtime.checkpoint import file_sha256

    public = {entry.sha256: entry for entry in sources()}
    found = {}
    for file in files:
        sha256 = file_sha256(file)
        if entry := public.get(sha256):
            about = {"licence": entry.licence, "attribution": entry.attribution}
            found[entry.name] = about | {"sha256": sha256}
        else:
            found[file] = {"licence": "the user's"}
    return found


@train_app.command()
def sft(
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="CKPT", help="The base model to begin with; `base` if left out."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Must be the size of the base model, if given."),
    ] = None,
    minutes: Minutes = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="More conversations, as .jsonl; may be repeated."),
    ] = None,
    keep_all: Annotated[
        bool,
        typer.Option("--keep-all", help="Learn from copies and personal data in FILE, too."),
    ] = False,
    longest: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Leave out what FILE says in longer replies than this."
        ),
    ] = None,
    resume: Resume = False,
    run: Annotated[str, typer.Option(metavar="NAME", help="Folder name under runs/.")] = "sft",
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Fine-tune a base model on conversations, to `runs/NAME/sft.safetensors`.

    Of your own conversations, copies and those with personal data are left out, and counted.

    Example: tinychat train sft --from runs/base/base.safetensors --set epochs=10
    """
    reuse_memory()
    import torch

    from tinychat.data import corpus
    from tinychat.data.split import by_split
    from tinychat.dialogue import render
    from tinychat.gpt import load_model
    from tinychat.gpt import preset as model_preset
    from tinychat.pretraining import LossFunction, bits_per_byte, bytes_of_tokens
    from tinychat.runtime.checkpoint import file_sha256
    from tinychat.runtime.device import pick_device, set_threads
    from tinychat.sft import PackedConversations, SFTConfig, finetune

    # 1. Everything that can be wrong is found before the first minute is spent.
    if minutes is not None:
        check_minutes(minutes, resume)
    if longest is not None and longest < 1:
        raise ConfigError(f"--longest is {longest}; it must be 1 or more.")
    folder = run_folder(run, resume)
    files = [str(file) for file in data or []]
    if resume:  # the run goes on with the conversations that it began with
        record: dict[str, Any] = read_record(folder, "from")
        begun_with = record.get("data", [])
        check_as_begun(
            folder,
            {
                "--from": (start and str(find_checkpoint(start)), record["from"]),
                "--data": (files or None, begun_with),
                "--keep-all": (keep_all or None, record.get("keep_all", True)),
                "--longest": (longest, record.get("longest")),
            },
        )
        files, longest = begun_with, record.get("longest")
        keep_all = record.get("keep_all", True)
    else:
        record = {"from": str(find_checkpoint(start or "base"))}
    chosen = settings_of(record, settings, minutes)
    config = override(SFTConfig(), without_compiling(minutes or record.get("minutes"), chosen))
    path = folder / "sft.safetensors"
    # A run by minutes has as many steps as fitted into them; more epochs would not add any.
    longer = "--minutes" if record.get("minutes") else "--minutes or --set epochs=N"
    if resume and is_finished(path, minutes, settings, longer):
        return
    minutes = minutes or budget_of(record, folder)
    rank, world = join_processes()
    rows = config.batch * world
    if resume:
        check_shared_alike(folder, record, world, rows)
    place = pick_device(device)
    set_threads()
    model, pieces, info = load_model(record["from"])
    if info.stage == "rlhf":
        raise ConfigError(
            f"{record['from']} is an rlhf model, and fine-tuning would undo what its rewards "
            "taught; give --from a base or sft checkpoint."
        )
    check_sequence(config.sequence, model.config.context)
    if preset:
        named = replace(model_preset(preset), vocab_size=pieces.vocab_size)
        if named.parameters != model.config.parameters:
            raise ConfigError(f"{record['from']} is no {preset} model; leave --preset out.")

    # 2. Conversations: our own, and the user's. A validation part is never trained on.
    def rendered(dialogues: list[Dialogue]) -> list[Rendered]:
        return [render(one, pieces, context=config.sequence + 1) for one in dialogues]

    def brief(one: Dialogue, most: int) -> bool:
        said = [turn.content for turn in one.messages if turn.role == "assistant"]
        return all(len(pieces.encode(reply)) <= most for reply in said)

    short = partial(brief, most=longest) if longest else None
    own = own_dialogues(files, keep_all, short, print if rank == 0 else lambda line: None)
    ours, theirs = by_split(corpus.dialogues()), by_split(own)
    talks = {side: [*ours[side], *theirs[side]] for side in ours}
    basics = by_split(corpus.basics())
    train = rendered([*talks["train"], *basics["train"]])
    if not resume and rank == 0:
        write_record(
            folder,
            {
                "from": record["from"],
                "set": chosen,
                "minutes": minutes,
                "data": files,
                "keep_all": keep_all,
                "longest": longest,
                "processes": world,
                "rows": rows,
            },
        )
    elif rank == 0:
        update_record(folder, record, set=chosen, minutes=minutes, processes=world, rows=rows)

    def batches_of(unseen: list[Dialogue]) -> Callable[[], Iterator[Batch]]:
        return PackedConversations(rendered(unseen), config, pieces.pad_id).once

    validation = batches_of(talks["validation"])

    # 3. Train.
    model = model.to(place).train()
    token_bytes_V = bytes_of_tokens(pieces)
    with training_progress("sft", model.config.parameters, rank == 0) as (show, stop):
        result = finetune(
            model,
            train,
            config,
            folder,
            pad=pieces.pad_id,
            minutes=minutes or 0.0,
            validation=validation,
            token_bytes_V=token_bytes_V,
            resume=resume,
            on_step=show,
            should_stop=stop,
        )
    if rank:
        return
    if not result.finished:
        stop_here("sft", run, result.step)

    # 4. Measure, write, show.
    model.eval()
    loss_function = LossFunction(model, dtype=config.loop(1).dtype, compiled=False)
    bits = {
        name: bits_per_byte(loss_function, batches_of(unseen)(), token_bytes_V)
        for name, unseen in (
            ("unseen replies", ours["validation"]),
            ("basics in unseen words", basics["validation"]),
            ("unseen replies of --data", theirs["validation"]),
        )
        if unseen
    }
    lineage = lineage_of(
        result,
        data={
            "dialogues": {"licence": "CC0-1.0", "conversations": len(ours["train"])},
            "basics": {"licence": "CC0-1.0", "conversations": len(basics["train"])},
            **records_of(files),
        },
        settings=asdict(config),
        parent=record["from"],
    )
    lineage["parent_sha256"] = file_sha256(record["from"])
    lineage["ancestors"] = [info.lineage]
    metrics = {
        "loss": last_loss(result, folder),
        "bits_per_byte": bits,
        "curve": curve(folder),
    }

    def stored_bits(stored: GPT) -> float:
        exact = LossFunction(stored.to(place), dtype=torch.float32, compiled=False)
        return bits_per_byte(exact, validation(), token_bytes_V)

    print_samples(model, pieces, folder, chat=True)
    saved = write_checkpoint(path, model, "sft", pieces, lineage, metrics, stored_bits)
    told = f"{bits['unseen replies']:.3f} bits per byte on unseen replies"
    print(f"\n{path}: {saved.bytes / 1e6:.1f} MB, {told}.")
    print_next(run, f"Talk to it: tinychat chat --ckpt {path}")
