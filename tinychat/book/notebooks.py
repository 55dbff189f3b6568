"""Chapters as Jupyter notebooks: the same cells, as the JSON that Jupyter and Colab open."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinychat.book.chapter import Cell, Chapter, chapter_paths, load

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ALT = "# alt: "  # the first line of a cell that draws: what its picture shows


def notebook(chapter: Chapter, first: Sequence[Cell] = ()) -> dict[str, Any]:
    """Return a chapter as a notebook (nbformat 4.5) that was not run, `first` before its cells."""
    cells = [*first, *(cell for cell in chapter.cells if not is_header(cell))]
    return {
        "cells": [_cell(i, cell) for i, cell in enumerate(cells)],
        "metadata": {"kernelspec": KERNEL, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def is_header(cell: Cell) -> bool:
    """True for jupytext's header: comments above the first marker that say what the file is."""
    return cell.line == 1 and cell.source.startswith("# ---\n# jupyter:")


def prose(cell: Cell) -> str:
    """Return the Markdown of a markdown cell: its lines without the `# ` before them."""
    return "\n".join(
        line.removeprefix("# ") if line.startswith("# ") else line.removeprefix("#")
        for line in cell.source.split("\n")
    )


def installer(repository: str) -> Cell:
    """Return a cell that fetches tinychat where it is missing, as on Colab."""
    source = (
        "# Outside a clone of the repository: fetch tinychat, with what draws its pictures.\n"
        "import importlib.util\n\n"
        'if importlib.util.find_spec("tinychat") is None:\n'
        f'    %pip install -q "tinychat[notebooks] @ git+{repository}"'
    )
    return Cell("code", frozenset(), 1, source)


def write_notebooks(root: Path, folder: Path) -> list[Path]:
    """Write every chapter as `folder`/NN_name.ipynb and return the paths. Raises BookError."""
    paths = []
    for source in chapter_paths(root):
        path = folder / f"{source.stem}.ipynb"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dump(notebook(load(source))))
        paths.append(path)
    return paths


def dump(book: dict[str, Any]) -> bytes:
    """Return a notebook's file as Jupyter itself would write it."""
    return (json.dumps(book, indent=1, ensure_ascii=False) + "\n").encode()


def _cell(i: int, cell: Cell) -> dict[str, Any]:
    text = prose(cell) if cell.kind == "markdown" else cell.source
    made: dict[str, Any] = {
        "cell_type": cell.kind,
        "id": f"cell-{i}",
        "metadata": {"tags": sorted(cell.tags)} if cell.tags else {},
        "source": text.splitlines(keepends=True),
    }
    if cell.kind == "code":
        made |= {"execution_count": None, "outputs": []}
    return made
