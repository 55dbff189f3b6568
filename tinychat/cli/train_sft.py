"""`tinychat train sft`: wires conversations, base model and loop together, and reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
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
from tinychat.cli.progress import print_samples, training_progress
from tinychat.cli.runs import (
    budget_of,
    check_minutes,
    check_sequence,
    find_checkpoint,
    is_finished,
    override,
    read_record,
    run_folder,
    settings_of,
    update_record,
    write_record,
)
from tinychat.cli.train import Device, Minutes, Resume, Settings, train_app
from tinychat.runtime.device import reuse_memory
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.batch import Batch
    from tinychat.data.records import Dialogue
    from tinychat.gpt import GPT


BASICS = 3  # readings of the basics for one of the dialogues: facts need more of them than manners


def own_dialogues(files: Sequence[str], keep_all: bool) -> list[Dialogue]:
    """Return the conversations of the user's files, and print what was left out and why.

    A file may hold as many as it likes: the cap of chapter 09 is for many people's prompts.
    """
    from tinychat.data.public import read_dialogues
    from tinychat.dialogue import curate

    found = [dialogue for file in files for dialogue in read_dialogues(file)]
    if keep_all or not files:
        return found
    curated = curate(found, cap=None)
    print(
        f"{', '.join(files)}: learning from {len(curated.kept):,} of {len(found):,} conversations"
    )
    for reason, ids in curated.removed.items():
        print(f"  left out: {reason}, {len(ids):,}")
    if curated.removed:
        print("  (--keep-all learns from these too)")
    return curated.kept


@train_app.command()
def sft(
    start: Annotated[
        str, typer.Option("--from", metavar="CKPT", help="The base model to begin with.")
    ] = "base",
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
    from tinychat.data.split import split_of
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
    folder = run_folder(run, resume)
    record: dict[str, Any] = (
        read_record(folder, "from") if resume else {"from": str(find_checkpoint(start))}
    )
    chosen = settings_of(record, settings, minutes)
    config = override(SFTConfig(), chosen)
    path = folder / "sft.safetensors"
    if resume and is_finished(path, minutes, settings, "--minutes or --set epochs=N"):
        return
    files = [str(file) for file in data or []] or record.get("data", [])
    if resume:  # the run goes on with the conversations that it began with
        keep_all = record.get("keep_all", True)
    minutes = minutes or budget_of(record, folder)
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
    def by_split(dialogues: list[Dialogue]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
        for one in dialogues:
            found[split_of(one.id)].append(render(one, pieces, context=config.sequence + 1))
        return found

    rendered = by_split([*corpus.dialogues(), *own_dialogues(files, keep_all)])
    basics = by_split(corpus.basics())
    if not resume:
        write_record(
            folder,
            {
                "from": record["from"],
                "set": chosen,
                "minutes": minutes,
                "data": files,
                "keep_all": keep_all,
            },
        )
    elif settings:
        update_record(folder, record | {"set": chosen})

    def validation(conversations: list[Any] = rendered["validation"]) -> Iterator[Batch]:
        held_out = PackedConversations(conversations, config, pieces.pad_id)
        rows = held_out.rows(0)
        for first in range(0, len(rows), config.batch):
            part = rows[first : first + config.batch]
            yield held_out.batch([*part, *[[]] * (config.batch - len(part))])

    # 3. Train.
    model = model.to(place).train()
    token_bytes_V = bytes_of_tokens(pieces)
    with training_progress("sft", model.config.parameters, True) as (show, stop):
        result = finetune(
            model,
            rendered["train"] + BASICS * basics["train"],
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
    if not result.finished:
        stop_here("sft", run, result.step)

    # 4. Measure, write, show.
    model.eval()
    loss_function = LossFunction(model, dtype=config.loop(1).dtype, compiled=False)
    bits = {
        name: bits_per_byte(loss_function, validation(unseen), token_bytes_V)
        for name, unseen in (
            ("unseen replies", rendered["validation"]),
            ("basics in unseen words", basics["validation"]),
        )
    }
    lineage = lineage_of(
        result,
        data={
            "dialogues": {"licence": "CC0-1.0", "conversations": len(rendered["train"])},
            "basics": {"licence": "CC0-1.0", "conversations": len(basics["train"])},
            **{file: {"licence": "the user's"} for file in files},
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
