"""What the site needs from npm: KaTeX and a font, fetched once, served from the site itself."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinychat.book.chapter import BookError

PACKAGES = Path(__file__).parent / "npm"  # package.json and its lock: the exact versions
KATEX = "node_modules/katex/dist"
COPIED = {  # what the pages load: folder in the site → files of the packages
    "assets/vendor/katex": (f"{KATEX}/katex.min.css",),
    "assets/vendor/katex/fonts": (f"{KATEX}/fonts/*.woff2",),
    "assets/vendor/fonts": (
        "node_modules/@fontsource-variable/inter/files/inter-latin-wght-normal.woff2",
    ),
    "assets/vendor": ("node_modules/iframe-worker/shim/index.js",),
}

NEEDS_NODE = (
    "the site's formulas and fonts come from npm packages: install Node.js 18 or newer from "
    "https://nodejs.org/ (Debian: sudo apt install nodejs npm) and run the same command again"
)


def install(cache: Path) -> Path:
    """Return a folder with the packages that npm's lock file names, made once. Raises BookError."""
    lock = (PACKAGES / "package-lock.json").read_bytes()
    home = cache / f"npm-{hashlib.sha256(lock).hexdigest()[:12]}"
    if (home / "complete").exists():
        return home
    npm = shutil.which("npm")
    if npm is None:
        raise BookError(NEEDS_NODE)
    home.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PACKAGES / name, home / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(home)]
    answer = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL
    )
    if answer.returncode:
        raise BookError(f"npm could not fetch the site's packages: {answer.stderr.strip()}")
    (home / "complete").touch()
    return home


def files(home: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path in the site and the bytes of each file that the pages load."""
    for folder, patterns in COPIED.items():
        for pattern in patterns:
            paths = sorted(home.glob(pattern))
            if not paths:
                raise BookError(f"no {pattern} in {home}: delete that folder and build again")
            for path in paths:
                data = path.read_bytes()
                if path.suffix == ".css":
                    # Every browser that knows the site's other features reads woff2.
                    data = re.sub(rb',url\([^)]*\.(?:woff|ttf)\) format\("[^"]*"\)', b"", data)
                name = "iframe-worker.js" if path.name == "index.js" else path.name
                yield f"{folder}/{name}", data


SET = """\
const katex = require(process.argv[1]);
const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
const set = ([tex, displayMode]) => {
  try {
    return katex.renderToString(tex, { displayMode, throwOnError: true, strict: "error" });
  } catch (error) {
    return { error: String(error.message) };
  }
};
process.stdout.write(JSON.stringify(formulas.map(set)));
"""


def formulas(home: Path, wanted: Sequence[tuple[str, bool]], cache: Path) -> list[str]:
    """Return each `(TeX, on a line of its own)` as HTML with MathML for screen readers.

    They are set here and not in the reader's browser: the page needs no script for them and does
    not jump. Raises BookError for TeX that KaTeX can't read.
    """
    path = cache / f"formulas-{home.name}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    missing = [pair for pair in dict.fromkeys(wanted) if _name(*pair) not in known]
    if missing:
        node = shutil.which("node")
        if node is None:
            raise BookError(NEEDS_NODE)
        answer = subprocess.run(
            [node, "-e", SET, str(home.resolve() / KATEX / "katex.js")],
            input=json.dumps(missing),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if answer.returncode:
            raise BookError(f"KaTeX does not run: {answer.stderr.strip()[-500:]}")
        for (tex, alone), made in zip(missing, json.loads(answer.stdout), strict=True):
            if isinstance(made, dict):
                raise BookError(f"KaTeX can't read the formula {tex!r}: {made['error']}")
            known[_name(tex, alone)] = made
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        os.replace(temporary, path)
    return [known[_name(*pair)] for pair in wanted]


def _name(tex: str, alone: bool) -> str:
    return f"{'$$' if alone else '$'}{tex}"
