"""Where a user's mistake becomes one panel on standard error and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import typer

from tinychat.runtime.errors import TinychatError

MISTAKE = 2
BROKEN_PIPE = 128 + 13  # what a shell reports for a program that SIGPIPE ended


def print_error(error: Exception | str) -> None:
    """Draw one error on standard error. Its text is never read as markup."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(stderr=True)
    console.print(Panel(Text(str(error)), title="Error", title_align="left", border_style="red"))


@contextmanager
def friendly(debug: bool = False) -> Iterator[None]:
    """Turn the mistakes a user can make into exit codes; bugs keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        # The reader left (`tinychat ask ... | head -1`). Python flushes standard output once
        # more at exit, which must find somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except (TinychatError, OSError) as error:
        if debug:
            traceback.print_exc()
        print_error(sentence(error))
        raise typer.Exit(MISTAKE) from None


def sentence(error: Exception) -> str:
    """One sentence for a person: an OSError's own text starts with a number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'The system'}: {error.strerror}."
    return str(error)


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ` Did you mean X?` for a word that resembles a known one, else nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
