"""How tokens, probabilities and attention are drawn: by colour, and by letters without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from tinychat.cli.console import printable

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer

# From unlikely to likely: a bound, a background, ink where there is no colour, the same in ASCII.
# Orange to blue, because not everyone tells red from green; black letters can be read on each.
LEVELS = (
    (0.05, "black on color(208)", " ", " "),
    (0.2, "black on color(222)", "░", "."),
    (0.5, "black on color(254)", "▒", ":"),
    (0.9, "black on color(153)", "▓", "+"),
    (1.0, "black on color(75)", "█", "#"),
)
SHADES = ("black on color(253)", "black on color(246)")
INK = ((0.03, " ", " "), (0.1, "·", "."), (0.25, "░", ":"), (0.5, "▒", "+"), (0.75, "▓", "*"),
       (1.0, "█", "#"))  # fmt: skip


def piece(tokenizer: Tokenizer, id: int) -> str:
    """One token in visible letters: `▁the`, `↵`, `<|end|>`; `<0xE2>` for a part of a letter."""
    data = tokenizer.token_bytes(id)
    if not data:
        return printable(tokenizer.piece(id))
    try:
        text = "".join(_visible(letter) for letter in data.decode())
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)
    # An accent without its letter takes no cell of its own.
    return text if cell_len(text) else "".join(f"<U+{ord(letter):04X}>" for letter in text)


def _visible(letter: str) -> str:
    if letter in " \n\t":
        return {" ": "▁", "\n": "↵", "\t": "→"}[letter]
    return letter if letter.isprintable() else f"<U+{ord(letter):04X}>"


def percent(p: float) -> str:
    """0.973 -> "97%", 0.0042 -> "0.4%"."""
    if p >= 0.0995:
        return f"{100 * p:.0f}%"
    return f"{100 * p:.1f}%" if p >= 0.0005 or p == 0 else "<0.1%"


def level(p: float) -> tuple[str, str, str]:
    """The background, the ink and the ASCII ink of a probability."""
    found = next((rest for bound, *rest in LEVELS if p < bound), list(LEVELS[-1][1:]))
    return found[0], found[1], found[2]


def ink(weight: float, ascii_only: bool = False) -> str:
    """One character, the darker the more attention."""
    _, mark, plain = next((row for row in INK if weight < row[0]), INK[-1])
    return plain if ascii_only else mark


def has_colour(console: Console) -> bool:
    """False on a pipe, with NO_COLOR and with TERM=dumb: then letters must say it all."""
    return console.color_system is not None and not console.no_color


def fit(text: str, width: int) -> str:
    """The text in exactly `width` cells; a long one loses its end and shows so."""
    if cell_len(text) > width > 1:
        text = set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)


def line(*parts: str | tuple[str, str]) -> Text:
    """A line that is cut and never wrapped."""
    return Text.assemble(*parts, no_wrap=True, overflow="crop", end="\n")


@dataclass(frozen=True)
class Tile:
    """One token, with a word below it where there is something to say in letters."""

    text: str
    below: str = ""
    style: str = ""

    @property
    def width(self) -> int:
        return max(cell_len(self.text), cell_len(self.below))


class Tiles:
    """Tokens side by side, wrapped at the terminal's width; the margin numbers each row's first.

    With colour and nothing below them they touch and read as text. Otherwise a gap parts them.
    """

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._tiles = tiles
        self._gap = int(any(tile.below for tile in tiles))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin = len(str(len(self._tiles)))
        room = max(options.max_width - margin - 1, 1)
        number = 1
        for row in self._rows(room):
            parts: list[str | tuple[str, str]] = [(f"{number:>{margin}} ", "dim")]
            for tile in row:
                parts += [(fit(tile.text, min(tile.width, room)), tile.style), " " * self._gap]
            above = line(*parts)
            if self._gap and not has_colour(console):
                above.rstrip()  # with colour, the last tile's padding is part of its box
            yield above
            if self._gap:
                below = [fit(tile.below, min(tile.width, room)) + " " for tile in row]
                yield line((" " * (margin + 1) + "".join(below).rstrip(), "dim"))
            number += len(row)

    def _rows(self, room: int) -> Iterator[list[Tile]]:
        row: list[Tile] = []
        for tile in self._tiles:
            while row and sum(t.width + self._gap for t in row) + tile.width > room:
                # A word that began in this row moves to the next one as a whole, if it can.
                cut = len(row)
                if not self._gap and not _opens(tile):
                    cut = max((n for n, t in enumerate(row) if _opens(t)), default=0) or cut
                yield row[:cut]
                row = row[cut:]
            row.append(tile)
            if tile.text.endswith("↵"):
                yield row
                row = []
        if row:
            yield row


def _opens(tile: Tile) -> bool:
    """True where a row may begin: at a space, a control token, or CJK, which has no spaces."""
    return tile.text[:1] in (" ", "<") or cell_len(tile.text[:1]) == 2


class Legend:
    """What the colours mean, or the ink."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts: list[str | tuple[str, str]] = []
        for n, (bound, style, mark, plain) in enumerate(LEVELS):
            name = f"<{bound:.0%}" if n < len(LEVELS) - 1 else f"{LEVELS[n - 1][0]:.0%}+"
            if has_colour(console):
                parts += [(f" {name} ", style)]
            else:
                parts += [f"{plain if options.ascii_only else mark} {name}  "]
        yield line(*parts)


