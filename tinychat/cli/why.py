"""`/why`: the last reply through the eyes of the reward model. torch waits until it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from tinychat.cli.tiles import fit, line, piece
from tinychat.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat
    from tinychat.cli.trace import Turn

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "12345678"
ABOVE, BELOW = "color(75)", "color(208)"
LEAST_SPAN = 1.0
"a reply whose marks differ by less than this many deviations looks flat, because it is"
NAT = 1.0
"a change that fills the bar of a word where none is larger"


@dataclass(frozen=True)
class Word:
    """A word of the reply."""

    text: str
    mark: float
    kl: float | None = None
    "nats; None where nothing was compared"


class Sparkline:
    """Words with a bar below each: its mark, and in a second row how much PPO raised it."""

    def __init__(self, words: Sequence[Word]) -> None:
        self._words = words
        marks = [word.mark for word in words]
        self.low = min(marks)
        self.high = max(max(marks), self.low + LEAST_SPAN)
        self._nats = max(NAT, *(word.kl or 0.0 for word in words))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = PLAIN_BARS if options.ascii_only else BARS
        room = max(options.max_width, 1)
        row: list[Word] = []
        for word in self._words:
            if row and sum(_width(one) for one in row) + _width(word) > room + 1:
                yield from self._row(row, bars, room)
                row = []
            row.append(word)
            if word.text.endswith("↵"):
                yield from self._row(row, bars, room)
                row = []
        if row:
            yield from self._row(row, bars, room)

    def _row(self, row: Sequence[Word], bars: str, room: int) -> RenderResult:
        sizes = [min(cell_len(word.text), room) for word in row]
        pairs = list(zip(row, sizes, strict=True))
        yield line(" ".join(fit(word.text, size) for word, size in pairs))
        marks: list[str | tuple[str, str]] = []
        changes: list[str | tuple[str, str]] = []
        for word, size in pairs:
            bar = bars[step((word.mark - self.low) / (self.high - self.low))]
            marks += [(bar * size, ABOVE if word.mark >= 0 else BELOW), " "]
            changes += [(self._change(word.kl or 0.0, bars) * size, "dim"), " "]
        yield line(*marks[:-1])
        if row[0].kl is not None:
            yield line(*changes[:-1])

    def _change(self, nats: float, bars: str) -> str:
        if abs(nats) < 0.05 * self._nats:
            return " "
        return "-" if nats < 0 else bars[step(nats / self._nats)]


def _width(word: Word) -> int:
    return cell_len(word.text) + 1


def step(share: float) -> int:
    """Which of the eight bars stands for a share from 0 to 1."""
    return min(int(share * len(BARS)), len(BARS) - 1)


class Why:
    """Mixed into the slash commands."""

    _chat: Chat

    def do_why(self, name: str) -> None:
        """/why [CKPT]: the reward model's mark along the last reply

        The bar below a word is the mark that the reply would get if it ended there; 0 is the mean
        of good replies, 1 a standard deviation above it. When an rlhf model talks and its sft model
        is there, a second row shows which words PPO made likelier. CKPT names another reward model.
        """
        from tinychat.cli.marks import marks_along, open_reward, reward_checkpoint
        from tinychat.cli.trace import last_turn

        chat = self._chat
        session, info = chat.session, chat.loading.info
        turn, tokenizer = last_turn(session), session.tokenizer
        path = reward_checkpoint(name, info.path)
        with chat.screen.waiting(f"{path.name} is reading ..."):
            reward = open_reward(path, tokenizer, session.model.device)
            ends, marks = marks_along(reward, tokenizer, turn)
            terms, remark = self._changes(turn)
        words = []
        for begin, end, mark in zip([0, *ends], ends, marks.values, strict=False):
            text = "".join(piece(tokenizer, id) for id in turn.reply[begin:end])
            last = len(turn.reply) if end == ends[-1] else end  # <|end|> belongs to the last word
            kl = None if terms is None else sum(terms[begin:last])
            words.append(Word(text.strip("▁") or text, mark, kl))
        drawn = Sparkline(words)
        bars = PLAIN_BARS if chat.screen.aside.options.ascii_only else BARS
        final = marks.values[-1]
        side = "above" if final >= 0 else "below"
        things: list[RenderableType] = [
            Text(f"the mark if the reply ended after each word, by {path.name}", style="dim"),
            drawn,
            Text(
                f"mark {final:+.2f}: {abs(final):.2f} deviations {side} the mean of good replies "
                f"({bars[0]} is {drawn.low:+.2f}, {bars[-1]} {drawn.high:+.2f})"
            ),
            *_steps(words),
        ]
        if terms is not None:
            things.append(_sum_of(terms, words))
        notes = [remark] if remark else []
        if marks.cut:
            notes.append("older turns were left out: the reward model reads less than the chat")
        if not turn.as_written:
            notes.append("this turn was read again from its text; it was not written just now")
        chat.screen.show(Group(*things, *(Text(note, style="dim") for note in notes)))

    def _changes(self, turn: Turn) -> tuple[list[float] | None, str]:
        """The KL terms of the reply's tokens, or why there are none."""
        from tinychat.cli.marks import kl_terms, reference_of

        session, info = self._chat.session, self._chat.loading.info
        if info.stage != "rlhf":
            return None, (
                f"no KL: {info.path.name} is of the stage {info.stage}, "
                "and only an rlhf model is measured against the sft model it came from"
            )
        try:
            path, reference = reference_of(info, session.tokenizer)
        except CheckpointError as error:
            return None, f"no KL: {error}"
        terms = kl_terms(session.model, reference.to(session.model.device), turn)
        return terms, f"second row: likelier than in {path.name} (-: less likely)"


def _steps(words: Sequence[Word]) -> list[Text]:
    """Where the mark rose and fell most."""
    moves = [
        (after.mark - before.mark, after.text)
        for before, after in zip(words, words[1:], strict=False)
    ]
    if not moves:
        return []
    up, down = max(moves), min(moves)
    parts = []
    if up[0] > 0:
        parts.append(f"{up[0]:+.2f} at “{up[1]}”")
    if down[0] < 0:
        parts.append(f"{down[0]:+.2f} at “{down[1]}”")
    return [Text("largest steps: " + ", ".join(parts))] if parts else []


def _sum_of(terms: Sequence[float], words: Sequence[Word]) -> Text:
    """The KL of the reply, and the word that it owes most to."""
    most = max(words, key=lambda word: word.kl or 0.0)
    where = f", most at “{most.text}” ({most.kl:+.2f})" if (most.kl or 0.0) > 0 else ""
    return Text(
        f"KL to the sft model: {sum(terms):+.2f} nats in {len(terms)} tokens (log p of this model "
        f"minus log p of that one){where}"
    )
