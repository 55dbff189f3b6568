"""`tinychat bench`: how fast this machine talks, reads and trains, and beside what."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinychat.cli.flags import Json, checkpoint_names
from tinychat.cli.info import machine
from tinychat.cli.progress import millions
from tinychat.runtime.device import reuse_memory

if TYPE_CHECKING:
    import torch

    from tinychat.gpt import GPT, GPTConfig

PROMPT, REPLY, SHORT = 64, 96, 24  # tokens; without a cache a few steps tell enough
LEAST = 3  # turns, however slow

Work = Callable[[], object]


def bench(
    ckpt: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]",
            help="The model that talks; the chat's if left out.",
            autocompletion=checkpoint_names,
            show_default=False,
        ),
    ] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help="The size that is trained.")] = "nano",
    seconds: Annotated[
        float, typer.Option(metavar="S", help="About how long each of the four measurements takes.")
    ] = 5.0,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled",
            help="Train with torch.compile, as `tinychat train` does; that takes a minute or more.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure this machine: first token, decoding, reading a prompt, training.

    Each beside a peer in the same run: the model without its cache, a plain matrix product, the
    same training step without our shortcuts.
    """
    reuse_memory()
    from rich.console import Console

    from tinychat.cli.loading import choose
    from tinychat.gpt import preset as model_preset
    from tinychat.runtime.device import describe_hardware, pick_device, set_threads
    from tinychat.runtime.errors import ConfigError

    if not 0 < seconds < 1e4:
        raise ConfigError(f"--seconds is {seconds:g}; give a number above 0, for instance 5.")
    shape, info = model_preset(preset), choose(ckpt)
    place = pick_device(device)
    report: dict[str, Any] = {
        "model": str(info.path),
        "parameters": info.parameters,
        "preset": preset,
        "device": str(place),
        "threads": set_threads(),
    }
    screen = Console(stderr=True, highlight=False)
    with screen.status("Decoding ..."):  # the very first: a cold start is cold only once
        model, report["decoding"] = decoding(str(info.path), place, seconds)
    with screen.status("Matrix products ..."):
        report["peak_gflops"] = peaks(place, seconds / 2)
    with screen.status("Reading ..."):
        report["reading"] = reading(model, place, seconds, report["peak_gflops"])
    with screen.status(f"Training {preset} ..."):
        report["training"] = training(
            preset, shape, place, seconds, compiled, report["peak_gflops"]
        )
    report["hardware"] = describe_hardware()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        show(report)


