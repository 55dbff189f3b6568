"""Chapters to modules: render, write, and the map from a module's line back to its chapter."""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinychat.book.chapter import BookError, Chapter, chapter_paths, load

GENERATED = "Generated from chapters/"


@dataclass(frozen=True)
class Module:
    """A rendered module. `origin[i]` is the chapter line of module line i + 1."""

    chapter: Chapter
    text: str
    origin: tuple[int, ...]

    def where(self, line: int) -> int:
        """Return the chapter line behind a 1-based module line.

        A line of the header or between two cells has none of its own: it maps to the title or to
        the end of the cell before it. Raises BookError outside the module.
        """
        if not 1 <= line <= len(self.origin):
            raise BookError(
                f"{self.chapter.module_path} has {len(self.origin)} lines: there is no line {line}"
            )
        return self.origin[line - 1]


def render(chapter: Chapter) -> Module:
    """Return the module that the chapter's exported cells make: each verbatim, in order."""
    summary = chapter.summary.replace("\\", "\\\\").replace('"""', "'''")
    # The closing quotes need no room: the docstring goes on below the summary.
    header = ['"""' + "\n".join(textwrap.wrap(summary, 96)), ""]
    header += [f"{GENERATED}{chapter.file_name}: edit that file,"]
    header += ["then run `python -m tinychat.book export`.", '"""', ""]
    lines = "\n".join(header).split("\n")
    title = next(cell.line for cell in chapter.cells if cell.kind == "markdown")
    origin = [title] * len(lines)
    for i, cell in enumerate(chapter.exported):
        if i:
            lines += ["", ""]
            origin += [origin[-1]] * 2
        lines += cell.source.split("\n")
        origin += range(cell.line, cell.line + cell.lines)
    return Module(chapter, "\n".join(lines) + "\n", tuple(origin))


def read_chapters(root: Path) -> tuple[list[Chapter], list[str]]:
    """Read every chapter of the repository. Returns the readable ones, and a sentence a problem."""
    chapters: list[Chapter] = []
    problems: list[str] = []
    for path in chapter_paths(root):
        try:
            chapter = load(path)
            _ = chapter.summary  # raises for a chapter without a title
        except BookError as error:
            problems.append(str(error))
            continue
        for other in chapters:
            if other.number == chapter.number:
                problems.append(
                    f"{chapter.path}: {other.path} has the number {other.number:02} too"
                )
            if other.module == chapter.module:
                problems.append(f"{chapter.path}: {other.path} has the name {other.module!r} too")
        chapters.append(chapter)
    return chapters, problems


def generated_files(root: Path) -> list[Path]:
    """Return the files that must come from a chapter: `tinychat/*.py`, dunder files aside."""
    return sorted(p for p in (root / "tinychat").glob("*.py") if not p.name.startswith(("__", ".")))


def is_generated(path: Path) -> bool:
    """True for a file that carries the header which `render` writes."""
    head = path.read_text(encoding="utf-8", errors="replace")[:2000]
    return head.startswith('"""') and f"\n{GENERATED}" in head


def orphans(root: Path, chapters: Sequence[Chapter]) -> list[Path]:
    """Return the files directly in `tinychat/` that no chapter exports."""
    wanted = {f"{chapter.module}.py" for chapter in chapters if chapter.exported}
    return [path for path in generated_files(root) if path.name not in wanted]


def export(root: Path) -> tuple[list[str], list[str]]:
    """Write every module whose text changed and delete generated files that lost their chapter.

    Returns what was done and what went wrong, a line each. A chapter that can't be read keeps its
    module as it was; a file that this machine did not write is never deleted.
    """
    chapters, problems = read_chapters(root)
    done: list[str] = []
    for chapter in chapters:
        if not chapter.exported:
            continue
        text = render(chapter).text
        try:
            compile(text, chapter.module_path, "exec", dont_inherit=True)
        except SyntaxError as error:
            line = render(chapter).where(error.lineno or 1)
            problems.append(f"{chapter.path}:{line}: {error.msg}")
            continue
        path = root / chapter.module_path
        if not path.exists() or path.read_bytes() != text.encode():
            _write(path, text)
            done.append(f"wrote {chapter.module_path}")
    if not problems:
        for path in orphans(root, chapters):
            if is_generated(path):
                path.unlink()
                done.append(f"removed tinychat/{path.name}: no chapter exports it any more")
    return done, problems


def _write(path: Path, text: str) -> None:
    # Another process may import the module meanwhile: it sees the old file or the new one.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(text.encode())
    os.replace(temporary, path)
