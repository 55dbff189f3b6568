"""`python -m tinychat.book export | check | where PLACE | run CHAPTER | notebooks | curve`."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tinychat.book import check, curves, export, notebooks, where
from tinychat.book.chapter import BookError
from tinychat.runtime.errors import DataError


def find_root() -> Path:
    """Return the repository: the one this file lies in, else the one around the working folder."""
    here = Path(__file__).resolve().parents[2]
    for folder in (here, Path.cwd(), *Path.cwd().parents):
        if (folder / "chapters").is_dir() and (folder / "tinychat").is_dir():
            return folder
    raise BookError("no chapters/ folder here: the book lives in a clone of the repository")


def run_chapter(root: Path, name: str, arguments: Sequence[str]) -> int:
    """Run one chapter as a script, from the repository's root, and return its exit status."""
    path = where.find_chapter(root, name)
    environment = os.environ | {"PYTHONPATH": _prepend(str(root), os.environ.get("PYTHONPATH"))}
    environment.setdefault("MPLBACKEND", "Agg")  # a script shows no windows
    return subprocess.call([sys.executable, str(path), *arguments], cwd=root, env=environment)


def _prepend(first: str, rest: str | None) -> str:
    return first + os.pathsep + rest if rest else first


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 1 for a book that needs work, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m tinychat.book", description=__doc__)
    parser.add_argument("--root", type=Path, help="the repository (default: this one)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("export", help="write the modules of tinychat/ from the chapters")
    commands.add_parser("check", help="say what export would change and which rules are broken")
    place = commands.add_parser("where", help="find the chapter line behind a line of the package")
    place.add_argument("place", metavar="tinychat/attention.py:17")
    run = commands.add_parser("run", help="run a chapter as a script")
    run.add_argument("chapter", metavar="05", help="a chapter's number or name")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the chapter")
    books = commands.add_parser("notebooks", help="write every chapter as a Jupyter notebook")
    books.add_argument("--out", type=Path, default=Path("notebooks"), help="folder (notebooks)")
    curve = commands.add_parser("curve", help="keep a PPO run's metrics for the site's playground")
    curve.add_argument("metrics", type=Path, help="runs/NAME/metrics.jsonl of `tinychat train ppo`")
    curve.add_argument("--title", required=True, help="the run's name on the page")
    curve.add_argument("--about", required=True, help="a sentence or two: what became of it")
    curve.add_argument("--out", type=Path, required=True, help=f"{curves.FOLDER}/ppo-3.json")
    options = parser.parse_args(argv)
    try:
        if options.command == "curve":
            print(curves.write(options.metrics, options.title, options.about, options.out))
            return 0
        root = options.root or find_root()
        if not (root / "chapters").is_dir():
            raise BookError(f"{root} has no folder chapters/: --root names a clone of tinychat")
        if options.command == "run":
            return run_chapter(root, options.chapter, options.arguments)
        if options.command == "where":
            print(where.where(root, options.place))
            return 0
        if options.command == "notebooks":
            print("\n".join(map(str, notebooks.write_notebooks(root, options.out))))
            return 0
        if options.command == "check":
            problems = check.check(root)
            summary = (
                f"{len(problems)} problem(s)" if problems else "the book and the package agree"
            )
        else:
            done, problems = export.export(root)
            print("\n".join(done) or "nothing to write: the package is up to date")
            summary = f"{len(problems)} problem(s)" if problems else ""
    except (BookError, DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for problem in problems:
        print(problem, file=sys.stderr)
    if summary:
        print(summary)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
