#!/usr/bin/env python3
"""One command to use tinychat from a clone:

    python3 run.py chat              talk to the shipped model
    python3 run.py test [ARGS]       run the tests (arguments go to pytest)
    python3 run.py COMMAND [ARGS]    any other tinychat command: ask, info, train, ...

The first run makes .venv and installs what the command needs; later runs start at once, until
pyproject.toml or constraints.txt changes. Nothing is installed outside this folder.
"""

import sys

OLDEST = (3, 11)
# Before anything that an older Python can't run: this sentence is all that its user should see.
if sys.version_info < OLDEST:
    print(
        "tinychat needs Python 3.11 or newer, and this is Python %d.%d: install a newer one from "
        "https://www.python.org/downloads/ and run the same command with it."
        % sys.version_info[:2],
        file=sys.stderr,
    )
    sys.exit(2)

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STAMP = "tinychat-installed.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {  # what a command needs beyond the package itself
    "test": ("data", "dev", "docs", "notebooks"),
    "train": ("data",),
    "data": ("data",),
    "eval": ("data",),
}

Runner = Callable[[Sequence[str]], int]  # runs a command, returns its exit status


class Advice(Exception):
    """What the user should do now; printed without a traceback, exit status 2."""


def main(arguments: Sequence[str]) -> int:
    """Prepare .venv, then become the command. Returns an exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command, *rest = arguments
    try:
        python = prepare(ROOT, EXTRAS.get(command, ()))
    except Advice as advice:
        print(advice, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error}. Is this clone whole, and may you write into it?", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The next run goes on from here.", file=sys.stderr)
        return 130
    if command == "test":
        os.chdir(ROOT)  # where pytest finds its settings; every other command stays where you are
    return start(command_line(python, command, rest))


def command_line(python: Path, command: str, rest: Sequence[str]) -> list[str]:
    """Return what to start: pytest for `test`, else the tinychat command of that name."""
    if command != "test":
        return [str(python), "-m", "tinychat", command, *rest]
    rest = rest[1:] if rest[:1] == ["--"] else rest
    return [str(python), "-m", "pytest", *rest]


def start(command: Sequence[str]) -> int:
    """Become the command, so that its signals, its terminal and its exit status are the user's."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execv(command[0], list(command))
    # Windows has no exec: wait, and leave Ctrl-C to the command.
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


# ---- the virtual environment -----------------------------------------------------------------


def prepare(root: Path, extras: Iterable[str], run: Runner | None = None) -> Path:
    """Return the Python of an environment in which tinychat and `extras` are installed.

    Raises Advice when this Python can't make one, or pip can't fill it.
    """
    run = run or call
    home = root / ".venv"
    python = venv_python(home)
    wanted = fingerprint(root)
    stamp = read_stamp(home)
    have = set(stamp.get("extras", ()))
    if python.exists() and stamp.get("inputs") == wanted and have.issuperset(extras):
        return python
    if not python.exists():
        make_venv(home, run)
    elif installed(python, "pip") is None:  # its making was interrupted, or another tool made it
        say(f"Putting pip into {home} ...")
        if run([str(python), "-m", "ensurepip"]):
            raise Advice(f"{home} has no pip; delete that folder and run the same command again.")
    # Without the stamp, an installation that is interrupted starts again at the next run.
    (home / STAMP).unlink(missing_ok=True)
    install(root, python, sorted(have.union(extras)), run)
    text = json.dumps({"inputs": wanted, "extras": sorted(have.union(extras))})
    (home / STAMP).write_text(text, encoding="utf-8")
    return python


def venv_python(home: Path, system: str = os.name) -> Path:
    """Return where an environment keeps its Python: Windows has its own layout."""
    return home / "Scripts" / "python.exe" if system == "nt" else home / "bin" / "python"


