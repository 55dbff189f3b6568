"""Outputs are kept until something that they depend on changes; prose is not among it."""

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinychat.book.chapter import Chapter

FORM = 1  # raise it when the outputs are stored or made in another way
# What is read from disk, and by which modules: code that imports none of them can't reach it.
DATA = {
    "tinychat/data/corpus/*": ("tinychat/data/",),
    "tinychat/data/*.jsonl": ("tinychat/data/",),
    "tinychat/data/*.model": ("tinychat/data/",),
    "checkpoints/*.safetensors": ("tinychat/runtime/checkpoint.py", "tinychat/runtime/search.py"),
}

Outputs = list[list[dict[str, str]]]


def outputs(
    chapter: Chapter,
    root: Path,
    folder: Path,
    *,
    fast: bool,
    run: Callable[[Chapter], Outputs],
) -> Outputs:
    """Return what the chapter's code cells show: from `folder`, or by running it."""
    name = f"{chapter.file_name.removesuffix('.py')}-{'fast' if fast else 'full'}"
    return kept(folder / f"{name}.json", key(chapter, root, fast=fast), lambda: run(chapter))


def kept(path: Path, wanted: str, make: Callable[[], Any]) -> Any:
    """Return what `path` holds if it was made under the key `wanted`, else make and keep it."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == wanted:
            return stored["made"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never made, or cut off: make it
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"key": wanted, "made": made}), encoding="utf-8")
    os.replace(temporary, path)
    return made


def key(chapter: Chapter, root: Path, *, fast: bool) -> str:
    """Hash what decides the outputs of a chapter: its code cells, what `digest` sees, the scale."""
    return digest(root, [cell.source for cell in chapter.cells if cell.kind == "code"], fast=fast)


def digest(root: Path, code: Sequence[str], *, fast: bool = True) -> str:
    """Hash code with what it stands on.

    That is every module of the package that it imports, the files that those read, and the
    versions of Python and of the packages.
    """
    begin = json.dumps([FORM, fast, sys.version_info[:3], list(code)])
    hashed = hashlib.sha256(begin.encode())
    modules = imported(root, code)
    for path in sorted(modules | set(_data(root, modules))):
        hashed.update(path.relative_to(root).as_posix().encode() + b"\0")
        hashed.update(hashlib.sha256(path.read_bytes()).digest())
    hashed.update("\n".join(versions()).encode())
    return hashed.hexdigest()


def imported(root: Path, sources: Iterable[str]) -> set[Path]:
    """Return the files of `tinychat` that the sources import, and what those import in turn."""
    found: set[Path] = set()
    waiting = [path for source in sources for path in _files(root, source)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _files(root, path.read_text(encoding="utf-8"))
    return found


def versions() -> list[str]:
    """Return `name==version` of what the package and the notebooks stand on, where installed."""
    try:
        needs = importlib.metadata.requires("tinychat") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []  # run from a folder, as in a test
    names = {m[0] for need in needs if (m := re.match(r"[A-Za-z0-9_.-]+", need)) and _counts(need)}
    found = []
    for name in sorted(names):
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return found


def _counts(need: str) -> bool:
    return "extra ==" not in need or bool(re.search(r"extra == .notebooks.", need))


def _data(root: Path, modules: Iterable[Path]) -> Iterator[Path]:
    names = [path.relative_to(root).as_posix() for path in modules]
    for pattern, readers in DATA.items():
        if any(name.startswith(readers) for name in names):
            yield from (path for path in root.glob(pattern) if path.is_file())


def _files(root: Path, source: str) -> Iterator[Path]:
    """Yield the files behind the names of `tinychat` in one source, packages' faces included."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from tinychat.data import stories` may name a module or a name in one: try both.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "tinychat":
                for end in range(1, len(parts) + 1):
                    place = root.joinpath(*parts[:end])
                    for path in (place / "__init__.py", place.with_suffix(".py")):
                        if path.is_file():
                            yield path
