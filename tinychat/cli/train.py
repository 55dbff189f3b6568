"""`tinychat train`: wires data, model and loop together, and draws the progress."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.batch import Batch
    from tinychat.data.shards import TokenShard
    from tinychat.gpt import GPT
    from tinychat.pretraining import Progress, Result
    from tinychat.runtime.checkpoint import CheckpointInfo
    from tinychat.tokenizer import Tokenizer

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

C = TypeVar("C")

SAMPLE_PROMPTS = ("Once upon a time", "The little dog", "The sun is", "She opened the door and")
CHAT_PROMPTS = (
    "hi",
    "what is your name?",
    "why is the sky blue?",
    "tell me a short story about a fox",
)
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
        str, typer.Option(metavar="NAME", help="Size: nano, mini, small or medium.")
    ] = "mini",
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
    record: dict[str, Any] = read_record(folder, "preset") if resume else {"preset": preset}
    config = override(train_preset(record["preset"]), [*record.get("set", []), *(settings or [])])
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
        if own_files.get(name, digest) != digest:
            raise ConfigError(
                f"{name} has changed since this run began; "
                "put the old file back, or start another run with --run NAME."
            )

    # 2. Text becomes token shards, once for each tokenizer.
    names = [*default_sources(public), *own_files]
    with shards_progress(enabled=rank == 0) as report:
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
                "set": settings or [],
                "minutes": minutes,
                "from": start,
                "data": str(data) if data else None,
                "tokenizer": str(tokenizer_file) if tokenizer_file else None,
                "sources": source,
                "sha256": own_files,
            },
        )

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
    bits = {name: bits_per_byte(measure, windows(name, 8)(), token_bytes_V) for name in here}
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
        values = [bits_per_byte(exact, windows(name, 2)(), token_bytes_V) for name in here]
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
    config = override(SFTConfig(), [*record.get("set", []), *(settings or [])])
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
                "set": settings or [],
                "minutes": minutes,
                "data": files,
            },
        )
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


# Settings and records of a run


def check_minutes(minutes: float | None, resume: bool) -> None:
    """Refuse a budget that can't work; a resumed run may keep the one it had."""
    if minutes is None:
        if not resume:
            raise ConfigError("How long? Give a budget, for instance --minutes 10.")
    elif not 0 < minutes < 1e6:
        raise ConfigError(f"--minutes is {minutes:g}; give a number above 0, for instance 10.")


def override(config: C, settings: Iterable[str]) -> C:
    """Return the config with `key=value` texts applied, each parsed as the type of its field."""
    kinds = {field.name: type(getattr(config, field.name)) for field in fields(config)}  # type: ignore[arg-type]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}."
            raise ConfigError(f"--set {setting} names no setting; {hint}")
        try:
            if kinds[key] is bool:
                parsed: Any = {"true": True, "false": False}[value.lower()]
            else:
                parsed = kinds[key](value)
            if kinds[key] is float and not math.isfinite(parsed):
                raise ValueError
        except (ValueError, KeyError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}
            raise ConfigError(
                f"--set {setting}: {value!r} won't do; {key} must be {wanted[kinds[key]]}."
            ) from None
        config = replace(config, **{key: parsed})  # type: ignore[type-var]
    return config


def check_sequence(sequence: int, context: int) -> None:
    """Refuse rows that are longer than the model reads."""
    if sequence > context:
        raise ConfigError(f"sequence is {sequence}; this model reads at most {context} tokens.")


def run_folder(name: str, resume: bool) -> Path:
    """Return `runs/NAME`; ConfigError for a name that leads elsewhere, or a folder in use."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"--run {name!r} can't name a folder in runs; use letters, digits, '-', '_' and '.'."
        )
    folder = Path("runs") / name
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    return folder


def read_record(folder: Path, needed: str) -> dict[str, Any]:
    """Return what a run was started with; ConfigError where there is none of this kind."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if isinstance(record.get(needed), str):
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(
        f"There is no run to resume in {folder}; start one without --resume, "
        "or name another with --run."
    )


def budget_of(record: Mapping[str, Any], folder: Path) -> float | None:
    """Minutes of a run that was stopped before its number of steps was known, else None.

    Once a state is saved, it knows the number of steps that the first minutes gave.
    """
    return None if any(folder.glob("state-*.safetensors")) else record.get("minutes")


