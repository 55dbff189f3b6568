"""The twin of export: compares in memory, writes nothing."""

from pathlib import Path

from tinychat.book import law
from tinychat.book.export import orphans, read_chapters, render

REMEDY = "run `python -m tinychat.book export`"


def check(root: Path) -> list[str]:
    """Return one sentence for each thing that is wrong with the book; none when all is well."""
    chapters, problems = read_chapters(root)
    problems += law.problems(chapters)
    for chapter in chapters:
        if not chapter.exported:
            continue
        path = root / chapter.module_path
        if not path.exists():
            problems.append(f"{chapter.module_path} is missing; {REMEDY}")
            continue
        module = render(chapter)
        # Lines are compared without their ends: git may check out CRLF on Windows.
        have = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        if have != module.text:
            line = _first_difference(have, module.text)
            source = module.where(min(line, len(module.origin)))
            problems.append(
                f"{chapter.module_path}:{line} differs from {chapter.path}:{source}; {REMEDY}"
            )
    for path in orphans(root, chapters):
        problems.append(
            f"tinychat/{path.name} comes from no chapter; delete it, or move it into a folder"
        )
    return problems


def _first_difference(have: str, want: str) -> int:
    pairs = zip(have.split("\n"), want.split("\n"), strict=False)
    shorter = min(have.count("\n"), want.count("\n")) + 1
    return next((i for i, (a, b) in enumerate(pairs, 1) if a != b), shorter)
