"""Markdown drawn while it is being written: finished blocks once, only the unfinished one live.

A terminal cannot take back what has scrolled away. So a block (paragraph, list, table, ...) goes
into the scroll-back when no later text can change it, and never again. The block that is still
growing is drawn over at each redraw.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments

from tinychat.cli.markdown import Line, finished, rendered

REDRAWS_A_SECOND = 15

_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_CLIP, _WRAP = "\x1b[?7l", "\x1b[?7h"  # does a row that is too long go on in the next one?
# This row, then all below it. Erasing below from the screen's first cell would do, but tmux takes
# that for a cleared screen and keeps the old one in its scroll-back.
_ERASE = "\r\x1b[K\n\x1b[J\x1b[A"
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"  # one repaint, where the terminal knows it


class LiveMarkdown:
    """Draws one reply. `push` text as it comes, then `finish`; the cursor ends on a fresh line.

    Between two redraws the cursor stays, hidden, on the first row of the unfinished block. A
    terminal that is resized keeps the cursor with its text, so the block is found again however
    its rows were wrapped anew; and a row that is wider than we think cannot move it.
    """

    def __init__(
        self, console: Console, live: bool = True, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._console = console
        self._live = live
        self._clock = clock
        self._text = ""  # from the first block that is not in the scroll-back yet
        self._any = False
        self._drawn = False
        self._next = 0.0

    def push(self, text: str) -> None:
        with uninterrupted():
            self._text += text
            now = self._clock()
            if now >= self._next:
                self._redraw()
                # A long block on a slow machine must not take the model's time: a tenth at most.
                cost = self._clock() - now
                self._next = now + max(1 / REDRAWS_A_SECOND, 10 * cost)

    def finish(self) -> None:
        """Write what is left, as it is."""
        with uninterrupted():
            text, self._text = self._text, ""
            self._write(self._pop(text), [])

    def _redraw(self) -> None:
        cut = finished(self._text)
        done, self._text = self._pop(self._text[:cut]), self._text[cut:]
        self._write(done, self._tail() if self._live else [])

    def _pop(self, text: str) -> list[Line]:
        lines = rendered(text, self._console)
        if lines and self._any:
            lines.insert(0, [])
        self._any = self._any or bool(lines)
        return lines

    def _tail(self) -> list[Line]:
        """The unfinished block, or as much of its end as half the window holds.

        A window that becomes half as wide still shows all its rows then; what a terminal pushes
        into its scroll-back cannot be drawn over.
        """
        begun, _, last = self._text.rpartition("\n")
        # Marks alone may become anything, and would flash as the wrong thing: wait for a letter.
        text = self._text if last.strip(" \t-=*_+#>|`~:") else begun
        lines = rendered(text, self._console)
        if lines and self._any:
            lines.insert(0, [])
        rows = self._console.height // 2
        return lines[-rows:] if rows > 0 else []

    def _write(self, done: list[Line], live: list[Line]) -> None:
        text = _ERASE if self._drawn else ""
        text += "".join(f"{line}\n" for line in self._ansi(done))
        if live:
            rows = "\n".join(self._ansi(live))
            up = f"\x1b[{len(live) - 1}A" if len(live) > 1 else ""
            text += f"{_HIDE_CURSOR}{_CLIP}{rows}{_WRAP}\r{up}"
        elif self._drawn:
            text += _SHOW_CURSOR
        if self._live and text:
            text = f"{_BEGIN_FRAME}{text}{_END_FRAME}"
        self._drawn = bool(live)
        if text:
            self._console.file.write(text)
            self._console.file.flush()

    def _ansi(self, lines: list[Line]) -> list[str]:
        if not lines:
            return []
        with self._console.capture() as captured:
            for line in lines:
                self._console.print(Segments([*line, Segment.line()]), end="", crop=False)
        text = captured.get()
        if self._console.options.ascii_only:
            text = text.translate({ord("•"): "*", ord("▌"): "|", ord("─"): "-"})
        return text.split("\n")[:-1]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end: half a frame would stay on the screen, or be drawn twice."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    usual: Any = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        signal.raise_signal(signal.SIGINT)
