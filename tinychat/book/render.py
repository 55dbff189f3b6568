"""A chapter with its outputs as one page of Markdown, with the pictures that it shows."""

import base64
import html
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tinychat.book.chapter import BookError, Cell, Chapter
from tinychat.book.export import render as render_module
from tinychat.book.notebooks import ALT, is_header, prose

LARGE_SVG = 400_000  # bytes; a drawing with more marks than that is slow on a phone
LONG = 40  # lines of output; what is longer scrolls in a frame
FOLDED = {"solution": "Solution", "test": "Test: what must hold here"}

Output = dict[str, str]


@dataclass(frozen=True)
class Page:
    """A page of the site: its Markdown, and the files that it shows by their paths in the site."""

    markdown: str
    files: dict[str, bytes]


def render(chapter: Chapter, outputs: Sequence[Sequence[Output]], intro: str = "") -> Page:
    """Return a chapter's page; `intro` stands below the title and the summary.

    Cells tagged `solution` and `test` are folded, exported ones name their line in the module.
    Raises BookError for a picture without a text that says what is to be seen.
    """
    remaining = iter(outputs)
    lines = _module_lines(chapter)
    files: dict[str, bytes] = {}
    parts: list[str] = []
    for cell in chapter.cells:
        if cell.kind == "markdown":
            text = blocks(prose(cell))
            if intro and not parts:
                text = _below_summary(text, intro)
            parts.append(text)
        elif cell.kind == "code" and not is_header(cell):
            parts += _code_cell(chapter, cell, next(remaining), lines, files)
    return Page("\n\n".join(parts) + "\n", files)


def blocks(text: str) -> str:
    """Put a blank line before a list that follows a paragraph: Jupyter needs none, mkdocs does."""
    done: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        item = re.match(r"(?:[-*+]|1[.)]) +\S", line)
        before = done[-1] if done else ""
        if (
            item
            and not fenced
            and before.strip()
            and not re.match(r"(?:[-*+]|\d+[.)]|\s) *", before)
        ):
            done.append("")
        done.append(line)
    return "\n".join(done)


