"""The rounds of `tinychat duel`: prompts, two replies to each, a vote."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from tinychat.cli.console import Screen, is_terminal, printable
from tinychat.cli.keys import Keys, LineKeys, keys_here
from tinychat.cli.loading import Loading, choose
from tinychat.cli.tally import told
from tinychat.cli.votes import append, check_file, voted, votes_file
from tinychat.cli.voting import TRIES, Answer, Prompt, ask, drawn
from tinychat.data.preferences import prompt_key
from tinychat.data.records import Message
from tinychat.runtime.checkpoint import CheckpointInfo, file_sha256
from tinychat.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tinychat.cli.reading import Reader


class Fighter:
    """A checkpoint that answers prompts."""

    def __init__(self, info: CheckpointInfo, settings: Mapping[str, Any], system: str | None):
        self.info = info
        self.sha256 = file_sha256(info.path)
        self.system = system
        self.loading = Loading(info, settings, system)

    def answer(self, prompt: Prompt, seed: int) -> Answer:
        """Draw a reply. Raises ConfigError for a prompt that does not fit."""
        session = self.loading.session()
        session.clear()
        session.system = prompt[0].content if prompt[0].role == "system" else self.system
        session.seed(seed)
        return drawn(session, prompt[-1].content, self.info, self.sha256)


def hold(
    names: Sequence[str | None],
    settings: Mapping[str, Any],
    system: str | None,
    *,
    prompts: Path | None = None,
    part: Literal["train", "test"] | None = None,
    asking: bool = False,
    votes: Path | None = None,
    count: int | None = None,
) -> None:
    """`tinychat duel`: collect votes until the prompts, the count or the user's patience end."""
    infos = [choose(name) for name in names]
    settings = {**settings, "drafts": 1}  # a vote is on what the model says, not on its best of N
    path = votes or votes_file()
    if len(infos) == 1 and settings["temperature"] == 0:
        raise ConfigError(
            f"At temperature 0 {infos[0].path.name} says the same twice; "
            "set --temperature 0.8, or name two checkpoints."
        )
    if asking and (prompts or part):
        raise ConfigError("--ask means that you type the prompts; leave out --prompts and --part.")
    if prompts and part:
        raise ConfigError("--prompts and --part name two sources of prompts; give one of them.")
    fighters = [Fighter(info, settings, system) for info in infos]
    pair = frozenset(fighter.sha256 for fighter in fighters)
    if len(infos) == 2 and len(pair) == 1:
        raise ConfigError(
            f"{infos[0].path.name} and {infos[1].path.name} are the same checkpoint; "
            f"`tinychat duel {infos[0].path.stem}` lets it meet itself."
        )
    check_file(path)
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    screen = Screen(interactive)
    dice = random.Random(settings["seed"])
    reader: Reader | None = None
    if asking:
        reader = _reader(fighters[0].loading, interactive)
        todo: Iterable[Prompt] = _typed(reader)
    else:
        source = _source(prompts, part or ("test" if len(infos) == 2 else "train"))
        todo = _shuffled(source, voted(path, pair), dice, screen)
    for info in infos:
        if info.stage == "base":
            screen.note(f"{info.path.name} is a base model; it was not taught to answer")
    keys: Keys = LineKeys(screen.aside if sys.stdin.isatty() else None, reader)
    if interactive:
        keys = keys_here(screen.out)
    ring = Ring(fighters, settings, dice, screen, keys, path)
    from tinychat.cli.reading import quiet_keyboard

    with quiet_keyboard() if interactive else nullcontext():
        try:
            for prompt in todo:
                ring.announce(prompt, typed=asking)
                ring.fight(prompt)
                if ring.votes == count:
                    break
        except EOFError:
            pass
        except KeyboardInterrupt:
            if not interactive:
                raise
    screen.space()
    many = "s" * (ring.votes != 1)
    screen.note(f"{ring.votes} vote{many} added to {path}" if ring.votes else "no votes this time")
    for line in told(path, pair):
        screen.out.print(Text(line), soft_wrap=not interactive)
    if ring.votes and len(infos) == 1:
        screen.note(f"a reward model learns from them by: tinychat train reward --votes {path}")