def is_written(path: Path) -> bool:
    """True if the last thing that a run did was to write its checkpoint."""
    states = [state.stat().st_mtime for state in path.parent.glob("state-*.safetensors")]
    return path.exists() and path.stat().st_mtime >= max(states, default=0.0)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Remember what a new run was started with; two that start at once can't share a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "run.json").open("x", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=2) + "\n")
    except FileExistsError:
        raise ConfigError(
            f"{folder} already holds a run; choose another name with --run."
        ) from None


def find_checkpoint(name: str) -> Path:
    from tinychat.runtime.checkpoint import find

    return find(name)


def cache_folder(pieces: Tokenizer) -> Path:
    """Where token shards of this tokenizer are kept."""
    from platformdirs import user_cache_dir

    root = Path(os.environ.get("TINYCHAT_CACHE") or user_cache_dir("tinychat"))
    return root / "shards" / pieces.sha256[:12]


def join_processes() -> tuple[int, int]:
    """Under torchrun, meet the other processes; returns (rank, number of processes)."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


# Data


def make_shards(
    public: Path | None,
    pieces: Tokenizer,
    names: list[str],
    own_files: Mapping[str, str],
    report: Callable[[Any], None],
) -> dict[str, dict[str, TokenShard]]:
    """Return token shards `[split][source]`, in the order of `names`.

    Public files never change. Our corpus changes with the version and a user's file at any time,
    so their shards lie in folders that are named after their contents.
    """
    from importlib.resources import files

    from tinychat.data.prepare import EMBEDDED, SPLITS, prepare, shard_name

    cache = cache_folder(pieces)
    corpus = sorted(files("tinychat.data").joinpath("corpus").iterdir(), key=lambda f: f.name)
    texts = [file.read_bytes() for file in corpus if file.name.endswith(".jsonl")]
    version = hashlib.sha256(b"".join(texts)).hexdigest()
    parts: dict[Path, list[str]] = {}
    for name in names:
        digest = version if name in EMBEDDED else own_files.get(name)
        place = cache / f"of-{digest[:16]}" if digest else cache
        parts.setdefault(place, []).append(name)
    labels = [shard_name(name) for name in names]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"Two sources have the name {doubled.pop()}; rename a file.")
    made: dict[str, dict[str, TokenShard]] = {split: {} for split in SPLITS}
    for place, some in parts.items():
        for split, shards in prepare(public, place, pieces, some, progress=report).items():
            made[split] |= shards
    return {
        split: {label: shards[label] for label in labels if label in shards}
        for split, shards in made.items()
    }


def make_mix(train: Mapping[str, TokenShard], sequence: int, seed: int, total: int) -> Any:
    """The recipe's mix for a run of `total` sequences: a main phase and a final one."""
    from tinychat.data.mix import Mix, Phase
    from tinychat.data.recipe import FINAL, shares

    sizes = {name: shard.tokens for name, shard in train.items()}
    tokens = float(total * sequence)
    phases = [
        Phase(1 - FINAL, shares(sizes, tokens, final=False)),
        Phase(1.0, shares(sizes, tokens, final=True)),
    ]
    return Mix(train, phases, sequence=sequence, seed=seed, total=total)


def source_record(name: str, shard: TokenShard, passes: Mapping[str, float]) -> dict[str, Any]:
    """What a model card must say of a source."""
    from tinychat.data.public import sources

    public = {entry.name: entry for entry in sources()}.get(name)
    own = "CC0-1.0" if name in ("stories", "explanations", "dialogues") else "the user's"
    return {
        "licence": public.licence if public else own,
        "attribution": public.attribution if public else "tinychat corpus",
        "sha256": public.sha256 if public else shard.sha256,
        "tokens": shard.tokens,
        "passes": round(passes[shard.source], 3),
    }


