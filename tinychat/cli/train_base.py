"""`tinychat train base`: wires text, model and loop together, and draws the progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.lineage import tokens_read
from tinychat.cli.outcome import (
    curve,
    last_loss,
    lineage_of,
    print_next,
    source_record,
    stop_here,
    write_checkpoint,
)
from tinychat.cli.processes import check_shared_alike, first_alone, join_processes
from tinychat.cli.progress import print_samples, shards_progress, training_progress
from tinychat.cli.runs import (
    budget_of,
    check_as_begun,
    check_minutes,
    check_sequence,
    check_unchanged,
    data_as_begun,
    find_checkpoint,
    is_finished,
    make_mix,
    make_shards,
    override,
    read_record,
    run_folder,
    settings_of,
    update_record,
    without_compiling,
    write_record,
)
from tinychat.cli.train import Data, Device, Minutes, Resume, Settings, train_app
from tinychat.runtime.device import reuse_memory
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.batch import Batch
    from tinychat.data.shards import TokenShard
    from tinychat.gpt import GPT, GPTConfig
    from tinychat.tokenizer import Tokenizer

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
        typer.Option(
            "--from",
            metavar="CKPT",
            help="Begin with a checkpoint; what it has read often is read less.",
        ),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Pretrain a base model on text, from random weights to `runs/NAME/base.safetensors`.

    Example: tinychat train base --preset nano --minutes 2
    """
    reuse_memory()
    import torch

    from tinychat.data.mix import Mix, Phase
    from tinychat.data.prepare import shard_name
    from tinychat.data.public import data_folder, source_path
    from tinychat.gpt import GPT, config_from, load_model
    from tinychat.gpt import preset as model_preset
    from tinychat.pretraining import (
        LossFunction,
        bits_per_byte,
        bytes_of_tokens,
        pretrain,
        train_preset,
    )
    from tinychat.runtime.checkpoint import read_info
    from tinychat.runtime.device import pick_device, set_threads
    from tinychat.runtime.files import file_sha256

    # 1. Everything that can be wrong is found before the first minute is spent.
    check_minutes(minutes, resume)
    folder = run_folder(run, resume)
    start = str(find_checkpoint(start)) if start is not None else None
    if resume:  # the run goes on with what it began with
        record: dict[str, Any] = read_record(folder, "preset")
        check_as_begun(
            folder,
            {
                "--preset": (preset, record["preset"]),
                "--source": (source or None, record.get("sources")),
                "--tokenizer": (tokenizer_file and str(tokenizer_file), record.get("tokenizer")),
                "--from": (start, record.get("from")),
            },
        )
        start, source = record.get("from"), record.get("sources")
        data = data_as_begun(folder, record, data)
        tokenizer_file = Path(record["tokenizer"]) if record.get("tokenizer") else None
    else:
        if start is not None:
            size = size_of(config_from(read_info(start)))
            if preset not in (None, size):
                raise ConfigError(f"{start} is no {preset} model; leave --preset out.")
            preset = size
        record = {"preset": preset or "mini"}
    chosen = settings_of(record, settings, minutes)
    within = minutes or record.get("minutes")
    config = override(train_preset(record["preset"]), without_compiling(within, chosen))
    path = folder / "base.safetensors"
    if resume and is_finished(path, minutes, settings, "--minutes"):
        return
    minutes = minutes or budget_of(record, folder)
    shape = replace(model_preset(record["preset"]), context=max(1024, config.sequence))
    rank, world = join_processes()
    rows = config.batch * world
    if resume:
        check_shared_alike(folder, record, world, rows)
    place = pick_device(device)
    set_threads()
    pieces = read_tokenizer(tokenizer_file)
    public = data_folder(data)
    shape = replace(shape, vocab_size=pieces.vocab_size)
    own_files = {name: file_sha256(source_path(name, public)) for name in source or []}
    for name, digest in record.get("sha256", {}).items():
        check_unchanged(name, own_files.get(name, digest), digest)
    start_digest = file_sha256(start) if start is not None else None
    if start_digest is not None and record.get("from_sha256"):
        check_unchanged(str(start), start_digest, record["from_sha256"])

    # 2. Text becomes token shards, once for each tokenizer.
    names, shards = read_text(public, pieces, own_files, rank, world)
    train = shards["train"]

    # 3. The model.
    torch.manual_seed(config.seed)
    origin: dict[str, Any] = {}
    read: dict[str, float] = {}
    if start is not None:
        model, own, info = load_model(find_checkpoint(start))
        origin = {"parent_sha256": start_digest, "ancestors": [info.lineage]}
        labels = [shard_name(name) for name in own_files]
        read = tokens_read(info.lineage, {label: train[label].sha256 for label in labels})
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
                "from_sha256": start_digest,
                "data": str(data) if data else None,
                "tokenizer": str(tokenizer_file) if tokenizer_file else None,
                "sources": source,
                "sha256": own_files,
                "processes": world,
                "rows": rows,
            },
        )
    elif rank == 0:
        now = {"set": chosen, "minutes": minutes, "data": data and str(data)}
        update_record(folder, record, **now, processes=world, rows=rows)

    def mix_of(micro_steps: int) -> Mix:
        return make_mix(train, config.sequence, config.seed, micro_steps * rows, read)

    def batches_from(micro_step: int, micro_steps: int) -> Iterator[Batch]:
        return mix_of(micro_steps).batches(micro_step, rows, micro_steps - micro_step, rank, world)

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
    if not result.finished:
        stop_here("base", run, result.step)

    # 5. Measure, write, show.
    model.eval()
    measure = LossFunction(model, dtype=config.dtype, compiled=False)
    bits = {name: bits_per_byte(measure, windows(name, 4)(), token_bytes_V) for name in here}
    mix = mix_of(result.steps * config.accumulate)
    lineage = lineage_of(
        result,
        data={
            shard_name(name): source_record(name, train[shard_name(name)], mix.passes())
            for name in names
        },
        settings=asdict(config),
        preset=size_of(shape),
        parent=start,
        **origin,
    )
    metrics = {"loss": last_loss(result, folder), "bits_per_byte": bits, "curve": curve(folder)}

    def stored_bits(stored: GPT) -> float:
        exact = LossFunction(stored.to(place), dtype=torch.float32, compiled=False)
        values = [bits_per_byte(exact, windows(name, 1)(), token_bytes_V) for name in here]
        return sum(values) / len(values)

    print_samples(model, pieces, folder, chat=False)
    saved = write_checkpoint(path, model, "base", pieces, lineage, metrics, stored_bits)
    print(f"\n{path}: {saved.bytes / 1e6:.1f} MB. {result.tokens / 1e6:.1f} M tokens read.")
    for name, value in bits.items():
        print(f"  {value:.3f} bits per byte on unseen {name}")
    longer = f"tinychat train base --run {run} --resume --minutes 60"
    print_next(run, f"Next: tinychat train sft --from {path}   Longer: {longer}")


def size_of(shape: GPTConfig) -> str | None:
    """The preset that a model's shape is, whatever its vocabulary; None where it is none."""
    from tinychat.gpt import PRESETS, preset

    for name in PRESETS:
        if replace(preset(name), vocab_size=shape.vocab_size).parameters == shape.parameters:
            return name
    return None


def read_tokenizer(file: Path | None) -> Tokenizer:
    """The tokenizer of a file, or the one that is shipped."""
    from tinychat.data import tokenizer_model
    from tinychat.tokenizer import Tokenizer

    return Tokenizer.from_file(file) if file else Tokenizer(tokenizer_model())


def read_text(
    public: Path | None,
    pieces: Tokenizer,
    own_files: Mapping[str, str],
    rank: int = 0,
    world: int = 1,
) -> tuple[list[str], dict[str, dict[str, TokenShard]]]:
    """The names of all sources, and their token shards `[split][source]`, made where missing."""
    from tinychat.data.prepare import default_sources

    names = [*default_sources(public), *own_files]
    with shards_progress(enabled=rank == 0) as report, first_alone(rank, world):
        return names, make_shards(public, pieces, names, own_files, report)
