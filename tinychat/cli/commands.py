"""What a user can type after a slash. A method is a command, its docstring the help."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tinychat.cli.errors import nearest, sentence
from tinychat.cli.loading import Loading, choose
from tinychat.runtime.errors import ConfigError, TinychatError

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat


class Commands:
    """The slash commands of one chat."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    @classmethod
    def names(cls) -> list[str]:
        return [name.removeprefix("do_") for name in vars(cls) if name.startswith("do_")]

    def run(self, line: str) -> None:
        """Obey one line. A mistake is explained and changes nothing."""
        name, _, rest = line.removeprefix("/").partition(" ")
        method = getattr(self, f"do_{name.lower()}", None)
        if method is None:
            hint = nearest(name.lower(), self.names(), "/") or " /help lists the commands."
            self._chat.screen.complain(f"There is no command /{name}.{hint}")
            return
        try:
            method(rest.strip())
        except (TinychatError, OSError) as error:
            if error is self._chat.loading.error:
                raise
            self._chat.screen.complain(sentence(error))

    def do_help(self, _: str) -> None:
        """/help: this list"""
        table = _table()
        for name in self.names():
            usage, _, text = (getattr(self, f"do_{name}").__doc__ or "").partition(": ")
            table.add_row(usage, text)
        table.add_row("//...", "a message that begins with a slash")
        table.add_row("Ctrl-C", "stop the reply; twice at an empty prompt: leave")
        table.add_row("Ctrl-D", "leave")
        self._chat.screen.show(table)

    def do_retry(self, _: str) -> None:
        """/retry: another reply to the last message"""
        session = self._chat.session
        if not session.messages:
            raise ConfigError("There is nothing to answer again yet; write a message first.")
        if session.sampling.greedy:
            self._chat.screen.note("temperature is 0, so the reply will be the same")
        self._chat.answer(None)

    def do_undo(self, _: str) -> None:
        """/undo: forget the last message and its reply"""
        said = self._chat.session.undo()
        self._chat.screen.note("nothing to undo" if said is None else f"forgotten: {_short(said)}")

    def do_clear(self, _: str) -> None:
        """/clear: forget the whole conversation; settings and system message stay"""
        self._chat.session.clear()
        self._chat.screen.note("a new conversation")

    def do_system(self, text: str) -> None:
        """/system TEXT: tell the model who it is; /system off removes it, /system shows it"""
        session = self._chat.session
        if text:
            session.system = None if text == "off" else text
        now = f"system message: {session.system}" if session.system else "no system message"
        self._chat.screen.note(now)

    def do_set(self, text: str) -> None:
        """/set NAME VALUE: change a setting, for example /set temperature 0.5"""
        session = self._chat.session
        name, _, value = text.replace("=", " ", 1).partition(" ")
        name, value = name.strip().replace("-", "_"), value.strip()
        known = [field.name for field in fields(session.sampling)]
        if name not in known:
            hint = nearest(name, known) if name else ""
            raise ConfigError(f"There is no setting {name!r}.{hint} Known: {', '.join(known)}.")
        settings = replace(session.sampling, **{name: _number(name, value)})
        if name == "seed":
            session.seed(settings.seed)
        session.sampling = settings
        self._chat.screen.note(f"{name} is {getattr(settings, name)}")

    def do_show(self, _: str) -> None:
        """/show: the model and the settings"""
        session, info = self._chat.session, self._chat.loading.info
        table = _table()
        table.add_row("model", Text(f"{info.path} ({info.stage}, {millions(info.parameters)})"))
        for name, value in asdict(session.sampling).items():
            table.add_row(name, "random" if value is None else str(value))
        table.add_row("system", Text(session.system or "none"))
        table.add_row("turns", str(len(session.messages) // 2))
        self._chat.screen.show(table)

    def do_stats(self, _: str) -> None:
        """/stats: speed and length of the last reply"""
        last = self._chat.session.last
        if last is None:
            raise ConfigError("There is no reply to measure yet; write a message first.")
        table = _table()
        table.add_row("prompt", f"{last.prompt} tokens, {last.cached} of them remembered")
        table.add_row("reply", f"{last.written} tokens in {last.seconds:.2f} s")
        table.add_row("first token", f"after {last.first * 1000:.0f} ms")
        table.add_row("speed", f"{last.tokens_per_second:.0f} tokens/s after the first")
        used = last.prompt + last.written
        table.add_row("context", f"{used} of {self._chat.session.context} tokens")
        self._chat.screen.show(table)

    def do_save(self, name: str) -> None:
        """/save FILE: write the conversation as Markdown; an existing file is never replaced"""
        if not name:
            raise ConfigError("Give the file a name, for example /save chat.md.")
        session, info = self._chat.session, self._chat.loading.info
        if not session.messages:
            raise ConfigError("There is nothing to save yet; write a message first.")
        parts = [f"# A chat with tinychat\n\nCheckpoint: `{info.path.name}` ({info.stage})"]
        if session.system:
            parts.append(f"**System:** {session.system}")
        for message in session.messages:
            speaker = "You" if message.role == "user" else "tinychat"
            parts.append(f"**{speaker}:** {message.content.strip()}")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write("\n\n".join(parts) + "\n")
        except FileExistsError:
            raise ConfigError(f"{path} exists already; choose another name.") from None
        self._chat.screen.note(f"saved {path}")

    def do_model(self, name: str) -> None:
        """/model NAME: go on with another checkpoint; /model shows which one talks"""
        info = self._chat.loading.info
        if name:
            old, info = self._chat.session, choose(name)
            loading = Loading(info, asdict(old.sampling), old.system)
            loading.start()
            with self._chat.screen.waiting(f"loading {info.path.name} ..."):
                new = loading.session()
            new.messages = old.messages
            self._chat.loading = loading
        self._chat.screen.note(f"{info.path} ({info.stage}, {millions(info.parameters)})")

    def do_quit(self, _: str) -> None:
        """/quit: leave"""
        self._chat.leaving = True


def millions(parameters: int) -> str:
    """13900000 -> "13.9 M parameters"."""
    return f"{parameters / 1e6:.1f} M parameters"


def _number(name: str, text: str) -> Any:
    """A setting's value from what was typed. Raises ConfigError when it is no number."""
    if name == "seed" and text in ("none", "random", "off"):
        return None
    whole = name in ("top_k", "max_tokens", "seed")
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} is {text!r}; it must be {kind}.") from None


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
