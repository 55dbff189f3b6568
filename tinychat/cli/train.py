"""`tinychat train`: its options, `train tokenizer`, and the commands of the other stages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tinychat.runtime.errors import ConfigError, TinychatError

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
    bool,
    typer.Option(
        "--resume",
        help="Go on with a run that was stopped or killed, to the end of its budget; "
        "with --minutes M, for M minutes more.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, for instance batch=16."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


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
    from tinychat.data.public import data_folder, source_path
    from tinychat.data.sample import SAMPLE, tokenizer_texts
    from tinychat.runtime.files import check_target, write_atomic
    from tinychat.tokenizer import train_sentencepiece

    if out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out.")
    check_target(out)
    public = data_folder(data)
    for name in SAMPLE if public else ():
        source_path(name, public)
    started = time.monotonic()
    # SentencePiece takes whatever goes wrong while it reads, and Ctrl-C, for a bad text.
    texts = list(tokenizer_texts(public))
    try:
        model = train_sentencepiece(texts, vocab_size)
    except TinychatError as error:
        if "KeyboardInterrupt" in str(error.__cause__):
            raise KeyboardInterrupt from None
        raise
    write_atomic(out, [model])
    print(f"{out}: {vocab_size} pieces learned in {time.monotonic() - started:.0f} s")


# Each adds its command, in the order of --help; `train_all`, which calls them, comes last.
from tinychat.cli import train_base  # noqa: E402, F401
from tinychat.cli import train_sft  # noqa: E402, F401
from tinychat.cli import train_reward  # noqa: E402, F401
from tinychat.cli import train_ppo  # noqa: E402, F401
