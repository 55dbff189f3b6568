"""Run a chapter's cells in a Jupyter kernel and keep what they show: text, pictures, HTML."""

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinychat.book.chapter import BookError, Cell, Chapter
from tinychat.book.notebooks import dump, is_header, notebook

SECONDS = 900  # what one cell may take
SHOWN = ("image/svg+xml", "image/png", "text/html", "text/plain")  # what a page can use

# Runs before the chapter, unseen. A picture comes as SVG and as PNG for sharp screens: the page
# takes the one that is better for it. The fixed salt gives the same drawing the same bytes.
SETUP = """\
import matplotlib
from matplotlib_inline.backend_inline import set_matplotlib_formats
set_matplotlib_formats("svg", "retina")
matplotlib.rcParams["svg.hashsalt"] = "tinychat"
del matplotlib, set_matplotlib_formats
"""

Output = dict[str, str]
"""what one cell showed at one place: MIME type → text (PNG: base64)"""


def execute(chapter: Chapter, root: Path, *, fast: bool) -> list[list[Output]]:
    """Run the chapter from an empty folder; return the outputs of each of its code cells.

    What goes to standard error is dropped: warnings are for authors, who see them when they run
    the chapter. Raises BookError, with the chapter's line, when a cell fails or takes too long.
    """
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    code = [cell for cell in chapter.cells if cell.kind == "code" and not is_header(cell)]
    setup = Cell("code", frozenset(), 1, SETUP)
    book = notebook(replace(chapter, cells=tuple(code)), [setup])
    node = nbformat.reads(dump(book).decode(), as_version=4)
    with tempfile.TemporaryDirectory(prefix="tinychat-") as folder:
        work = Path(folder, "work")
        work.mkdir()
        # Sockets are files where the system has such, with names of some 100 bytes: nobody else on
        # the machine can listen.
        socket = Path(folder, "kernel")
        short = os.name != "nt" and len(os.fsencode(socket)) < 90
        files = {"transport": "ipc", "ip": str(socket)} if short else {}
        client = NotebookClient(
            node,
            km=AsyncKernelManager(**files),
            timeout=SECONDS,
            startup_timeout=SECONDS,
            resources={"metadata": {"path": str(work)}},
        )
        try:
            client.execute(env=environment(os.environ, root, fast=fast), cleanup_kc=True)
        # A kernel that never answers is a RuntimeError.
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            ran = [i for i, cell in enumerate(node.cells) if cell.get("execution_count")]
            cell = code[max(0, (ran[-1] if ran else 1) - 1)]
            raise BookError(f"{chapter.path}:{cell.line}: {plain(str(error)).strip()}") from None
    return [_outputs(cell.outputs) for cell in node.cells[1:]]


def environment(base: Mapping[str, str], root: Path, *, fast: bool) -> dict[str, str]:
    """Return a kernel's variables: the book's scale, this repository's package, no time stamps."""
    changed = {
        "TINYCHAT_FAST": "1" if fast else "0",
        "SOURCE_DATE_EPOCH": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), base.get("PYTHONPATH")))),
        "PYTHONIOENCODING": "utf-8",
        # The kernel must be this Python's, whatever the caller's PATH says.
        "PATH": os.pathsep.join(filter(None, (str(Path(sys.executable).parent), base.get("PATH")))),
    }
    # A reader's settings (TINYCHAT_MINUTES, ...) would change outputs that are kept for all.
    kept = {k: v for k, v in base.items() if k != "MPLBACKEND" and not k.startswith("TINYCHAT_")}
    return kept | changed


def plain(text: str) -> str:
    """Return what a terminal would show: no colour codes, of a redrawn line the last drawing."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def _outputs(outputs: list[Any]) -> list[Output]:
    kept: list[Output] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                kept.append({"text/plain": plain(output.text)})
        else:
            data = {kind: str(output.data[kind]) for kind in SHOWN if kind in output.data}
            # A figure's text form is its Python name, which tells nobody anything.
            if any(kind.startswith("image/") for kind in data):
                data.pop("text/plain", None)
            kept.append(data)
    return [data for data in kept if any(text.strip() for text in data.values())]
