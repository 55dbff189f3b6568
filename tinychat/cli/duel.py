"""`tinychat duel`: a person votes on two checkpoints' replies. This is its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tinychat.cli.config import flags_of, settings
from tinychat.cli.flags import (
    FirstSide,
    MaxTokens,
    MinP,
    Penalty,
    SecondSide,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)
from tinychat.runtime.errors import ConfigError

EXAMPLES = (
    "Examples:\n\ntinychat duel sft rlhf\n\ntinychat duel sft --ask\n\n"
    "tinychat duel --report votes.jsonl"
)


def duel(
    a: FirstSide = None,
    b: SecondSide = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to ask, one prompt a line.")
    ] = None,
    asking: Annotated[bool, typer.Option("--ask", help="Type the prompts yourself.")] = False,
    part: Annotated[
        Literal["train", "test"] | None,
        typer.Option(
            help="Which of our own questions to ask: held-out ones to compare two checkpoints, "
            "training ones to teach a reward model. The default follows from A and B.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after N votes.")
    ] = None,
    votes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the votes go; votes.jsonl in the user's data folder when left out.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only say what a file of votes says.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    system: System = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --report: print one JSON object.")
    ] = False,
) -> None:
    """Vote: two replies side by side in hidden order, which is better? A, B, T for a tie.

    The votes measure two checkpoints, and teach: [bold]tinychat train reward --votes FILE[/bold].
    """
    from tinychat.cli.ring import hold
    from tinychat.cli.tally import print_tally

    if report is not None:
        print_tally(report, as_json)
        return
    if as_json:
        raise ConfigError("--json goes with --report FILE; a duel itself prints replies.")
    now = settings(flags_of(locals()))
    names = [name for name in (a or now["ckpt"], b) if name]
    hold(
        names or [None],
        now.sampling,
        now["system"] or None,
        prompts=prompts,
        part=part,
        asking=asking,
        votes=votes,
        count=count,
    )
