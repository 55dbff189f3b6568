"""Shared by all tests: a failure in a generated module names the chapter line to edit."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from tinychat.book.chapter import BookError
from tinychat.book.where import where

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are drawn, never shown
# No test reads the settings of whoever runs it, or writes into their home; none hangs on a
# terminal's colors and size.
FOREIGN = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
for name in [*os.environ]:
    if name.startswith("TINYCHAT_") or name in FOREIGN:
        del os.environ[name]
os.environ["TINYCHAT_CONFIG"] = os.devnull
os.environ["TINYCHAT_SAVE"] = "0"
settings.register_profile("tinychat", deadline=None)  # a busy machine is no failure
settings.load_profile("tinychat")


@pytest.fixture
def holding():
    """A context in which another process keeps a run's folder, until it is killed."""
    code = "import sys; from tinychat.runtime.state import lock_run; lock_run(sys.argv[1]); "
    code += "print('held', flush=True); sys.stdin.read()"

    @contextmanager
    def hold(folder):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as other:
            try:
                held = other.stdout.readline()
                assert held == "held\n", other.stderr.read()
                yield
            finally:
                other.kill()

    return hold


def edit_here(excinfo: pytest.ExceptionInfo[BaseException], root: Path = ROOT) -> str | None:
    """Return `edit here: chapters/05_attention.py:47` for the innermost line of a generated module.

    None when the traceback passes through none.
    """
    for entry in reversed(excinfo.traceback):
        path = Path(entry.path)
        if path.parent == root / "tinychat" and not path.name.startswith("__"):
            try:
                return f"edit here: {where(root, f'{path}:{entry.lineno + 1}')}"
            except BookError:
                return None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.excinfo is not None and (line := edit_here(call.excinfo)):
        # The last section of a report is what a person sees last.
        report.sections.append(("chapter", line))
    return report
