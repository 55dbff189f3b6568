"""From a place in the package to the place in the chapter that must be edited."""

import re
from pathlib import Path

from tinychat.book.chapter import BookError, Chapter, chapter_paths, load
from tinychat.book.export import render


def where(root: Path, place: str) -> str:
    """Map `tinychat/attention.py:17` to `chapters/05_attention.py:LINE`.

    Takes a path from anywhere (absolute, with backslashes), with or without a line.
    Raises BookError for what isn't a generated module.
    """
    path, line = split_place(place)
    chapter = chapter_of(root, path)
    return f"{chapter.path}:{render(chapter).where(line)}"


def split_place(place: str) -> tuple[str, int]:
    """Split `path:line`, or `path:line:column` as linters print it; the line is 1 where none is.

    A drive's colon stays in the path.
    """
    found = re.fullmatch(r"(.*?):([0-9]+)(?::[0-9]+)?:?", place)
    return (found[1], int(found[2])) if found else (place, 1)


def chapter_of(root: Path, module_path: str) -> Chapter:
    """Return the chapter that makes a module, found by the file's name. Raises BookError."""
    parts = module_path.replace("\\", "/").split("/")
    module = parts[-1].removesuffix(".py")
    if parts[-2:-1] in ([], ["tinychat"]) and parts[-1].endswith(".py"):
        for path in chapter_paths(root):
            if path.stem[3:] == module:
                return load(path)
    raise BookError(f"{module_path} is not made from a chapter: edit it where it is")


def find_chapter(root: Path, name: str) -> Path:
    """Return the chapter meant by `5`, `05`, `attention`, `05_attention` or a path to it.

    Raises BookError with the list of chapters.
    """
    paths = chapter_paths(root)
    stem = name.replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    for path in paths:
        number, _, module = path.stem.partition("_")
        if stem in (path.stem, module) or (stem.isdigit() and int(stem) == int(number)):
            return path
    listed = ", ".join(path.stem for path in paths) or "none"
    raise BookError(f"no chapter {name!r}; there are: {listed}")