@dataclass
class Ring:
    """Where the fighters meet."""

    fighters: Sequence[Fighter]
    settings: Mapping[str, Any]
    dice: random.Random
    screen: Screen
    keys: Keys
    path: Path
    votes: int = 0
    "so far"

    def announce(self, prompt: Prompt, typed: bool) -> None:
        """Show what is asked, unless the user has just typed it."""
        screen = self.screen
        screen.space()
        if prompt[0].role == "system":
            screen.note(f"system message: {printable(prompt[0].content)}")
        question = printable(prompt[-1].content)
        if not screen.interactive:
            screen.out.file.write(f"> {question}\n")
        elif not typed:
            screen.show(Text.assemble((f"{self.votes + 1}  ", "dim"), (question, "bold")))
            screen.space()

    def fight(self, prompt: Prompt) -> None:
        """Let both answer, and keep the vote. Raises EOFError where the user leaves."""
        try:
            with self.screen.waiting("both are writing ..."):
                one, two = self._answers(prompt)
        except ConfigError as error:  # too long for one of them
            self.screen.complain(str(error))
            return
        if one.text.strip() == two.text.strip():
            self.screen.show(Text(one.shown))
            self.screen.note("both said just this, so there is nothing to choose")
            return
        system = self.fighters[0].system
        if system and prompt[0].role != "system":
            prompt = (Message("system", system), *prompt)
        vote, _ = ask(prompt, (one, two), self.settings, self.screen, self.keys)
        if vote is not None:
            append(self.path, vote)
            self.votes += 1

    def _answers(self, prompt: Prompt) -> tuple[Answer, Answer]:
        first, second = self.fighters[0], self.fighters[-1]
        one = first.answer(prompt, self.dice.randrange(2**31))
        # Where two checkpoints say the same, neither is better; one against itself tries again.
        for _ in range(TRIES if first is second else 1):
            two = second.answer(prompt, self.dice.randrange(2**31))
            if one.text.strip() != two.text.strip():
                break
        return one, two


def _source(prompts: Path | None, part: str) -> list[Prompt]:
    """The prompts of a file, or the first questions of our own conversations."""
    if prompts is not None:
        try:
            text = prompts.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise DataError(f"{prompts} can't be read: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{prompts} is not UTF-8 text; save it as UTF-8.") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{prompts} holds no prompts; write one a line.")
        return [(Message("user", line),) for line in lines]
    from tinychat.data.corpus import dialogues
    from tinychat.data.split import split_of

    found = []
    for dialogue in dialogues():
        if split_of(dialogue.id) == part:
            first = next(n for n, m in enumerate(dialogue.messages) if m.role == "user")
            if dialogue.messages[0].role != "assistant":
                found.append(dialogue.messages[: first + 1])
    return found


def _shuffled(
    prompts: Sequence[Prompt], known: set[str], dice: random.Random, screen: Screen
) -> Iterator[Prompt]:
    """Those that have no vote yet, in an order that the dice decide."""
    left = [prompt for prompt in prompts if prompt_key(prompt) not in known]
    if not left:
        screen.note("each of these prompts has a vote of yours already; they come once more")
        left = list(prompts)
    dice.shuffle(left)
    yield from left
    screen.note("these were all the prompts")


def _reader(loading: Loading, interactive: bool) -> Reader:
    from tinychat.cli.reading import PipeReader, TerminalReader

    return TerminalReader(loading) if interactive else PipeReader()


def _typed(reader: Reader) -> Iterator[Prompt]:
    """What the user types; an empty line is asked again."""
    while True:
        text = reader.read().strip()
        if text == "/quit":
            return
        if text:
            yield (Message("user", text),)