def take_turns(
    contestants: Mapping[str, Work], seconds: float, place: torch.device
) -> dict[str, float]:
    """Median seconds of each. They take turns, so that a disturbance hits all of them alike."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in contestants}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(times.values()))) < LEAST:
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            if place.type != "cpu":
                getattr(torch, place.type).synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(some) for name, some in times.items()}


def peaks(place: torch.device, seconds: float) -> dict[str, float]:
    """What a large matrix product reaches here, in GFLOP/s, by type."""
    import torch

    size = 768 if place.type == "cpu" else 8192
    works: dict[str, Work] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.randn(2, size, size, device=place).to(dtype)
        works[name] = lambda left=left, right=right: left @ right  # type: ignore[misc]
        works[name]()
    return {name: 2e-9 * size**3 / took for name, took in take_turns(works, seconds, place).items()}


def decoding(path: str, place: torch.device, seconds: float) -> tuple[GPT, dict[str, float]]:
    """Loading, the first token, and tokens a second with and without the cache."""
    import torch

    from tinychat.generation import Sampling, generate, next_logits
    from tinychat.gpt import load_model

    started = time.perf_counter()
    model, pieces, _ = load_model(path)
    model = model.to(place)
    loaded = time.perf_counter() - started
    words = pieces.encode("Once upon a time there was a little fox who could talk. " * PROMPT)
    prompt = [pieces.bos_id, *words[: PROMPT - 1]]

    def say(count: int) -> None:
        for _ in generate(model, prompt, Sampling(temperature=0, max_tokens=count), stop=()):
            pass

    @torch.inference_mode()
    def say_again() -> None:
        """Read everything anew for each token: what the cache saves."""
        ids = list(prompt)
        for _ in range(SHORT):
            scores = next_logits(model, torch.tensor([ids], device=place))
            ids.append(int(scores.argmax()))

    started = time.perf_counter()
    say(1)
    cold = time.perf_counter() - started
    works: dict[str, Work] = {
        "first": lambda: say(1),
        "short": lambda: say(SHORT),
        "long": lambda: say(REPLY),
        "again": say_again,
    }
    took = take_turns(works, seconds, place)
    cached, uncached = SHORT / took["short"], SHORT / took["again"]
    return model, {
        "load_seconds": loaded,
        "first_token_cold_seconds": cold,
        "first_token_seconds": took["first"],
        # The first token is reading, all others are decoding.
        "tokens_per_second": (REPLY - 1) / (took["long"] - took["first"]),
        "with_cache": cached,
        "without_cache": uncached,
        "ratio": cached / uncached,
    }


def reading(
    model: GPT, place: torch.device, seconds: float, peak: Mapping[str, float]
) -> dict[str, float]:
    """Tokens a second of a prompt that fills half of the context, in float32 as the chat does."""
    import torch

    from tinychat.generation import next_logits

    length = model.config.context // 2
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=place)

    @torch.inference_mode()
    def read() -> None:
        next_logits(model, ids)

    read()
    rate = length / take_turns({"read": read}, seconds, place)["read"]
    shape = model.config
    # A third of training's work is the forward pass; scores are computed for one token only.
    work = shape.flops_per_token(length) / 3 - 2 * shape.vocab_size * shape.width
    gflops = 1e-9 * rate * work
    return {
        "tokens": length,
        "tokens_per_second": rate,
        "gflops": gflops,
        "of_peak": gflops / peak["fp32"],
    }


def training(
    preset: str,
    shape: GPTConfig,
    place: torch.device,
    seconds: float,
    compiled: bool,
    peak: Mapping[str, float],
) -> dict[str, Any]:
    """Whole steps of `tinychat train base`, beside the same model run as one writes it first."""
    import torch

    from tinychat.data.batch import Batch
    from tinychat.gpt import GPT
    from tinychat.pretraining import LossFunction, make_optimizers, train_preset, train_step

    config = train_preset(preset)
    torch.manual_seed(0)
    ours, plain = GPT(shape).to(place), GPT(shape).to(place)
    loss_function = LossFunction(ours, dtype=config.dtype, compiled=compiled)
    optimizers = make_optimizers(ours, config)
    adamw = torch.optim.AdamW(plain.parameters(), 1e-3, fused=True)
    ids = torch.randint(0, shape.vocab_size, (config.batch, config.sequence + 1), device=place)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    batch = Batch(inputs, targets, torch.ones_like(inputs))

    def our_step() -> None:
        train_step(loss_function, optimizers, [batch], factor=0.1, clip=1.0)

    def plain_step() -> None:
        with torch.autocast(place.type, config.dtype, enabled=config.dtype != torch.float32):
            logits = plain(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    started = time.perf_counter()
    our_step()
    first = time.perf_counter() - started
    plain_step()
    took = take_turns({"ours": our_step, "plain": plain_step}, seconds, place)
    rate = {name: config.batch * config.sequence / each for name, each in took.items()}
    kind = "bf16" if config.dtype == torch.bfloat16 else "fp32"
    gflops = 1e-9 * rate["ours"] * shape.flops_per_token(config.sequence)
    return {
        "type": kind,
        "compiled": loss_function.compiled,
        "first_step_seconds": first,
        "tokens_per_second": rate["ours"],
        "plain_tokens_per_second": rate["plain"],
        "ratio": rate["ours"] / rate["plain"],
        "gflops": gflops,
        "of_peak": gflops / peak[kind],
    }


def show(report: Mapping[str, Any]) -> None:
    """The report as lines: what, how fast, beside what."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    talk, read, train = report["decoding"], report["reading"], report["training"]
    peak, kind = report["peak_gflops"], train["type"]
    how = "compiled" if train["compiled"] else "not compiled"
    rows = (
        ("loading the model", f"{talk['load_seconds'] * 1000:,.0f} ms", "", ""),
        (
            f"first token after {PROMPT}",
            f"{talk['first_token_seconds'] * 1000:,.1f} ms",
            f"the very first time {talk['first_token_cold_seconds'] * 1000:,.1f} ms",
            f"{talk['first_token_seconds'] / talk['first_token_cold_seconds']:.2f} x",
        ),
        ("decoding", f"{talk['tokens_per_second']:,.0f} tokens/s", "", ""),
        (
            f"the first {SHORT} tokens",
            f"{talk['with_cache']:,.0f} tokens/s",
            f"without a cache {talk['without_cache']:,.0f}",
            f"{talk['ratio']:.2f} x",
        ),
        (
            f"reading {read['tokens']} tokens",
            f"{read['tokens_per_second']:,.0f} tokens/s",
            f"fp32 product {peak['fp32']:,.0f} GFLOP/s",
            f"{read['of_peak']:.0%}",
        ),
        (
            f"training {report['preset']}",
            f"{train['tokens_per_second']:,.0f} tokens/s",
            f"plain PyTorch {train['plain_tokens_per_second']:,.0f}",
            f"{train['ratio']:.2f} x",
        ),
        (
            f"  {kind}, {how}",
            "",
            f"{kind} product {peak[kind]:,.0f} GFLOP/s",
            f"{train['of_peak']:.0%}",
        ),
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for justify in ("left", "right", "left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        Text(
            f"{report['model']} ({millions(report['parameters'])}) on {report['device']}, "
            f"{machine(report['hardware'])}, {report['threads']} threads"
        )
    )
    console.print(table)