def fingerprint(root: Path) -> str:
    """Hash what decides an installation. The folder counts: a moved clone must install again."""
    digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def read_stamp(home: Path) -> dict:
    """Return what the last finished installation left; {} for none or an unreadable one."""
    try:
        stamp = json.loads((home / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def make_venv(home: Path, run: Runner) -> None:
    """Make the environment. Raises Advice where Python comes without venv or ensurepip."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise Advice(no_venv(missing[0]))
    say(f"Making {home} ...")
    # --clear: what is left of an environment whose Python is gone would be in the way.
    if run([sys.executable, "-m", "venv", "--clear", str(home)]):
        raise Advice(
            f"{home} could not be made: the reason stands above (a full disk, a folder that can't "
            "be written?). Then run the same command again."
        )


def no_venv(module: str) -> str:
    """Return the advice for a Python that can't make an environment."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return (
        f"This Python ({version}, {sys.executable}) can't make a virtual environment: its module "
        f"`{module}` is missing or does not work.\n"
        f"  Debian, Ubuntu: sudo apt install python{version}-venv\n"
        "  elsewhere: install Python from https://www.python.org/downloads/\n"
        "Then run the same command again."
    )


# ---- what goes into it -----------------------------------------------------------------------


def install(root: Path, python: Path, extras: Sequence[str], run: Runner) -> None:
    """Install torch, then tinychat in place with its extras. Raises Advice when pip fails."""
    constraints = root / "constraints.txt"
    install_torch(python, constraints, run)
    names = f"[{','.join(extras)}]" if extras else ""
    say(f"Installing tinychat{names} (a minute or two) ...")
    # --quiet: dozens of small packages; the large one had its progress bar.
    if run([*pip(python), "--quiet", "-c", str(constraints), "-e", f"{root}{names}"]):
        raise Advice(
            "pip could not install tinychat: its reason stands above. With a network connection "
            "and a few GB of free disk, run the same command again."
        )


def install_torch(python: Path, constraints: Path, run: Runner) -> None:
    """Install torch before the rest, so that the build can be chosen. Raises Advice."""
    version = torch_version(constraints)
    if installed(python, "torch") == version:
        return
    for note, command in torch_commands(python, constraints, cpu_build=wants_cpu_build()):
        say(note)
        if run(command) == 0:
            return
    raise Advice(
        f"pip could not install torch {version}: its reason stands above. torch {version} must "
        "exist for this Python and system, and be reachable."
    )


def torch_commands(
    python: Path, constraints: Path, *, cpu_build: bool
) -> list[tuple[str, list[str]]]:
    """Return what to try, in order, each with the line that says so.

    The package index holds, for Linux, only builds with gigabytes of CUDA libraries; PyTorch's own
    index has the small build. It is asked for torch alone (--no-deps): what torch needs comes with
    the rest. pip also looks into local folders it is set up for, so an offline machine with a
    wheel never gets to the second line.
    """
    torch = f"torch=={torch_version(constraints)}"
    standard = [*pip(python), "-c", str(constraints), torch]
    if not cpu_build:
        return [("Installing torch ...", standard)]
    quick = ["--retries", "1", "--timeout", "15"]  # a closed network may swallow packets
    small = [*pip(python), "--no-deps", "--index-url", CPU_INDEX, *quick, torch]
    return [
        ("Installing torch, the CPU build (no NVIDIA GPU found) ...", small),
        ("That index can't be reached: installing the standard torch (large) ...", standard),
    ]


def wants_cpu_build() -> bool:
    """True where the standard torch would bring CUDA for nothing: Linux without an NVIDIA GPU."""
    return sys.platform == "linux" and not has_nvidia_gpu()


def has_nvidia_gpu() -> bool:
    """Ask NVIDIA's own tool, which lies beside the driver (below WSL, in a folder of its own)."""
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def torch_version(constraints: Path) -> str:
    """Return the version that constraints.txt pins. Raises Advice when there is none."""
    match = re.search(r"^torch==([^\s;+]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise Advice(f"{constraints} has no line `torch==VERSION`; restore it with git.")
    return match[1]


def installed(python: Path, package: str) -> str | None:
    """Return an installed package's version without its build (`2.13.0+cpu` is 2.13.0)."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip().partition("+")[0] if answer.returncode == 0 else None


def pip(python: Path) -> list[str]:
    """Return how a command line that installs something begins."""
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]


def call(command: Sequence[str]) -> int:
    """Run one step of the installation."""
    # pip must not read the question that is piped into `run.py ask`, nor write into the answer.
    return subprocess.call(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def say(line: str) -> None:
    # Progress goes to standard error: `run.py ask ... | less` pipes the answer alone.
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
