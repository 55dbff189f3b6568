"""Every chapter runs top to bottom as a script, opens as a notebook, and matches its module."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinychat.book.chapter import load
from tinychat.book.check import check

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))
SECONDS = 240  # one chapter in its fast form takes seconds; a busy machine may need more
FULL_SECONDS = 900  # in full, two minutes


def test_the_book_and_the_package_agree():
    assert check(ROOT) == []


def run(path: Path, folder: Path, seconds: float, **more: str) -> None:
    """Run a chapter as a script in a folder; what it said is shown where it fails."""
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        **more,
    }
    answer = subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
    )
    assert answer.returncode == 0, answer.stdout[-4000:]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_as_a_script(path, tmp_path):
    # In a folder of its own: what a chapter leaves in runs/book/ must not meet another's.
    run(path, tmp_path, SECONDS, TINYCHAT_FAST="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("book")


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_in_full(path, chain):
    """As a learner runs them: in order, in one folder, each going on from what others made."""
    run(path, chain, FULL_SECONDS, TINYCHAT_FAST="")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_picture_has_a_text_for_those_who_cannot_see_it(path):
    for cell in load(path).cells:
        if re.search(r"^ *picture\(", cell.source, re.M):
            first = cell.source.partition("\n")[0]
            assert re.match(r"# alt: .{20,}", first), f"{path.name}:{cell.line}: {first}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_a_notebook(path):
    jupytext = pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    notebook = jupytext.read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, str(path), "exec")
    text = jupytext.writes(notebook, fmt="py:percent")
    again = jupytext.reads(text, fmt="py:percent")
    assert [cell.source for cell in again.cells] == [cell.source for cell in notebook.cells]
