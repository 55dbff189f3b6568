"""`/vote`, and how anyone votes: two replies side by side in hidden order, and one key."""

from __future__ import annotations

import secrets
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tinychat.cli.compare import columns
from tinychat.cli.console import Screen, printable, shortened
from tinychat.cli.keys import Choice, Keys
from tinychat.cli.votes import Maker, Vote, Winner, append, check_file, votes_file
from tinychat.data.records import Message
from tinychat.runtime.checkpoint import CheckpointInfo, file_sha256
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat
    from tinychat.cli.session import ChatSession

Prompt = tuple[Message, ...]
CHOICES = (
    Choice("a", "better", ("1", "left")),
    Choice("b", "better", ("2", "right")),
    Choice("t", "tie", ("3", "down")),
    Choice("x", "both bad", ("4", "up")),
    Choice("s", "skip", ("5",)),
)
SAID = {"a": "A is better", "b": "B is better", "t": "a tie", "x": "both bad", "s": "skipped"}
TRIES = 4
"draws after which a model is taken to say the same thing always"


@dataclass(frozen=True)
class Answer:
    """A reply that is voted on."""

    text: str
    made: Maker | None

    @property
    def shown(self) -> str:
        return printable(self.text).strip() or "(no words came)"


def ask(
    prompt: Prompt,
    answers: tuple[Answer, Answer],
    sampling: Mapping[str, Any],
    screen: Screen,
    keys: Keys,
) -> tuple[Vote | None, int]:
    """Show two replies in an order that is drawn; return the vote, and which one is better.

    No vote where it was skipped; the better one is 0 or 1, and 0 for a tie. Raises EOFError where
    the user leaves.
    """
    order = [0, 1] if secrets.randbelow(2) else [1, 0]
    cells = [(name, answers[n].shown) for name, n in zip("AB", order, strict=True)]
    if screen.interactive:
        screen.show(columns(cells, screen.out.width))
        screen.space()
    else:
        shown = (f"{name}:\n{textwrap.indent(text, '  ')}\n" for name, text in cells)
        screen.out.file.write("".join(shown))
        screen.out.file.flush()
    key = keys.read(CHOICES)
    screen.note(SAID[key])
    if key == "s":
        return None, 0
    better = order["ab".index(key)] if key in "ab" else 0
    winner = "ab"[better] if key in "ab" else {"t": "tie", "x": "bad"}[key]
    vote = Vote(
        prompt=prompt,
        a=answers[0].text.strip(),
        b=answers[1].text.strip(),
        winner=cast(Winner, winner),
        left="ab"[order[0]],  # type: ignore[arg-type]
        made={"a": answers[0].made, "b": answers[1].made},
        sampling=sampling,
    )
    return vote, better


def drawn(session: ChatSession, text: str, info: CheckpointInfo, sha256: str) -> Answer:
    """Let a session answer a message."""
    for _ in session.reply(text):
        pass
    assert session.last is not None
    last = session.last
    maker = Maker(info.path.name, info.stage, sha256, session.sampling.seed, last.ended)
    return Answer(last.text, maker)


class Voting:
    """The slash command that votes; mixed into the others."""

    _chat: Chat

    def do_vote(self, _: str) -> None:
        """/vote: draw a second reply, and say which is better

        Side by side, in an order that you don't know. The conversation goes on with the better
        one, for a tie with the first. The vote goes into votes.jsonl in the user's data folder,
        for `tinychat train reward --votes`.
        """
        chat = self._chat
        session, keys = chat.session, chat.keys
        if not session.messages:
            raise ConfigError("There is no reply to vote on yet; write a message first.")
        if keys is None:
            raise ConfigError(
                "/vote needs a terminal to ask at; `tinychat duel` reads votes from a pipe too."
            )
        if session.sampling.greedy:
            raise ConfigError(
                "At temperature 0 the second reply would be the same; try /set temperature 0.8."
            )
        path, info = votes_file(), chat.loading.info
        check_file(path)
        sha256 = file_sha256(info.path)
        first = Answer(session.messages[-1].content, _maker(session, info, sha256))
        with chat.screen.waiting("another reply is being written ..."):
            other, second = _another(session, first, info, sha256)
        system = [Message("system", session.system)] if session.system else []
        prompt = (*system, *session.messages[:-1])
        chat.screen.note(f"two replies to: {shortened(prompt[-1].content)}")
        try:
            vote, better = ask(prompt, (first, second), asdict(session.sampling), chat.screen, keys)
        except EOFError:
            vote, better = None, 0
        if vote is None:
            chat.screen.note("no vote; the conversation stays as it was")
            return
        append(path, vote)
        if better:
            session.adopt(other)
            chat.on_turn()
        where = "with the other reply" if better else "with the reply it had"
        chat.screen.note(f"kept in {path}; the conversation goes on {where}")


def _maker(session: ChatSession, info: CheckpointInfo, sha256: str) -> Maker | None:
    """Who wrote the last reply, if this session did."""
    last = session.last
    if last is None or session.last_tokens is None:
        return None
    return Maker(info.path.name, info.stage, sha256, session.sampling.seed, last.ended)


def _another(
    session: ChatSession, first: Answer, info: CheckpointInfo, sha256: str
) -> tuple[ChatSession, Answer]:
    """Another reply to the last message, in a session of its own. Raises ConfigError for none."""
    for _ in range(TRIES):
        seed = secrets.randbelow(2**31)
        other = session.fork(replace(session.sampling, seed=seed))
        second = drawn(other, session.messages[-2].content, info, sha256)
        if second.text.strip() and second.text.strip() != first.text.strip():
            return other, second
    raise ConfigError(
        f"The model said nothing else in {TRIES} tries; a higher temperature may help, "
        f"as in /set temperature {session.sampling.temperature + 0.3:.1f}."
    )
