"""What a user can type after a slash. A method is a command, its docstring the help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tinychat.cli.compare import Comparing
from tinychat.cli.config import OPTIONS, RANDOM, shown
from tinychat.cli.console import printable, shortened
from tinychat.cli.errors import nearest, sentence
from tinychat.cli.filing import Filing
from tinychat.cli.inside import Inside
from tinychat.cli.progress import millions
from tinychat.cli.voting import Voting
from tinychat.cli.why import Why
from tinychat.runtime.errors import ConfigError, TinychatError

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat


class Talking:
    """The turns."""

    _chat: Chat

    def do_retry(self, _: str) -> None:
        """/retry: another reply to the last message

        The dice are thrown anew, so it differs unless the temperature is 0.
        """
        session = self._chat.session
        if not session.messages:
            raise ConfigError("There is nothing to answer again yet; write a message first.")
        if session.sampling.greedy:
            self._chat.screen.note("temperature is 0, so the reply will be the same")
        self._chat.answer(None)

    def do_edit(self, _: str) -> None:
        """/edit: take the last message back and write it anew"""
        if not self._chat.reader.interactive:
            raise ConfigError("There is no prompt to edit a message at; /undo drops the last turn.")
        said = self._chat.session.undo()
        if said is None:
            raise ConfigError("There is no message to edit yet; write one first.")
        self._chat.prefill = said
        self._chat.on_turn()

    def do_undo(self, _: str) -> None:
        """/undo: forget the last message and its reply"""
        said = self._chat.session.undo()
        self._chat.screen.note(
            "nothing to undo" if said is None else f"forgotten: {shortened(said)}"
        )
        self._chat.on_turn()

    def do_continue(self, _: str) -> None:
        """/continue: let the last reply go on where it was cut"""
        if not self._chat.session.messages:
            raise ConfigError("There is no reply to go on with yet; write a message first.")
        self._chat.draw(lambda session: session.go_on())
        last = self._chat.session.last
        if last is not None and last.ended == "end" and not last.written:
            self._chat.screen.note("the model has nothing to add")

    def do_clear(self, _: str) -> None:
        """/clear: a new conversation

        The settings and the system message stay; the old chat stays saved.
        """
        chat, journal = self._chat, self._chat.journal
        kept = journal.path if journal is not None and chat.session.messages else None
        if journal is not None:
            journal.leave()
        chat.session.clear()
        chat.screen.note(
            f"a new conversation; /load {kept.stem} goes back" if kept else "a new conversation"
        )

    def do_system(self, text: str) -> None:
        """/system [TEXT]: tell the model who it is; off removes it"""
        session = self._chat.session
        if text:
            session.system = None if text == "off" else text
            self._chat.on_turn()
        now = f"system message: {session.system}" if session.system else "no system message"
        self._chat.screen.note(now)


class Tuning:
    """The settings."""

    _chat: Chat

    def do_set(self, text: str) -> None:
        """/set NAME VALUE: change a setting, as in /set temperature 0.5

        temperature, top_k, top_p, min_p, repetition_penalty, drafts, seed, max_tokens, render.
        """
        chat, session = self._chat, self._chat.session
        name, _, value = text.replace("=", " ", 1).partition(" ")
        name, value = name.strip().replace("-", "_"), value.strip()
        elsewhere = {"ckpt": "/model NAME", "system": "/system TEXT", "save": "/save NAME"}
        if name in elsewhere:
            raise ConfigError(f"{name} is not changed by /set but by {elsewhere[name]}.")
        known = [option.name for option in OPTIONS.values() if option.live]
        if name not in known:
            hint = nearest(name, known) if name else ""
            raise ConfigError(f"There is no setting {name!r}.{hint} Known: {', '.join(known)}.")
        if not value:
            raise ConfigError(f"{name} needs a value: {OPTIONS[name].wanted}.")
        new = OPTIONS[name].parse(value, name)
        if name == "render":
            chat.screen.render = new
        elif name == "seed":
            session.seed(None if new == RANDOM else new)
        else:
            session.sampling = replace(session.sampling, **{name: new})
        chat.screen.note(f"{name} is {shown(new)}")

    def do_show(self, _: str) -> None:
        """/show: the model and the settings"""
        chat, session, info = self._chat, self._chat.session, self._chat.loading.info
        table = _table()
        table.add_row("model", Text(f"{info.path} ({info.stage}, {millions(info.parameters)})"))
        for name, value in asdict(session.sampling).items():
            table.add_row(name, RANDOM if value is None else shown(value))
        table.add_row("render", chat.screen.render)
        table.add_row("system", Text(printable(session.system or "none")))
        table.add_row("turns", str(len(session.messages) // 2))
        if chat.journal is not None:
            table.add_row("kept in", Text(str(chat.journal.path or "nothing yet")))
        else:
            table.add_row("kept in", "nothing (not saved)")
        chat.screen.show(table)

    def do_stats(self, _: str) -> None:
        """/stats: speed and length of the last reply"""
        last = self._chat.session.last
        if last is None:
            raise ConfigError("There is no reply to measure yet; write a message first.")
        table = _table()
        table.add_row("prompt", f"{last.prompt} tokens, {last.cached} of them remembered")
        table.add_row("reply", f"{last.written} tokens in {last.seconds:.2f} s")
        if last.written:
            table.add_row("first token", f"after {last.first * 1000:.0f} ms")
            after = " after the first" if last.drafts == 1 else ""
            table.add_row("speed", f"{last.tokens_per_second:.0f} tokens/s{after}")
        used = last.prompt + last.written
        table.add_row("context", f"{used} of {self._chat.session.context} tokens")
        self._chat.screen.show(table)


GROUPS = (
    ("talk", Talking),
    ("settings", Tuning),
    ("models", Comparing),
    ("", Voting),
    ("keep", Filing),
    ("inside", Inside),
    ("", Why),
)
ALIASES = {"exit": "quit", "bye": "quit", "q": "quit", "?": "help"}


class Commands(Talking, Tuning, Comparing, Voting, Filing, Inside, Why):
    """The slash commands of one chat."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    @classmethod
    def names(cls) -> list[str]:
        """All commands, in the order of /help."""
        return [name for _, group in (*GROUPS, ("", cls)) for name in _names(group)]

    def run(self, line: str) -> None:
        """Obey one line. A mistake is explained and changes nothing."""
        name, _, rest = line.removeprefix("/").partition(" ")
        name = ALIASES.get(name.lower(), name)
        method = getattr(self, f"do_{name.lower()}", None)
        if method is None:
            hint = nearest(name.lower(), self.names(), "/") or " /help lists the commands."
            self._chat.screen.complain(f"There is no command /{name}.{hint}")
            return
        try:
            method(rest.strip())
        except (TinychatError, OSError) as error:
            if error is self._chat.loading.error or isinstance(error, BrokenPipeError):
                raise
            self._chat.screen.complain(sentence(error))

    def do_help(self, name: str) -> None:
        """/help [COMMAND]: this list, or all about one command"""
        name = name.removeprefix("/").lower()
        if name:
            method = getattr(self, f"do_{name}", None)
            if method is None:
                hint = nearest(name, self.names(), "/") or " /help lists the commands."
                raise ConfigError(f"There is no command /{name}.{hint}")
            first, _, more = cleandoc(method.__doc__ or "").partition("\n\n")
            self._chat.screen.show(Text(f"{first}. {' '.join(more.split())}".strip()))
            return
        rows = []
        for title, group in (*GROUPS, ("", type(self))):
            for command in _names(group):
                about = (getattr(self, f"do_{command}").__doc__ or "").partition("\n")[0]
                usage, _, text = about.partition(": ")
                rows.append((title, usage, text))
                title = ""
        left, middle = (max(len(row[place]) for row in rows) + 2 for place in (0, 1))
        lines = []
        for title, usage, text in rows:  # a line each: what does not fit is cut off at the right
            line = Text.assemble((title.ljust(left), "dim"), usage.ljust(middle), text)
            line.no_wrap, line.overflow = True, "ellipsis"
            lines.append(line)
        self._chat.screen.show(Group(*lines))

    def do_quit(self, _: str) -> None:
        """/quit: leave, as Ctrl-D does; Ctrl-C stops a reply"""
        self._chat.leaving = True


