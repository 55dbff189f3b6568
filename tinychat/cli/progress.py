"""What a user sees of a training run: progress, time left, and the fresh model's first words."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from tinychat.gpt import GPT
    from tinychat.ppo import PPOProgress
    from tinychat.pretraining import Progress
    from tinychat.tokenizer import Tokenizer

SAMPLE_PROMPTS = ("Once upon a time", "The little dog", "The sun is", "She opened the door and")
CHAT_PROMPTS = (
    "hi",
    "what is your name?",
    "why is the sky blue?",
    "tell me a short story about a fox",
)


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
    console.print(
        f"{title}: {millions(parameters)}. The first step takes longest, minutes where it compiles."
    )
    columns = (
        TextColumn("step {task.completed}/{task.fields[steps]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    plain = not console.is_terminal
    smooth = float("nan")
    announced = False
    with (
        interruptible(console) as should_stop,
        Bar(*columns, console=console, disable=plain) as bar,
    ):
        task = bar.add_task("", total=None, steps="?", figures="the first step")

        def show(progress: Progress) -> None:
            nonlocal smooth, announced
            smooth = progress.loss if smooth != smooth else 0.95 * smooth + 0.05 * progress.loss
            known = progress.seconds_left == progress.seconds_left
            left = clock(progress.seconds_left) if known else "?"
            if known and not announced:
                announced = True
                console.print(f"{progress.steps:,} steps, ready in about {left}")
            speed = f"{progress.tokens_per_second:,.0f} tokens/s"
            bar.update(
                task,
                completed=progress.step,
                total=progress.steps if known else None,
                steps=f"{progress.steps:,}" if known else "?",
                figures=f"loss {smooth:.3f}  {speed}  left {left}",
            )
            if plain and progress.step % 50 == 0:
                bits = ", ".join(f"{k} {v:.3f}" for k, v in progress.bits_per_byte.items())
                console.print(
                    f"step {progress.step}  loss {smooth:.3f}  {speed}  left {left}  {bits}"
                )

        yield show, should_stop


@contextmanager
def ppo_progress(
    title: str, enabled: bool
) -> Iterator[tuple[Callable[[PPOProgress], None], Callable[[], bool]]]:
    """A line a step, or every tenth without a terminal; the first Ctrl-C asks the loop to save."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not enabled)

    def show(progress: PPOProgress) -> None:
        known = progress.seconds_left == progress.seconds_left
        if not console.is_terminal and progress.step % 10 and progress.step > 1:
            return
        m, left = progress.metrics, clock(progress.seconds_left) if known else "?"
        seen = f"judge {m['judge']:.3f}  " if "judge" in m else ""
        console.print(
            f"step {progress.step}{f'/{progress.steps}' if known else ''}  score {m['score']:.3f}  "
            f"{seen}KL {m['kl']:.2f}  length {m['length']:.0f}  ended {m['ended']:.0%}  "
            f"clipped {m['clip_fraction']:.0%}  left {left}"
        )

    console.print(title)
    with interruptible(console) as should_stop:
        yield show, should_stop


@contextmanager
def interruptible(console: Console) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks the loop to save and stop, the second leaves at once."""
    stopped = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        console.print("Finishing this step and saving (Ctrl-C again to leave at once) ...")

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, previous)


def millions(parameters: int) -> str:
    """13900000 -> "13.9 M parameters"."""
    return f"{parameters / 1e6:.1f} M parameters"


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
