"""A chapter: a jupytext percent script, read as a list of cells."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MARKER = re.compile(r"^# %%(?P<rest>(?:\s.*)?)$")
FILE_NAME = re.compile(r"^(?P<number>\d\d)_(?P<name>[a-z][a-z0-9_]*)\.py$")
TAGS = re.compile(r"\btags\s*=\s*(\[[^\]]*\])")


class BookError(Exception):
    """A chapter that can't be read, in one sentence that names the place."""


@dataclass(frozen=True)
class Cell:
    """One cell. `line` is the 1-based chapter line of the first line of `source`."""

    kind: str  # "code", "markdown" or "raw"
    tags: frozenset[str]
    line: int
    source: str  # without blank lines around it

    @property
    def exported(self) -> bool:
        return "export" in self.tags

    @property
    def lines(self) -> int:
        return self.source.count("\n") + 1 if self.source else 0


@dataclass(frozen=True)
class Chapter:
    """One file of `chapters/`."""

    number: int
    module: str
    file_name: str
    cells: tuple[Cell, ...]

    @property
    def path(self) -> str:
        """The chapter's path in the repository, with forward slashes on every system."""
        return f"chapters/{self.file_name}"

    @property
    def module_path(self) -> str:
        return f"tinychat/{self.module}.py"

    @property
    def exported(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.exported)

    @cached_property
    def summary(self) -> str:
        """The first paragraph below the title; the title itself where there is none.

        Raises BookError when the first markdown cell has no `# # Title` line.
        """
        first = next((cell for cell in self.cells if cell.kind == "markdown"), None)
        prose = (
            [line.removeprefix("#").strip() for line in first.source.splitlines()] if first else []
        )
        title = next((i for i, line in enumerate(prose) if line.startswith("# ")), None)
        if title is None:
            raise BookError(f"{self.path}: the first markdown cell needs a title line `# # Title`")
        paragraph: list[str] = []
        for line in prose[title + 1 :]:
            if line:
                paragraph.append(line)
            elif paragraph:
                break
        return " ".join(paragraph) or prose[title].removeprefix("# ")


def parse(text: str, file_name: str) -> Chapter:
    """Read a chapter's text.

    Raises BookError for a file name that isn't `NN_name.py` and for a marker with unreadable tags.
    """
    match = FILE_NAME.match(file_name)
    if match is None:
        raise BookError(f"chapters/{file_name}: a chapter is named like 05_attention.py")
    cells = tuple(_cells(text.replace("\r\n", "\n").split("\n"), file_name))
    return Chapter(int(match["number"]), match["name"], file_name, cells)


def load(path: Path) -> Chapter:
    """Read one chapter from disk. Raises BookError, also for a file that isn't UTF-8."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise BookError(f"chapters/{path.name}: not UTF-8 at byte {error.start}") from None


def chapter_paths(root: Path) -> list[Path]:
    """Return the chapter files of a repository in the order of their numbers."""
    return sorted(path for path in (root / "chapters").glob("*.py") if path.name[0].isdigit())


def _cells(lines: list[str], file_name: str) -> Iterator[Cell]:
    # What stands before the first marker is jupytext's header (comments), or code without a tag.
    starts = [i for i, line in enumerate(lines) if MARKER.match(line)]
    if cell := _cell("code", frozenset(), lines, 0, starts[0] if starts else len(lines)):
        yield cell
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        match = MARKER.match(lines[start])
        assert match is not None
        rest = match["rest"]
        kind = next((kind for kind in ("markdown", "raw") if f"[{kind}]" in rest), "code")
        try:
            tags = frozenset(json.loads(found[1])) if (found := TAGS.search(rest)) else frozenset()
        except ValueError:
            raise BookError(
                f'chapters/{file_name}:{start + 1}: can\'t read the tags; write tags=["export"]'
            ) from None
        if cell := _cell(kind, tags, lines, start + 1, end):
            yield cell


def _cell(kind: str, tags: frozenset[str], lines: list[str], start: int, end: int) -> Cell | None:
    while start < end and not lines[start].strip():
        start += 1
    while start < end and not lines[end - 1].strip():
        end -= 1
    return Cell(kind, tags, start + 1, "\n".join(lines[start:end])) if start < end else None