def fence(text: str, info: str) -> str:
    """Return a code block whose fence is longer than any that the text holds."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=0))
    return f"{ticks} {info}\n{text}\n{ticks}"


def link_chapters(markdown: str, stems: Sequence[str], own: str, up: str = "") -> str:
    """Link the first `chapter 05` of each paragraph to that chapter, `tinychat.gpt` to its page.

    `stems` are the chapters there are (`05_attention`), `own` the page's own, `up` the way to the
    folder that they lie in. Code blocks, headings, formulas and links stay as they are.
    """
    pages = {stem[:2]: f"{up}{stem}.md" for stem in stems if stem != own}
    modules = {stem[3:]: f"{up}api/{stem[3:]}.md" for stem in stems}
    kept = re.compile(
        r"(?P<chapter>\b[Cc]hapter (?P<number>\d\d)\b)"
        r"|(?P<module>`tinychat[./](?P<name>[a-z_]+)(?:\.py)?`)"
        r"|`[^`]*`|!?\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])|\$[^$\n]+\$|<[^>]+>"
    )
    paragraphs = re.split(
        r"(^ *(?:`{3,}|~{3,}).*?^ *(?:`{3,}|~{3,})\s*$|\n\n)", markdown, flags=re.M | re.S
    )

    def linked(paragraph: str) -> str:
        seen: set[str] = set()

        def one(match: re.Match[str]) -> str:
            target = pages.get(match["number"] or "") or modules.get(match["name"] or "")
            if not target or target in seen:
                return match[0]
            seen.add(target)
            return f"[{match[0]}]({target})"

        return kept.sub(one, paragraph)

    return "".join(
        part if re.match(r" *(?:`{3}|~{3}|#|\n|<)", part) else linked(part) for part in paragraphs
    )


def _below_summary(text: str, intro: str) -> str:
    # The title, the summary, then everything else.
    title, _, rest = text.partition("\n\n")
    summary, _, rest = rest.partition("\n\n")
    return "\n\n".join((title, f"{summary}\n{{ .summary }}", intro, rest))


def _code_cell(
    chapter: Chapter,
    cell: Cell,
    outputs: Sequence[Output],
    lines: dict[int, int],
    files: dict[str, bytes],
) -> list[str]:
    source, alt = cell.source, ""
    if source.startswith(ALT):
        first, _, source = source.partition("\n")
        alt = first.removeprefix(ALT).strip()
    parts: list[str] = []
    if cell.exported:
        line = lines[cell.line]
        target = f"api/{chapter.module}.md#L-{line}"
        parts.append(f"[→ {chapter.module_path}]({target}){{ .module #L{line} }}\n{{ .exported }}")
    if source.strip():
        parts.append(fence(source.strip("\n"), "python"))
    for output in _joined(outputs):
        parts.append(_output(chapter, cell, output, alt, files))
    for tag, title in FOLDED.items():
        if tag in cell.tags:
            inside = "\n\n".join(parts).split("\n")
            return [
                "\n".join([f'??? {tag} "{title}"', "", *(f"    {row}".rstrip() for row in inside)])
            ]
    return parts


def _joined(outputs: Sequence[Output]) -> list[Output]:
    """Join texts that follow one another: a kernel sends what a cell prints in several parts."""
    joined: list[Output] = []
    for output in outputs:
        if joined and output.keys() == joined[-1].keys() == {"text/plain"}:
            before = joined.pop()["text/plain"]
            before += "" if before.endswith("\n") else "\n"
            output = {"text/plain": before + output["text/plain"]}
        joined.append(output)
    return joined


def _output(chapter: Chapter, cell: Cell, output: Output, alt: str, files: dict[str, bytes]) -> str:
    if "image/png" in output or "image/svg+xml" in output:
        if not alt:
            place = f"{chapter.path}:{cell.line}"
            raise BookError(f"{place}: this cell shows a picture; begin it with `{ALT}...`")
        return _picture(chapter, output, alt, files)
    if "text/html" in output:
        # Raw HTML ends at a blank line for some readers of Markdown.
        inner = output["text/html"].replace("\n\n", "\n&#10;")
        return f'<div class="output html">{inner}</div>'
    text = output.get("text/plain", "").rstrip()
    long = " .long" if text.count("\n") >= LONG else ""
    return fence(text, f"{{ .text .output .no-copy{long} }}")


def _picture(chapter: Chapter, output: Output, alt: str, files: dict[str, bytes]) -> str:
    svg = output.get("image/svg+xml", "").encode()
    png = base64.b64decode(output.get("image/png", ""))
    # Drawings travel compressed, so they weigh what they weigh then.
    smaller = len(svg) <= LARGE_SVG and len(zlib.compress(svg)) <= len(png)
    vector = bool(svg) and (not png or smaller)
    stem = chapter.file_name.removesuffix(".py")
    number = 1 + len(files)
    path = PurePosixPath("pictures", f"{stem}-{number}.{'svg' if vector else 'png'}")
    files[str(path)] = svg if vector else png
    width, height = _svg_size(svg) if vector else _png_size(png)
    text = html.escape(alt).replace("[", "&#91;").replace("]", "&#93;")
    size = f'width="{width}" height="{height}"'
    return f"![{text}]({path}){{ .picture {size} loading=lazy }}"


def _svg_size(data: bytes) -> tuple[int, int]:
    # matplotlib counts in points, of which an inch has 72; a page in pixels, 96 an inch.
    tag = re.search(rb"<svg[^>]*>", data[:4000])
    points = dict(re.findall(rb' (width|height)="([\d.]+)pt"', tag[0] if tag else b""))
    width, height = (float(points.get(side, 0)) * 4 / 3 for side in (b"width", b"height"))
    return round(width) or 672, round(height) or 336


def _png_size(data: bytes) -> tuple[int, int]:
    # Drawn with twice the pixels, for sharp screens.
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    return width // 2, height // 2


def _module_lines(chapter: Chapter) -> dict[int, int]:
    """Map the chapter line at which an exported cell begins to its line in the module."""
    if not chapter.exported:
        return {}
    first: dict[int, int] = {}
    for line, origin in enumerate(render_module(chapter).origin, 1):
        first.setdefault(origin, line)
    return {cell.line: first[cell.line] for cell in chapter.exported}