def lineage_of(result: Result, *, data: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Where a checkpoint comes from."""
    from tinychat import __version__
    from tinychat.runtime.device import describe_hardware

    return {
        "data": dict(data),
        "tokens": result.tokens,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "hardware": describe_hardware(),
        "tinychat": __version__,
        **{key: value for key, value in more.items() if value is not None},
    }


def write_checkpoint(
    path: Path,
    model: GPT,
    stage: str,
    pieces: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: dict[str, Any],
    bits_of: Callable[[GPT], float],
) -> CheckpointInfo:
    """Write int8 where that costs less than 0.5 % in bits per byte, else bfloat16.

    `bits_of` measures a model; the cost is measured on the file itself, read back.
    """
    from tinychat.gpt import load_model, save_model

    def save(kind: Literal["int8", "bf16"]) -> CheckpointInfo:
        return save_model(
            path,
            model,
            stage=stage,
            tokenizer=pieces,
            lineage=lineage,
            metrics=metrics,
            quantize=kind,
        )

    exact = bits_of(model)
    kinds: tuple[Literal["int8", "bf16"], ...] = ("int8", "bf16")
    for kind in kinds:
        save(kind)
        cost = 100 * (bits_of(load_model(path)[0]) / exact - 1)
        if cost < 0.5:
            break
    metrics["storage_cost_percent"] = round(cost, 3)
    return save(kind)


def last_loss(result: Result, folder: Path) -> float | None:
    """The loss of the last step, also when this process only finished what another had trained."""
    from tinychat.runtime.metrics import read_metrics

    if result.loss == result.loss:
        return result.loss
    rows = read_metrics(folder / "metrics.jsonl")
    return rows[-1]["loss"] if rows else None


def curve(folder: Path, points: int = 60) -> list[list[float]]:
    """Return about `points` pairs (tokens, mean loss since the last point) of the run."""
    from tinychat.runtime.metrics import read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    size = max(1, len(rows) // points)
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [
        [group[-1]["tokens"], round(sum(row["loss"] for row in group) / len(group), 4)]
        for group in groups
    ]


# What the user sees


@contextmanager
def shards_progress(enabled: bool) -> Iterator[Callable[[Any], None]]:
    """A line while text becomes tokens; nothing when all shards are there already."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not enabled)
    with console.status("Reading the text") as status:

        def report(progress: Any) -> None:
            status.update(
                f"Text to tokens: {progress.source}, {progress.tokens / 1e6:.1f} M tokens"
            )

        yield report


@contextmanager
def training_progress(
    title: str, parameters: int, enabled: bool
) -> Iterator[tuple[Callable[[Progress], None], Callable[[], bool]]]:
    """A progress bar with loss, speed and time left; the first Ctrl-C asks the loop to save."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, quiet=not enabled)
    stopped = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        console.print("Finishing this step and saving (Ctrl-C again to leave at once) ...")

    previous = signal.signal(signal.SIGINT, interrupt)
    console.print(f"{title}: {parameters / 1e6:.1f} M parameters. The first step compiles.")
    columns = (
        TextColumn("step {task.completed}/{task.fields[steps]}"),
        BarColumn(bar_width=24),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
        TextColumn("left {task.fields[left]}"),
        TimeElapsedColumn(),
    )
    plain = not console.is_terminal
    smooth = float("nan")
    announced = False
    try:
        with Bar(*columns, console=console, disable=plain) as bar:
            task = bar.add_task("", total=None, steps="?", loss=float("nan"), rate=0, left="?")

            def show(progress: Progress) -> None:
                nonlocal smooth, announced
                smooth = progress.loss if smooth != smooth else 0.95 * smooth + 0.05 * progress.loss
                known = progress.seconds_left == progress.seconds_left
                left = clock(progress.seconds_left) if known else "?"
                if known and not announced:
                    announced = True
                    console.print(f"{progress.steps:,} steps, ready in about {left}")
                bar.update(
                    task,
                    completed=progress.step,
                    total=progress.steps if known else None,
                    steps=f"{progress.steps:,}" if known else "?",
                    loss=smooth,
                    rate=progress.tokens_per_second,
                    left=left,
                )
                if plain and progress.step % 50 == 0:
                    bits = ", ".join(f"{k} {v:.3f}" for k, v in progress.bits_per_byte.items())
                    console.print(
                        f"step {progress.step}  loss {smooth:.3f}  "
                        f"{progress.tokens_per_second:,.0f} tokens/s  left {left}  {bits}"
                    )

            yield show, lambda: stopped
    finally:
        signal.signal(signal.SIGINT, previous)


def clock(seconds: float) -> str:
    """Return seconds as `1:02:03` or `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def print_samples(model: GPT, pieces: Tokenizer, folder: Path, *, chat: bool) -> None:
    """Let the fresh model speak, on the screen and into `samples.txt`."""
    from tinychat.data.records import Message
    from tinychat.dialogue import render_prompt
    from tinychat.generation import Sampling, stream

    model = model.to("cpu")
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=80, seed=0)
    lines = []
    for prompt in CHAT_PROMPTS if chat else SAMPLE_PROMPTS:
        if chat:
            message = [Message("user", prompt)]
            ids = render_prompt(message, pieces, context=model.config.context, reserve=100)
        else:
            ids = [pieces.bos_id, *pieces.encode(prompt)]
        said = "".join(stream(model, pieces, ids, sampling))
        lines.append(f"> {prompt}\n{said}" if chat else f"{prompt}{said}")
    text = "\n\n".join(lines)
    (folder / "samples.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
