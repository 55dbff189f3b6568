"""The `tinychat` command. Heavy imports wait inside the functions: --help never loads torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tinychat import __version__
from tinychat.cli.errors import friendly
from tinychat.runtime.errors import ConfigError


class Program(TyperGroup):
    """All commands at once: `--debug` may stand anywhere, mistakes become one panel."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        if "--debug" in options:
            args.remove("--debug")
            args.insert(0, "--debug")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with friendly(debug=ctx.params.get("debug", False)):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Ckpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Which checkpoint: rlhf, sft, base or a .safetensors file. "
        "The first of these three that is there when left out.",
    ),
]


def _number(
    name: str, kind: type[int] | type[float], wanted: str, holds: Callable[[Any], bool], text: str
) -> Any:
    """A number option that is checked at once, before any model is loaded."""

    def parse(value: str) -> int | float:
        try:
            number = kind(value)
            if holds(number):
                return number
        except ValueError:
            pass
        raise ConfigError(f"{name} is {value}; it must be {wanted}.")

    return typer.Option(name, metavar="N", help=text, parser=parse)


Temperature = Annotated[
    float,
    _number(
        "--temperature",
        float,
        "a number from 0 up",
        lambda n: 0 <= n < inf,
        "Below 1 bolder, above 1 wilder; 0 always takes the likeliest token.",
    ),
]
TopP = Annotated[
    float,
    _number(
        "--top-p",
        float,
        "a number above 0 and at most 1",
        lambda n: 0 < n <= 1,
        "Choose among the likeliest tokens that together have this probability; 1 is off.",
    ),
]
TopK = Annotated[
    int,
    _number(
        "--top-k",
        int,
        "a whole number from 0 up",
        lambda n: n >= 0,
        "Choose among the N likeliest tokens; 0 is off.",
    ),
]
MinP = Annotated[
    float,
    _number(
        "--min-p",
        float,
        "a number from 0 to 1",
        lambda n: 0 <= n <= 1,
        "Drop tokens below this share of the likeliest one's probability; 0 is off.",
    ),
]
Penalty = Annotated[
    float,
    _number(
        "--repetition-penalty",
        float,
        "a number above 0",
        lambda n: 0 < n < inf,
        "Above 1, tokens of this reply come again less often; 1 is off.",
    ),
]
Seed = Annotated[
    int | None,
    _number(
        "--seed",
        int,
        "a whole number from 0 up",
        lambda n: 0 <= n < 2**63,
        "The same seed gives the same conversation. Random when left out.",
    ),
]
MaxTokens = Annotated[
    int,
    _number(
        "--max-tokens",
        int,
        "a whole number from 1 up",
        lambda n: n >= 1,
        "The longest reply, in tokens.",
    ),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A system message: who the model should be.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinychat {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error too.")
    ] = False,
) -> None:
    """A small language model that you can build yourself, and talk to.

    [bold]tinychat chat[/bold] starts a conversation,
    [bold]tinychat ask "why is the sky blue?"[/bold] answers once.
    """


@app.command(epilog="Example: tinychat chat --ckpt sft --temperature 0.5")
def chat(
    ckpt: Ckpt = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_tokens: MaxTokens = 200,
    system: System = None,
) -> None:
    """Talk with the model. Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands."""
    from tinychat.cli.commands import millions
    from tinychat.cli.console import Screen
    from tinychat.cli.loading import Loading, choose
    from tinychat.cli.loop import Chat
    from tinychat.cli.reading import PipeReader, TerminalReader, quiet_keyboard

    info = choose(ckpt)
    loading = Loading(
        info,
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "max_tokens": max_tokens,
        },
        system,
    )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(interactive)
    screen.note(f"{info.path.name}: {info.stage}, {millions(info.parameters)}")
    if info.stage == "base":
        screen.note("a base model goes on with text; it was not taught to answer")
    if not interactive:
        Chat(loading, PipeReader(), screen).run()
        return
    screen.note("/help lists the commands, Ctrl-D leaves")
    screen.space()
    with quiet_keyboard():
        Chat(loading, TerminalReader(loading), screen).run()


@app.command(
    epilog='Examples:\n\ntinychat ask "what is a token?"\n\ntinychat ask < question.txt'
    "\n\necho hi | tinychat ask --json"
)
def ask(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUESTION]", help="Read from standard input when left out."),
    ] = None,
    ckpt: Ckpt = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_tokens: MaxTokens = 200,
    system: System = None,
    as_json: Json = False,
) -> None:
    """Answer one question and print nothing but the answer."""
    import json
    from dataclasses import asdict

    from tinychat.cli.console import Screen
    from tinychat.cli.loading import choose, open_session
    from tinychat.cli.reading import as_text

    question = " ".join(words or [])
    if not words:
        if sys.stdin.isatty():
            raise ConfigError('There is no question; write one, as in tinychat ask "who are you?".')
        question = as_text(sys.stdin.buffer.read())
    question = question.strip()
    if not question:
        raise ConfigError('The question is empty; write one, as in tinychat ask "who are you?".')
    info = choose(ckpt)
    session = open_session(
        info,
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "max_tokens": max_tokens,
        },
        system,
    )
    pieces = session.reply(question)
    if not as_json:
        Screen(interactive=sys.stdout.isatty()).reply(pieces)
        return
    for _ in pieces:
        pass
    assert session.last is not None
    answer = {
        "reply": session.last.text.strip(),
        "tokens": session.last.written,
        "seconds": round(session.last.seconds, 3),
        "ended": session.last.ended,
        "checkpoint": str(info.path),
        "sampling": asdict(session.sampling),
    }
    typer.echo(json.dumps(answer, ensure_ascii=False))


@app.command(epilog="Example: tinychat info checkpoints/rlhf.safetensors")
def info(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint's name or file.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint says of itself: size, config, where it came from, how good it is."""
    from tinychat.cli.info import show_info

    show_info(ckpt, as_json)


@app.command()
def models(
    as_json: Json = False,
    card: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Print the model card of a folder's checkpoints."),
    ] = None,
) -> None:
    """List the checkpoints that can be found by name."""
    if card is not None:
        from tinychat.cli.card import card as card_of

        typer.echo(card_of(card), nl=False)
        return
    from tinychat.cli.info import show_models

    show_models(as_json)


data_app = typer.Typer(no_args_is_help=True, help="The public training texts.")
app.add_typer(data_app, name="data")

DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="TINYCHAT_DATA",
        metavar="DIR",
        help="The folder that holds the prepared files.",
    ),
]


@data_app.command("list")
def data_list(data: DataFolder = None) -> None:
    """List the sources with their licences, and with --data which files are there."""
    from tinychat.cli.info import show_sources

    show_sources(data)


@data_app.command("verify")
def data_verify(data: DataFolder = None) -> None:
    """Compare every file of the folder with its published checksum."""
    from tinychat.cli.info import verify_sources

    verify_sources(data)


try:
    from tinychat.cli.train import train_app
except ModuleNotFoundError as error:
    if error.name != "tinychat.cli.train":
        raise
else:
    app.add_typer(train_app, name="train")


def main() -> NoReturn:
    """The entry point of the `tinychat` script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that can't show a letter gets a "?"
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="tinychat")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process. A thread that is importing torch can crash an ordinary exit, so a user
    who leaves before the model is loaded leaves at once."""
    if any(thread.name == "loading" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
