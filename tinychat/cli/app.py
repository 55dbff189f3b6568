"""The `tinychat` command. Heavy imports wait inside the functions: --help never loads torch."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tinychat import __version__
from tinychat.cli.bench import bench
from tinychat.cli.config import flags_of, settings
from tinychat.cli.duel import EXAMPLES, duel
from tinychat.cli.errors import friendly
from tinychat.cli.evaluate import evaluate
from tinychat.cli.flags import (
    Ckpt,
    Ckpts,
    Drafts,
    Json,
    Load,
    MaxTokens,
    MinP,
    Penalty,
    Render,
    Save,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    Words,
)
from tinychat.cli.huggingface import export_model
from tinychat.cli.train_all import train_app
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
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    drafts: Drafts = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    system: System = None,
    render: Render = None,
    save: Save = None,
    newest: Annotated[
        bool, typer.Option("--continue", help="Go on with the newest saved chat.")
    ] = False,
    load: Load = None,
) -> None:
    """Talk with the model. Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands."""
    from tinychat.cli.talk import talk

    talk(settings(flags_of(locals())), newest=newest, load=load)


@app.command(
    epilog='Examples:\n\ntinychat ask "what is a token?"\n\ntinychat ask < question.txt'
    "\n\necho hi | tinychat ask --json"
)
def ask(
    words: Words = None,
    ckpt: Ckpt = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    drafts: Drafts = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    system: System = None,
    render: Render = None,
    as_json: Json = False,
) -> None:
    """Answer one question and print nothing but the answer."""
    from tinychat.cli.talk import ask_once

    ask_once(_question(words, "ask"), settings(flags_of(locals())), as_json)


@app.command(epilog='Example: tinychat compare "who are you?" --ckpt base --ckpt sft')
def compare(
    words: Words = None,
    names: Ckpts = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    drafts: Drafts = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    system: System = None,
    as_json: Json = False,
) -> None:
    """Let several checkpoints answer one question with the same seed, side by side."""
    from tinychat.cli.compare import compare as compare_models

    now = settings(flags_of(locals()))
    question = _question(words, "compare")
    compare_models(question, names or [], now.sampling, now["system"] or None, as_json)


def _question(words: list[str] | None, command: str) -> str:
    """What was asked, as words or through standard input. Raises ConfigError for nothing."""
    example = f'write one, as in tinychat {command} "who are you?".'
    question = " ".join(words or [])
    if not words:
        from tinychat.cli.console import is_terminal
        from tinychat.cli.reading import as_text

        if sys.stdin is None or is_terminal(sys.stdin):
            raise ConfigError(f"There is no question; {example}")

        question = as_text(sys.stdin.buffer.read())
    if not question.strip():
        raise ConfigError(f"The question is empty; {example}")
    return question.strip()


app.command(epilog=EXAMPLES)(duel)

app.command(
    "eval",
    epilog="Examples:\n\ntinychat eval ppo sft base --judge judge --out report.json\n\n"
    "tinychat eval ppo sft --judge judge --pairs pairs.txt\n\ntinychat eval --count pairs.txt",
)(evaluate)


@app.command()
def chats(as_json: Json = False) -> None:
    """List the saved chats, the newest first."""
    from tinychat.cli.saved import show_chats

    show_chats(as_json)


config_app = typer.Typer(
    invoke_without_command=True, help="Show every setting and where its value comes from."
)
app.add_typer(config_app, name="config")


@config_app.callback(
    epilog="By rising priority: default, the file, TINYCHAT_ variables (TINYCHAT_TEMPERATURE=0.5), "
    "flags. TINYCHAT_CONFIG names another file."
)
def config(context: typer.Context, as_json: Json = False) -> None:
    from tinychat.cli.config import show_settings

    if context.invoked_subcommand is None:
        show_settings(as_json)


@config_app.command("path")
def path_of_config() -> None:
    """Print where the settings are read from; write them there, as in `temperature = 0.5`."""
    from tinychat.cli.config import config_path

    typer.echo(config_path())


@app.command(epilog="Example: tinychat info sft")
def info(
    ckpt: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint's name, its file, or a run's name.")
    ],
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


app.add_typer(train_app, name="train")

app.command("export", epilog="Example: tinychat export sft my-model --format hf")(export_model)

app.command(epilog="Example: tinychat bench --json > here.json")(bench)


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
