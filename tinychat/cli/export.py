"""A conversation as a Markdown, JSON or HTML file. An existing file is never replaced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from tinychat import __version__
from tinychat.cli.console import printable
from tinychat.data.records import Message
from tinychat.runtime.errors import ConfigError


@dataclass(frozen=True)
class Talk:
    """All that an export says."""

    checkpoint: str
    stage: str
    settings: dict[str, Any]
    system: str | None
    messages: Sequence[Message]


def export(path: Path, talk: Talk) -> None:
    """Write the file that the suffix asks for. Raises ConfigError and OSError; never replaces."""
    render = {".md": as_markdown, ".json": as_json, ".html": as_html}.get(path.suffix.lower())
    if render is None:
        raise ConfigError(f"{path} must end in .md, .json or .html, for example /export chat.md.")
    data = render(talk).encode("utf-8", errors="replace")
    try:
        file = path.open("xb")
    except FileExistsError:
        raise ConfigError(f"{path} exists already; choose another name.") from None
    try:
        with file:
            file.write(data)
    except BaseException:  # a full disk, Ctrl-C: half a file is of no use
        path.unlink(missing_ok=True)
        raise


def as_markdown(talk: Talk) -> str:
    parts = [f"# A chat with tinychat\n\nCheckpoint: `{talk.checkpoint}` ({talk.stage})"]
    if talk.system:
        parts.append(f"**System:** {printable(talk.system)}")
    for message in talk.messages:
        speaker = "You" if message.role == "user" else "tinychat"
        parts.append(f"**{speaker}:** {printable(message.content).strip()}")
    return "\n\n".join(parts) + "\n"


def as_json(talk: Talk) -> str:
    messages = [asdict(message) for message in talk.messages]
    if talk.system:
        messages.insert(0, asdict(Message("system", talk.system)))
    record = {
        "tinychat": __version__,
        "checkpoint": talk.checkpoint,
        "stage": talk.stage,
        "settings": talk.settings,
        "messages": messages,
    }
    return json.dumps(record, indent=1) + "\n"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>A chat with tinychat</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 42rem; margin: 2rem auto;
  padding: 0 1rem; color: #1b1b1b; background: #fff; }}
article {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0; padding: .6rem .9rem;
  border-radius: .6rem; background: #f1f1f3; }}
article.user {{ margin-left: 15%; background: #dbe9ff; }}
article.system {{ background: none; border: 1px solid #8888; }}
h2 {{ font-size: .75rem; margin: 0; opacity: .7; }}
footer {{ font-size: .8rem; opacity: .7; }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #e6e6e6; background: #16161a; }}
  article {{ background: #26262c; }}
  article.user {{ background: #1f3a63; }}
}}
</style>
</head>
<body>
<h1>A chat with tinychat</h1>
{turns}
<footer>{footer}</footer>
</body>
</html>
"""
_SPEAKERS = {"system": "System", "user": "You", "assistant": "tinychat"}


def as_html(talk: Talk) -> str:
    """One file that needs no other: light or dark as the reader's system is."""
    system = [Message("system", talk.system)] if talk.system else []
    turns = [
        f'<article class="{message.role}"><h2>{_SPEAKERS[message.role]}</h2>'
        f"{escape(printable(message.content).strip())}</article>"
        for message in [*system, *talk.messages]
    ]
    settings = ", ".join(f"{name} {value}" for name, value in talk.settings.items())
    footer = escape(f"{talk.checkpoint} ({talk.stage}), {settings}; tinychat {__version__}")
    return _PAGE.format(turns="\n".join(turns), footer=footer)
