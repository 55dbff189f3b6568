"""The slash commands that look inside the model. torch waits until one of them is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log2
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinychat.cli.tiles import (
    SHADES,
    Bar,
    Guess,
    HeatMap,
    Legend,
    LensTable,
    Tile,
    Tiles,
    has_colour,
    level,
    percent,
    piece,
)
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.cli.loop import Chat
    from tinychat.cli.trace import Head, Trace, Turn

ALTERNATIVES = 10
LEAST = 5


class Inside:
    """What the last turn looked like from inside; mixed into the slash commands."""

    _chat: Chat

    def do_tokens(self, _: str) -> None:
        """/tokens: the pieces of the last turn, as the model read and wrote them, with their ids"""
        from tinychat.cli.trace import last_turn

        session = self._chat.session
        turn, tokenizer = last_turn(session), session.tokenizer

        def tiles(ids: Iterable[int]) -> Tiles:
            return Tiles(
                [
                    Tile(
                        piece(tokenizer, id), str(id),
                        "bold" if not tokenizer.token_bytes(id) else SHADES[n % 2],
                    )
                    for n, id in enumerate(ids)
                ]
            )  # fmt: skip

        message = turn.prompt[turn.start :]
        self._show(
            _dim(f"message, {len(message)} tokens (each with its id):"),
            tiles(message),
            _dim(f"reply, {len(turn.reply)} tokens:"),
            tiles(turn.reply),
            *_read_again(turn),
        )

    def do_probs(self, rest: str) -> None:
        """/probs [N]: how likely each token of the last reply was; N: what else could come there"""
        trace = self._trace()
        if rest:
            place = _whole("N", rest, len(trace.turn.reply), "the tokens of the reply") - 1
            self._show_alternatives(trace, place)
        else:
            self._show_probabilities(trace)

    def do_attn(self, rest: str) -> None:
        """/attn [LAYER [HEAD]]: where one head looks, as a heat map; without HEAD, a line a head"""
        trace = self._trace()
        config, words = trace.model.config, rest.split()
        if len(words) > 2:
            raise ConfigError(f"/attn got {rest!r}; give it a layer and a head, for example 2 1.")
        layers: Sequence[int] = range(1, config.layers + 1)
        if words:
            layers = [_whole("LAYER", words[0], config.layers, "the layers")]
        if len(words) < 2:
            self._show_heads([head for layer in layers for head in trace.heads(layer)])
            return
        head = _whole("HEAD", words[1], config.heads, "the heads of a layer")
        turn, tokenizer = trace.turn, self._chat.session.tokenizer
        self._show(
            _dim(f"layer {layers[0]}, head {head}: each row is a token and where it looks"),
            HeatMap(
                [piece(tokenizer, id) for id in turn.ids[turn.start :]],
                trace.attention(layers[0])[head - 1].tolist(),
            ),
            *_read_again(turn),
        )

    def do_lens(self, rest: str) -> None:
        """/lens [N]: what each layer would write, from token N (logit lens, nostalgebraist 2020)"""
        trace = self._trace()
        reply, tokenizer = trace.turn.reply, self._chat.session.tokenizer
        first = _whole("N", rest, len(reply), "the tokens of the reply") - 1 if rest else 0
        layers = [
            [
                Guess(piece(tokenizer, id), p, id == taken)
                for (id, p), taken in zip(trace.guesses(layer), reply, strict=True)
            ]
            for layer in range(1, trace.layers + 1)
        ]
        self._show(
            _dim("the likeliest token after each layer, shaded by its probability"),
            LensTable([piece(tokenizer, id) for id in reply], layers, first),
            Legend(),
            *_read_again(trace.turn),
        )

    def _trace(self) -> Trace:
        from tinychat.cli.trace import Trace, last_turn

        session = self._chat.session
        return Trace(session.model, last_turn(session))

    def _show(self, *things: RenderableType) -> None:
        self._chat.screen.show(Group(*things))

    def _show_probabilities(self, trace: Trace) -> None:
        tokenizer, chances = self._chat.session.tokenizer, trace.probabilities()
        names = [piece(tokenizer, id) for id in trace.turn.reply]
        key: list[RenderableType] = []
        if has_colour(self._chat.screen.aside):
            key = [Legend()]
            tiles = [
                Tile(name.replace("▁", " "), style=level(p)[0])
                for name, p in zip(names, chances, strict=True)
            ]
        else:
            tiles = [Tile(name, percent(p)) for name, p in zip(names, chances, strict=True)]
        bits = sum(-log2(max(p, 1e-30)) for p in chances) / len(chances)
        places = sorted(range(len(chances)), key=chances.__getitem__)[:LEAST]
        least = ", ".join(f"{n + 1} {names[n]} {percent(chances[n])}" for n in sorted(places))
        self._show(
            Tiles(tiles),
            *key,
            Text(f"{len(chances)} tokens, {bits:.2f} bits each on average"),
            Text(f"least expected: {least}"),
            _dim(
                "as the model sees it: softmax of its raw scores, before temperature and cuts; "
                "/probs N lists what else could have come as token N"
            ),
            *_read_again(trace.turn),
        )

    def _show_alternatives(self, trace: Trace, place: int) -> None:
        session = self._chat.session
        tokenizer, turn = session.tokenizer, trace.turn
        rows, kept = trace.alternatives(place, session.sampling, ALTERNATIVES)
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for name in ("", "rank"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("token", overflow="fold")
        table.add_column("model", justify="right", no_wrap=True)
        table.add_column("drawn", justify="right", no_wrap=True)
        table.add_column("")
        for row in rows:
            table.add_row(
                ">" if row.taken else "",
                str(row.rank),
                Text(piece(tokenizer, row.id), style="bold" if row.taken else ""),
                percent(row.probability),
                percent(row.left) if row.left else "-",
                Bar(row.probability),
            )
        before = "".join(piece(tokenizer, id) for id in turn.reply[:place]).replace("▁", " ")
        after = f" after “{before[-30:]}”" if before else ", the first"
        self._show(
            Text(f"token {place + 1} of {len(turn.reply)}{after}; > is the one that came"),
            table,
            _dim(
                "model: its own probabilities, and the bars; drawn: after the settings as they "
                f"are now, which leave {kept} of {tokenizer.vocab_size} tokens"
            ),
            *_read_again(turn),
        )

    def _show_heads(self, heads: Sequence[Head]) -> None:
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for name in ("layer", "head", "back", "first", "self", "prev", "again"):
            table.add_column(name, justify="right", no_wrap=True)
        for head in heads:
            table.add_row(
                str(head.layer), str(head.head), f"{head.back:.1f}", percent(head.first),
                percent(head.itself), percent(head.previous),
                "-" if head.again is None else percent(head.again),
            )  # fmt: skip
        furthest = max(heads, key=lambda head: head.back)
        previous = max(heads, key=lambda head: head.previous)
        again = max(heads, key=lambda head: head.again or 0)
        tries = [f"/attn {furthest.layer} {furthest.head} looks furthest back",
                 f"/attn {previous.layer} {previous.head} most at the token before"]  # fmt: skip
        if again.again:
            tries.append(
                f"/attn {again.layer} {again.head} most at what followed the same token earlier"
            )
        self._show(
            table,
            _dim(
                "back: tokens it looks back on average, the first token left out; the rest are "
                "shares of its attention: on the first token of all, itself, the token before, "
                "what followed the same token earlier"
            ),
            Text("try " + "; ".join(tries)),
        )


def _dim(text: str) -> Text:
    return Text(text, style="dim")


def _read_again(turn: Turn) -> list[Text]:
    """A remark for a turn that this session did not write."""
    if turn.as_written:
        return []
    return [_dim("this turn was read again from its text; it was not written just now")]


def _whole(name: str, text: str, most: int, what: str) -> int:
    """A number from 1 to `most`. Raises ConfigError for anything else."""
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most:
        return int(text)
    raise ConfigError(f"{name} is {text!r}; it must be a whole number from 1 to {most}, {what}.")