def completions(line: str) -> list[str]:
    """The words that may stand where the last word of `line` stands. Reads no model."""
    head, _, last = line.rpartition(" ")
    if not line.startswith("/") or line.startswith("//"):
        return []
    return sorted(word for word in _words(head.split()) if word.startswith(last))


def _words(before: list[str]) -> Iterator[str]:
    """What can follow the words of a command line."""
    if not before:
        yield from (f"/{name}" for name in Commands.names())
        return
    command, place = before[0].lower(), len(before)
    if command == "/help" and place == 1:
        yield from Commands.names()
    elif command == "/set":
        live = {option.name: option for option in OPTIONS.values() if option.live}
        if place == 1:
            yield from live
        elif before[1] == "render" and place == 2:
            yield from ("auto", "markdown", "plain")
        elif before[1] in live and place == 2:
            yield shown(live[before[1]].default)
    elif (command == "/model" and place == 1) or command == "/compare":
        from tinychat.cli.compare import chat_models

        yield from chat_models()
    elif command == "/load":
        from tinychat.cli.saved import saved_chats

        begun = "".join(f"{word} " for word in before[1:])  # a name may have several words
        names = (chat.name for chat in saved_chats())
        yield from (name.removeprefix(begun) for name in names if name.startswith(begun))
    elif command == "/system" and place == 1:
        yield "off"


def _names(group: Any) -> list[str]:
    return [name.removeprefix("do_") for name in vars(group) if name.startswith("do_")]


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
