"""Draw a real session of `tinychat chat` as an SVG: the program in a pseudo-terminal, typed at.

    python tests/recording/record.py [--ckpt NAME] [--seed 3] [--out chapters/assets/session.svg]

What the terminal's screen shows at the end is what is drawn; nothing is written by hand. The
reply's time varies, so /stats is left out.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import pexpect
import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, ROWS = 92, 200
SCRIPT = (
    "hi",
    "why is the sky blue?",
    "tell me a short story about a fox",
    "/probs",
    "/lens",
)
# pyte's names of the eight colours that are not Rich's.
NAMES = {"brown": "yellow", "default": None}


def play(ckpt: str, seed: int, temperature: float, script: tuple[str, ...]) -> pyte.Screen:
    """Type the lines one after the other, each when a new prompt is there."""
    screen = pyte.Screen(COLUMNS, ROWS)
    feed = pyte.ByteStream(screen)
    with tempfile.TemporaryDirectory() as home:
        environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        chat = pexpect.spawn(
            sys.executable,
            ["-m", "tinychat", "chat", "--ckpt", ckpt, "--seed", str(seed),
             "--temperature", str(temperature), "--no-save"],
            cwd=str(ROOT), dimensions=(ROWS, COLUMNS), timeout=60,
            env={**environment, "HOME": home, "TERM": "xterm-256color", "PYTHONUTF8": "1",
                 "XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home, "PROMPT_TOOLKIT_NO_CPR": "1"},
        )  # fmt: skip

        def settle(prompts: int) -> None:
            """Until that many prompts stand on the screen, and nothing has moved for a second."""
            still, end = time.monotonic(), time.monotonic() + 120
            while time.monotonic() < end:
                try:
                    feed.feed(chat.read_nonblocking(65536, timeout=0.2))
                    still = time.monotonic()
                except pexpect.TIMEOUT:
                    shown = sum(line.startswith(">") for line in screen.display)
                    if shown >= prompts and time.monotonic() - still > 1:
                        return
            raise SystemExit("the chat showed no prompt within two minutes:\n"
                             + "\n".join(screen.display).rstrip())  # fmt: skip

        settle(1)
        for number, line in enumerate(script, 2):
            chat.send(f"{line}\r")
            settle(number)
        chat.close(force=True)
    return screen


def segments(screen: pyte.Screen) -> list[list[Segment]]:
    """The screen's rows as styled text, without the empty prompt and the blank rows at the end."""
    last = max(y for y, line in enumerate(screen.display) if line.strip() not in ("", ">"))
    rows = []
    for y in range(last + 1):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        styles = itertools.groupby(cells, key=style_of)
        rows.append([Segment("".join(c.data for c in same), style) for style, same in styles])
    return rows


def style_of(cell: pyte.screens.Char) -> Style:
    def colour(name: str) -> str | None:
        if name in NAMES:
            return NAMES[name]
        if len(name) == 6 and all(letter in "0123456789abcdef" for letter in name):
            return f"#{name}"
        return name.replace("bright", "bright_").replace("__", "_")

    return Style(
        color=colour(cell.fg), bgcolor=colour(cell.bg), bold=cell.bold, italic=cell.italics,
        underline=cell.underscore, reverse=cell.reverse,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="rlhf")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--out", default=str(ROOT / "chapters" / "assets" / "session.svg"))
    parser.add_argument("lines", nargs="*", help="what is typed, instead of the usual lines")
    options = parser.parse_args()
    script = tuple(options.lines) or SCRIPT
    screen = play(options.ckpt, options.seed, options.temperature, script)
    # Rich's own frame asks a server for its font; any monospaced one does.
    frame = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, color_system="truecolor")
        for row in segments(screen):
            console.print(Segments([*row, Segment.line()]), end="", crop=False)
        console.save_svg(str(out), title="tinychat chat", code_format=frame)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