class Bar:
    """A probability as a bar."""

    def __init__(self, p: float, width: int = 40) -> None:
        self._p, self._width = p, width

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, min(self._width, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = round(self._p * min(self._width, options.max_width))
        yield line(("#" if options.ascii_only else "█") * cells)


class HeatMap:
    """The attention of one head as ink: a row a token that looks, a column a token looked at.

    `weights` has a row for each of `pieces`, over all tokens of the context; `pieces` are its
    last. What doesn't fit is left out from the old end, its weight summed in the first column.
    """

    def __init__(self, pieces: Sequence[str], weights: Sequence[Sequence[float]]) -> None:
        self._pieces, self._weights = pieces, weights

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total, digits = len(self._pieces), len(str(len(self._pieces)))
        label = min(max(map(cell_len, self._pieces)), max(options.max_width // 5, 4), 16)
        head = digits + label + 2  # number, space, piece, space
        room = max(options.max_width - head - 3, 1)  # what came before, a bar, a spare cell
        shown = min(total, room)
        across = 2 if 2 * shown <= room else 1
        first = total - shown
        rule = "|" if options.ascii_only else "│"
        for digit in range(digits):
            numbers = (f"{n + 1:>{digits}}"[digit] for n in range(first, total))
            yield line((" " * (head + 1) + rule + "".join(fit(n, across) for n in numbers), "dim"))
        for n in range(first, total):
            weights = self._weights[n]
            past = sum(weights[: len(weights) - shown])
            cells = (ink(w, options.ascii_only) * across for w in weights[len(weights) - shown :])
            yield line(
                (f"{n + 1:>{digits}} ", "dim"), fit(self._pieces[n], label), " ",
                ink(past, options.ascii_only), (rule, "dim"), "".join(cells).rstrip(),
            )  # fmt: skip
        marks = [plain if options.ascii_only else mark for _, mark, plain in INK[1:]]
        key = [f"{mark} {bound:.0%}+" for mark, (bound, *_) in zip(marks, INK, strict=False)]
        yield Text("  ".join(key), style="dim")
        if first:
            yield Text(
                f"the last {shown} of {total} tokens of the turn; a wider window shows more",
                style="dim",
            )
        yield Text(f"left of the {rule}: all that came before", style="dim")


@dataclass(frozen=True)
class Guess:
    """A token that a layer would have written."""

    text: str
    probability: float
    right: bool
    "True when this is the token that came"


class LensTable:
    """What each layer would have written at each place: layers down, the reply across."""

    CELL = 9

    def __init__(
        self, taken: Sequence[str], layers: Sequence[Sequence[Guess]], first: int = 0
    ) -> None:
        self._taken, self._layers, self._first = taken, layers, first

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name = max(len("reply"), len(str(len(self._layers)))) + 1
        colour, size = has_colour(console), self.CELL
        fits = max((options.max_width - name) // (size + 1), 1)
        places = range(self._first, min(self._first + fits, len(self._taken)))
        yield line(
            (fit("token", name), "dim"), *((fit(str(n + 1), size + 1), "dim") for n in places)
        )
        for number, guesses in enumerate(self._layers, start=1):
            parts: list[str | tuple[str, str]] = [(fit(f"L{number}", name), "dim")]
            for n in places:
                guess = guesses[n]
                style, mark, plain = level(guess.probability)
                if colour:
                    bold = " bold underline" if guess.right else ""
                    parts += [(fit(guess.text, size), style + bold), " "]
                else:
                    tail = (plain if options.ascii_only else mark) + ("=" if guess.right else " ")
                    parts += [fit(guess.text, size - 1) + tail]
            yield line(*parts)
        yield line(
            (fit("reply", name), "dim"),
            *((fit(self._taken[n], size + 1), "bold") for n in places),
        )
        stop = places.stop
        more = f"; /lens {stop + 1} goes on" if stop < len(self._taken) else ""
        yield Text(f"tokens {self._first + 1} to {stop} of {len(self._taken)}{more}", style="dim")
