"""One prompt, several models, the same seed: side by side. torch waits until they are loaded."""

from __future__ import annotations

import secrets
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinychat.cli import loading
from tinychat.cli.console import Screen, print_json, printable
from tinychat.cli.loading import Loading, choose
from tinychat.cli.progress import millions
from tinychat.data.records import Message
from tinychat.runtime.checkpoint import CheckpointInfo
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.runtime.search import find_first, installed, labels_of, runs

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat
    from tinychat.cli.session import Reply

USUAL = ("base", "sft", "rlhf")
NARROWEST = 30
"columns of a terminal below which a reply is not worth reading beside another"


@dataclass(frozen=True)
class Contender:
    """One model's reply."""

    name: str
    info: CheckpointInfo
    reply: Reply

    @property
    def text(self) -> str:
        return printable(self.reply.text).strip() or "(no words came)"

    @property
    def title(self) -> str:
        return f"{self.name} ({self.info.stage}, {self.info.parameters / 1e6:.1f} M)"


def contenders(names: Sequence[str]) -> list[tuple[str, CheckpointInfo]]:
    """The named checkpoints, or those of base, sft and rlhf that are there, each with a label.

    Raises CheckpointError for one that cannot chat and ConfigError for fewer than two.
    """
    found = []
    if names:
        found = [choose(name) for name in names]
    else:
        for name in USUAL:
            if path := find_first(name):
                try:
                    found.append(choose(str(path)))
                except CheckpointError:
                    continue
    if len(found) < 2:
        if len(names) == 1:
            raise ConfigError(
                f"Comparing takes two checkpoints, and only {names[0]} is named; "
                "name another, as in base sft."
            )
        raise ConfigError(
            f"Comparing takes two checkpoints, and there {'is' if found else 'are'} "
            f"{found[0].path.stem + ' only' if found else 'none'}; name them, as in base sft."
        )
    named = names or [info.path.stem for info in found]
    return list(zip(labels_of(named, [info.path for info in found]), found, strict=True))


def replies(
    models: Sequence[tuple[str, CheckpointInfo]],
    history: Sequence[Message],
    prompt: str,
    settings: Mapping[str, Any],
    system: str | None,
    screen: Screen,
) -> Iterator[Contender]:
    """Let one model after the other answer, each in a session of its own."""
    for name, info in models:
        with screen.waiting(f"{name} is writing ..."):
            session = loading.open_session(info, settings, system)
            session.messages = list(history)
            for _ in session.reply(prompt):
                pass
            assert session.last is not None
            yield Contender(name, info, session.last)


def side_by_side(found: Sequence[Contender], width: int) -> RenderableType:
    """Each reply under its model's name."""
    return columns([(contender.title, contender.text) for contender in found], width)


def columns(cells: Sequence[tuple[str, str]], width: int) -> RenderableType:
    """Titles and texts in columns of equal width, or stacked where they would be too narrow."""
    gap = 3
    column = (width - gap * (len(cells) - 1)) // len(cells)
    if column < NARROWEST:
        parts: list[RenderableType] = []
        for title, text in cells:
            parts += [Text(title, style="bold"), Text(text), Text()]
        return Group(*parts[:-1])
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
    for title, _ in cells:
        table.add_column(Text(title, style="bold"), width=column, overflow="fold")
    table.add_row(*(Text(text) for _, text in cells))
    return table


def labelled(found: Sequence[Contender]) -> str:
    """For a pipe: each reply under its model's name, indented, so that nothing looks like one."""
    return "\n".join(
        f"{contender.name}:\n{textwrap.indent(contender.text, '  ')}" for contender in found
    )


def compare(
    prompt: str,
    names: Sequence[str],
    settings: Mapping[str, Any],
    system: str | None,
    as_json: bool,
) -> None:
    """`tinychat compare`: print the replies."""
    models = contenders(names)
    settings = with_seed(settings)
    # Notes and spinners go where they disturb no pipe.
    screen = Screen(interactive=False)
    found = list(replies(models, (), prompt, settings, system, screen))
    if as_json:
        record = {
            "prompt": prompt,
            "system": system,
            "settings": settings,
            "replies": [
                {
                    "name": contender.name,
                    "checkpoint": str(contender.info.path),
                    "stage": contender.info.stage,
                    "reply": contender.reply.text.strip(),
                    "tokens": contender.reply.written,
                    "ended": contender.reply.ended,
                    "seconds": round(contender.reply.seconds, 3),
                }
                for contender in found
            ],
        }
        print_json(record)
    elif screen.out.is_terminal:
        screen.out.print(side_by_side(found, screen.out.width))
        screen.note(f"seed {settings['seed']}")
    else:
        print(labelled(found))


def with_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a seed that can be told afterwards."""
    seed = settings["seed"]
    return {**settings, "seed": secrets.randbelow(10**6) if seed is None else seed}


def chat_models() -> list[str]:
    """The names of the checkpoints that can chat, without opening them."""
    names = {name for name, _ in installed()}
    mine = {name for name, path in runs().items() if path.stem != "reward"}
    return sorted((names - {"reward"}) | mine)


class Comparing:
    """The slash commands about models."""

    _chat: Chat

    def do_model(self, name: str) -> None:
        """/model [NAME]: go on with another checkpoint

        The conversation and the settings stay. Without NAME: which one talks.
        """
        chat = self._chat
        info = chat.loading.info
        if name:
            old, info = chat.session, choose(name)
            new = Loading(info, asdict(old.sampling), old.system)
            new.messages = old.messages
            new.start()
            with chat.screen.waiting(f"loading {info.path.name} ..."):
                new.session()
            chat.loading = new
            chat.on_turn()
        chat.screen.note(f"{info.path} ({info.stage}, {millions(info.parameters)})")

    def do_models(self, _: str) -> None:
        """/models: the checkpoints that are there"""
        from tinychat.cli.info import models_table

        self._chat.screen.show(models_table())

    def do_compare(self, names: str) -> None:
        """/compare [NAME ...]: several models answer the last message

        Side by side, with the same seed, without changing the conversation. Without names: those
        of base, sft and rlhf that are there.
        """
        chat, session = self._chat, self._chat.session
        if not session.messages:
            raise ConfigError("There is no message to compare replies to yet; write one first.")
        models = contenders(names.split())
        history, prompt = session.messages[:-2], session.messages[-2].content
        settings = with_seed(asdict(session.sampling))
        found = list(replies(models, history, prompt, settings, session.system, chat.screen))
        if chat.screen.interactive:
            chat.screen.show(side_by_side(found, chat.screen.out.width))
        else:
            chat.screen.out.file.write(labelled(found) + "\n")
            chat.screen.out.file.flush()
        chat.screen.note(f"seed {settings['seed']}; the conversation stays as it was")
