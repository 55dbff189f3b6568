"""The options that chat, ask and compare share, made from the table of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinychat.cli.config import OPTIONS, shown


def _option(name: str, metavar: str = "N", **more: Any) -> Any:
    """A flag that is checked at once, before any model is loaded.

    Its default is None, "not given": the config file and the variables come before the default.
    """
    option = OPTIONS[name]
    return typer.Option(
        option.flag,
        metavar=metavar,
        help=option.help,
        parser=lambda text: option.parse(text, option.flag),
        show_default=shown(option.default) or False,
        **more,
    )


def checkpoint_names(incomplete: str) -> list[str]:
    """For the shell's Tab: the names that are there, else files."""
    from tinychat.cli.compare import chat_models

    names = [name for name in chat_models() if name.startswith(incomplete)]
    folder, _, begun = incomplete.rpartition("/")
    for path in sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).glob("*")):
        if path.name.startswith(begun) and (path.is_dir() or path.suffix == ".safetensors"):
            whole = f"{folder}/{path.name}" if "/" in incomplete else path.name
            if path.suffix == ".safetensors":
                names.append(whole)
            elif "/" in incomplete and not path.name.startswith("."):
                names.append(whole + "/")
    return names


def _renderings(incomplete: str) -> list[str]:
    return [name for name in ("auto", "markdown", "plain") if name.startswith(incomplete)]


def _chats(incomplete: str) -> list[str]:
    from tinychat.cli.saved import saved_chats

    return [chat.name for chat in saved_chats() if chat.name.startswith(incomplete)]


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[QUESTION]", help="Read from standard input when left out."),
]
_CKPT_HELP = (
    "Which checkpoint: rlhf, sft, base, a run's name or a .safetensors file. "
    "The first of these three that is there when left out."
)
Ckpt = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help=_CKPT_HELP, autocompletion=checkpoint_names),
]
Ckpts = Annotated[
    list[str] | None,
    typer.Option(
        "--ckpt",
        metavar="NAME|FILE",
        help="A checkpoint to compare; give it several times. "
        "All of base, sft and rlhf that are there when left out.",
        autocompletion=checkpoint_names,
    ),
]
FirstSide = Annotated[
    str | None,
    typer.Argument(
        metavar="A",
        help="A checkpoint; the one that chat takes when left out.",
        autocompletion=checkpoint_names,
    ),
]
SecondSide = Annotated[
    str | None,
    typer.Argument(
        metavar="B",
        help="Another one; A meets itself, with other dice, when left out.",
        autocompletion=checkpoint_names,
    ),
]
Temperature = Annotated[Any, _option("temperature")]
TopP = Annotated[Any, _option("top_p")]
TopK = Annotated[Any, _option("top_k")]
MinP = Annotated[Any, _option("min_p")]
Penalty = Annotated[Any, _option("repetition_penalty")]
Drafts = Annotated[Any, _option("drafts")]
Seed = Annotated[Any, _option("seed")]
MaxTokens = Annotated[Any, _option("max_tokens")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help=OPTIONS["system"].help)]
Render = Annotated[Any, _option("render", "HOW", autocompletion=_renderings)]
Save = Annotated[
    bool | None,
    typer.Option(
        "--save/--no-save",
        help="Keep the chat in the user's data folder; a chat at a terminal is kept when left out.",
        show_default=False,
    ),
]
Load = Annotated[
    str | None,
    typer.Option(metavar="CHAT", help="Go on with a saved chat.", autocompletion=_chats),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
