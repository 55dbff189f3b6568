"""`tinychat train`: wires data, model and loop together, and draws the progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.progress import print_samples, shards_progress, training_progress
from tinychat.cli.runs import (
    budget_of,
    check_minutes,
    check_sequence,
    check_unchanged,
    curve,
    find_checkpoint,
    first_alone,
    is_written,
    join_processes,
    last_loss,
    lineage_of,
    make_mix,
    make_shards,
    override,
    read_record,
    run_folder,
    settings_of,
    source_record,
    update_record,
    write_checkpoint,
    write_record,
)
from tinychat.runtime.device import reuse_memory
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.batch import Batch
    from tinychat.gpt import GPT

train_app = typer.Typer(
    no_args_is_help=True,
    help="Train a tokenizer, a base model or a chat model of your own.",
)

Minutes = Annotated[
    float | None,
    typer.Option(
        metavar="M", help="Time to train; the learning-rate schedule is fitted to it.", min=None
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="TINYCHAT_DATA",
        metavar="DIR",
        help="Folder with public training text; without it, the embedded corpus alone.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, for instance batch=16."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]

HEADLINES = (
    "tinystories_sample",
    "children_classics",
    "self_dialogue",
    "dialogues",
    "stories",
    "explanations",
    "wikipedia_en_selected",
)


@train_app.command()
def tokenizer(
    data: Data = None,
    vocab_size: Annotated[int, typer.Option(metavar="V", help="Number of pieces.")] = 8192,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the model.")] = Path(
        "runs/tokenizer.model"
    ),
) -> None:
    """Learn a byte-pair vocabulary from text (about two minutes with public data).

    A new tokenizer needs a new base model: give it to `tinychat train base --tokenizer FILE`.
    """
    from tinychat.data.public import data_folder
    from tinychat.data.sample import tokenizer_texts
    from tinychat.tokenizer import train_sentencepiece

    if out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out.")
    texts = tokenizer_texts(data_folder(data))
    started = time.monotonic()
    model = train_sentencepiece(texts, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model)
    print(f"{out}: {vocab_size} pieces learned in {time.monotonic() - started:.0f} s")


@train_app.command()
def base(
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Size: nano, mini (the default), small or medium."),
    ] = None,
    minutes: Minutes = None,
    data: Data = None,
    resume: Resume = False,
    run: Annotated[str, typer.Option(metavar="NAME", help="Folder name under runs/.")] = "base",
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A .txt or .jsonl file of your own; may be repeated."),
    ] = None,
    tokenizer_file: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer of your own.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="CKPT", help="Begin with the weights of a checkpoint."),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Pretrain a base model on text, from random weights to `runs/NAME/base.safetensors`.

    Example: tinychat train base --preset nano --minutes 2
    """
    reuse_memory()
    import torch

    from tinychat.data import tokenizer_model
    from tinychat.data.mix import Mix, Phase
    from tinychat.data.prepare import default_sources, shard_name
    from tinychat.data.public import data_folder, source_path
    from tinychat.gpt import GPT, load_model
    from tinychat.gpt import preset as model_preset
    from tinychat.pretraining import (
        LossFunction,
        bits_per_byte,
        bytes_of_tokens,
        pretrain,
        train_preset,
    )
    from tinychat.runtime.device import pick_device, set_threads
    from tinychat.runtime.files import file_sha256
    from tinychat.tokenizer import Tokenizer

    # 1. Everything that can be wrong is found before the first minute is spent.
    check_minutes(minutes, resume)
    folder = run_folder(run, resume)
    record: dict[str, Any] = (
        read_record(folder, "preset") if resume else {"preset": preset or "mini"}
    )
    if preset not in (None, record["preset"]):
        raise ConfigError(
            f"{folder} holds a {record['preset']} model; leave --preset {preset} out, "
            "or start another run with --run NAME."
        )
    chosen = settings_of(record, settings, minutes)
    config = override(train_preset(record["preset"]), chosen)
    path = folder / "base.safetensors"
    if resume and minutes is None and not settings and is_written(path):
        print(f"{path} is finished already; give --minutes to train it longer.")
        return
    # What a resumed run was begun with holds, unless it is named again.
    start = start or record.get("from")
    source = source or record.get("sources")
    data = data or (Path(record["data"]) if record.get("data") else None)
    tokenizer_file = tokenizer_file or (
        Path(record["tokenizer"]) if record.get("tokenizer") else None
    )
    minutes = minutes or budget_of(record, folder)
    shape = replace(model_preset(record["preset"]), context=max(1024, config.sequence))
    rank, world = join_processes()
    place = pick_device(device)
    set_threads()
    pieces = Tokenizer.from_file(tokenizer_file) if tokenizer_file else Tokenizer(tokenizer_model())
    public = data_folder(data)
    shape = replace(shape, vocab_size=pieces.vocab_size)
    own_files = {name: file_sha256(source_path(name, public)) for name in source or []}
    for name, digest in record.get("sha256", {}).items():
        check_unchanged(name, own_files.get(name, digest), digest)

    # 2. Text becomes token shards, once for each tokenizer.
    names = [*default_sources(public), *own_files]
    with shards_progress(enabled=rank == 0) as report, first_alone(rank, world):
        shards = make_shards(public, pieces, names, own_files, report)
    train = shards["train"]

    # 3. The model.
    torch.manual_seed(config.seed)
    if start is not None:
        model, own, _ = load_model(find_checkpoint(start))
        if own.sha256 != pieces.sha256:
            raise ConfigError(f"{start} has another tokenizer; start from one with the same.")
        shape = model.config
        check_sequence(config.sequence, shape.context)
        model.train()
    else:
        model = GPT(shape)
    model = model.to(place)
    if not resume and rank == 0:
        write_record(
            folder,
            {
                "preset": record["preset"],
                "set": chosen,
                "minutes": minutes,
                "from": start,
                "data": str(data) if data else None,
                "tokenizer": str(tokenizer_file) if tokenizer_file else None,
                "sources": source,
                "sha256": own_files,
            },
        )
    elif settings and rank == 0:
        update_record(folder, record | {"set": chosen})

    def batches_from(micro_step: int, micro_steps: int) -> Iterator[Batch]:
        size = config.batch * world
        mix = make_mix(train, config.sequence, config.seed, micro_steps * size)
        return mix.batches(micro_step, size, micro_steps - micro_step, rank, world)

    here = shards["validation"]

    def windows(name: str, batches: int) -> Callable[[], Iterable[Batch]]:
        """The same windows of unseen text each time; a short text fills one batch in rounds."""
        whole = max(1, min(batches, here[name].tokens // config.sequence // config.batch))
        phase = Phase(1.0, {name: 1.0})
        total = whole * config.batch
        mix = Mix({name: here[name]}, [phase], sequence=config.sequence, seed=0, total=total)
        return lambda: mix.batches(0, config.batch, whole)

    token_bytes_V = bytes_of_tokens(pieces)

    # 4. Train.
    with training_progress(f"base {record['preset']}", shape.parameters, rank == 0) as (show, stop):
        result = pretrain(
            model,
            batches_from,
            config,
            folder,
            minutes=minutes or 0.0,
            validation={name: windows(name, 2) for name in HEADLINES if name in here},
            token_bytes_V=token_bytes_V,
            resume=resume,
            on_step=show,
            should_stop=stop,
        )
    if rank:
        return
    again = f"tinychat train base --run {run} --resume"
    if not result.finished:
        print(f"Stopped and saved at step {result.step}. Go on with: {again}")
        raise typer.Exit(130)

    # 5. Measure, write, show.
    model.eval()
    measure = LossFunction(model, dtype=config.dtype, compiled=False)
    bits = {name: bits_per_byte(measure, windows(name, 4)(), token_bytes_V) for name in here}
    mix = make_mix(train, config.sequence, config.seed, result.steps * config.batch * world)
    lineage = lineage_of(
        result,
        data={
            shard_name(name): source_record(name, train[shard_name(name)], mix.passes())
            for name in names
        },
        settings=asdict(config),
        preset=record["preset"],
        parent=start,
    )
    metrics = {"loss": last_loss(result, folder), "bits_per_byte": bits, "curve": curve(folder)}

    def stored_bits(stored: GPT) -> float:
        exact = LossFunction(stored.to(place), dtype=torch.float32, compiled=False)
        values = [bits_per_byte(exact, windows(name, 1)(), token_bytes_V) for name in here]
        return sum(values) / len(values)

    info = write_checkpoint(path, model, "base", pieces, lineage, metrics, stored_bits)
    print_samples(model, pieces, folder, chat=False)
    print(f"\n{path}: {info.bytes / 1e6:.1f} MB. {result.tokens / 1e6:.1f} M tokens read.")
    for name, value in bits.items():
        print(f"  {value:.3f} bits per byte on unseen {name}")
    print(f"Next: tinychat train sft --from {path}   Longer: {again} --minutes 60")


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
    resume: Resume = False,
    run: Annotated[str, typer.Option(metavar="NAME", help="Folder name under runs/.")] = "sft",
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Fine-tune a base model on conversations, to `runs/NAME/sft.safetensors`.

    Example: tinychat train sft --from runs/base/base.safetensors --set epochs=10
    """
    reuse_memory()
    import torch

    from tinychat.data import corpus
    from tinychat.data.public import read_dialogues
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
    if resume and minutes is None and not settings and is_written(path):
        print(f"{path} is finished already; give --minutes or --set epochs=N to train it longer.")
        return
    files = [str(file) for file in data or []] or record.get("data", [])
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
    dialogues = list(corpus.dialogues())
    for file in files:
        dialogues += read_dialogues(file)
    rendered: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    for dialogue in dialogues:
        rendered[split_of(dialogue.id)].append(
            render(dialogue, pieces, context=config.sequence + 1)
        )
    if not resume:
        write_record(
            folder,
            {
                "from": record["from"],
                "set": chosen,
                "minutes": minutes,
                "data": files,
            },
        )
    elif settings:
        update_record(folder, record | {"set": chosen})
    held_out = PackedConversations(rendered["validation"], config, pieces.pad_id)
    rows = held_out.rows(0)

    def validation() -> Iterator[Batch]:
        for first in range(0, len(rows), config.batch):
            part = rows[first : first + config.batch]
            yield held_out.batch([*part, *[[]] * (config.batch - len(part))])

    # 3. Train.
    model = model.to(place).train()
    token_bytes_V = bytes_of_tokens(pieces)
    with training_progress("sft", model.config.parameters, True) as (show, stop):
        result = finetune(
            model,
            rendered["train"],
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
        print(
            f"Stopped and saved at step {result.step}. "
            f"Go on with: tinychat train sft --run {run} --resume"
        )
        raise typer.Exit(130)

    # 4. Measure, write, show.
    model.eval()
    loss_function = LossFunction(model, dtype=config.loop(1).dtype, compiled=False)
    bits = bits_per_byte(loss_function, validation(), token_bytes_V)
    lineage = lineage_of(
        result,
        data={
            "dialogues": {"licence": "CC0-1.0", "conversations": len(rendered["train"])},
            **{file: {"licence": "the user's"} for file in files},
        },
        settings=asdict(config),
        parent=record["from"],
    )
    lineage["parent_sha256"] = file_sha256(record["from"])
    lineage["ancestors"] = [info.lineage]
    metrics = {
        "loss": last_loss(result, folder),
        "bits_per_byte": {"unseen replies": bits},
        "curve": curve(folder),
    }

    def stored_bits(stored: GPT) -> float:
        exact = LossFunction(stored.to(place), dtype=torch.float32, compiled=False)
        return bits_per_byte(exact, validation(), token_bytes_V)

    saved = write_checkpoint(path, model, "sft", pieces, lineage, metrics, stored_bits)
    print_samples(model, pieces, folder, chat=True)
    print(f"\n{path}: {saved.bytes / 1e6:.1f} MB, {bits:.3f} bits per byte on unseen replies.")
    print(f"Talk to it: tinychat chat --ckpt {path}")


from tinychat.cli import train_reward  # noqa: E402, F401 (adds `tinychat train reward`)
from tinychat.cli import train_ppo  # noqa: E402, F401 (adds `tinychat train ppo`)
