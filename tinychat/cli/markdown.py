"""Markdown as lines for a terminal, and which of its blocks no further text can change.

Both are decided by markdown-it, the parser inside Rich's own Markdown: CommonMark with tables
(https://spec.commonmark.org/0.31.2/, https://github.github.com/gfm/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.markdown import (
    CodeBlock,
    Heading,
    HorizontalRule,
    ListItem,
    Markdown,
    TableDataElement,
)
from rich.rule import Rule
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

Line = list[Segment]

WIDEST = 120
"""Longer lines are hard to read, however wide the terminal is."""
NARROWEST = 10
"""Columns that text needs; a block that leaves less (nested too deep) is shown as it is written."""

_INDENTS = {"blockquote": 4, "ul": 3, "ol": 6}
_CLOSED_BY_A_BLANK_LINE = {"paragraph_open", "heading_open", "table_open", "fence", "hr"}


# Readable on dark and light terminals alike: no painted backgrounds.
_STYLES = Theme({"markdown.code": "cyan", "markdown.code_block": "cyan"})


def _parser() -> MarkdownIt:
    # What a model writes must stay readable, so nothing may vanish: HTML and references are text,
    # addresses are shown, and an image is a link.
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 100})
    parser.enable(["table", "strikethrough"])
    return parser.disable(["reference", "autolink", "image", "entity"])


_PARSER = _parser()
_BLOCKS_ONLY = _parser().disable("inline")


class _LeftHeading(Heading):
    LEVEL_ALIGN = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Code(CodeBlock):
    """Code in the colours of the user's own palette, set off by an indent."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(
            str(self.text).rstrip("\n"),
            self.lexer_name,
            theme="ansi_dark",
            background_color="default",
            word_wrap=True,
            padding=(0, 0, 0, 2),
        )


class _Item(ListItem):
    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        mark = f"{number}. ".rjust(len(str(last_number)) + 3)
        inside = options.update(width=options.max_width - len(mark))
        style = console.get_style("markdown.item.number", default="none")
        for line in console.render_lines(self.elements, inside, style=self.style):
            yield Segment(mark, style)
            yield from line
            yield Segment.line()
            mark = " " * len(mark)


class _Cell(TableDataElement):
    def __init__(self, justify: JustifyMethod) -> None:
        super().__init__(justify)
        self.content.overflow = "fold"  # a long word goes on below; Rich would cut it off


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style="dim", characters="─")


class _Block(Markdown):
    """Tokens that are parsed already, drawn by Rich."""

    elements = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _Code,
        "code_block": _Code,
        "list_item_open": _Item,
        "td_open": _Cell,
        "th_open": _Cell,
        "hr": _Rule,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens


def finished(text: str) -> int:
    """How many characters of `text` belong to blocks that no further text can change.

    The last line counts for nothing until it has its end: `- ` may become a list or a rule. A
    block is finished when another has begun below it, or by the blank line that ends its kind.
    """
    lines = _lines(text)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    blocks = [token for token in _BLOCKS_ONLY.parse("".join(lines)) if _is_top(token)]
    if not blocks:
        return 0
    first, after = blocks[-1].map or [0, 0]
    by_blank = blocks[-1].type in _CLOSED_BY_A_BLANK_LINE and after < len(lines)
    return sum(map(len, lines[: after if by_blank else first]))


def rendered(text: str, console: Console) -> list[Line]:
    """The whole text as lines for this console, a blank one between two blocks."""
    width = max(min(console.width, WIDEST), 2)  # a letter may be two wide
    source = _lines(text)
    lines: list[Line] = []
    for block in _blocks(text):
        begin, end = block[0].map or [0, 0]
        thing: RenderableType = _Block(block)
        if not _fits(block, width):
            thing = Text("".join(source[begin:end]), overflow="fold")
        options = console.options.update(width=width, height=None)
        with console.use_theme(_STYLES):
            drawn = [_trimmed(line) for line in console.render_lines(thing, options, pad=False)]
        while drawn and not drawn[-1]:
            drawn.pop()
        while drawn and not drawn[0]:
            drawn.pop(0)
        if drawn:
            lines += [[], *drawn] if lines else drawn
    return lines


def _lines(text: str) -> list[str]:
    """Lines as markdown-it counts them: only a line feed ends one."""
    return StringIO(text, newline="\n").readlines()


def _is_top(token: Token) -> bool:
    return token.level == 0 and token.nesting >= 0


def _blocks(text: str) -> Iterator[list[Token]]:
    """The tokens of one top-level block after the other."""
    block: list[Token] = []
    for token in _PARSER.parse(text):
        if _is_top(token) and block:
            yield block
            block = []
        for child in token.children or ():
            if child.type == "softbreak":  # a poem keeps its lines
                child.type = "hardbreak"
        block.append(token)
    if block:
        yield block


def _fits(block: Sequence[Token], width: int) -> bool:
    """False where the block leaves too little room for text: Rich drops what gets no column."""
    taken = most = 0
    for token in block:
        taken += token.nesting * _INDENTS.get(token.tag, 0)
        most = max(most, taken)
    columns = sum(token.type == "th_open" for token in block)
    return width - most >= max(NARROWEST, 4 * columns)


def _trimmed(line: Line) -> Line:
    """Without the spaces that fill a line up: they are copied along, and wrap when it narrows."""
    line = list(line)
    while line:
        text, style, _ = line.pop()
        if kept := text.rstrip(" "):
            line.append(Segment(kept, style))
            break
    return line
