"""From the start of the process to the chat's prompt, beside a bare `import torch`.

    python tests/benchmarks/prompt.py [--runs 7]

1. `tinychat chat` in a pseudo-terminal, until the prompt is drawn
2. `python -c "import torch"`: what a chat that loads its model first would wait for, at least
3. `python -c pass`: what no Python program can do without

The three take turns, so that a disturbance of the machine hits all of them. Prints the median
seconds, and those of the processor: on a busy machine only the latter say much. Then one JSON
line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import pexpect


def processor_seconds(pid: int) -> float:
    """What a running process has used so far, all its threads together (Linux)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def chat() -> tuple[float, float]:
    started = time.perf_counter()
    child = pexpect.spawn(
        sys.executable,
        ["-m", "tinychat", "chat"],
        timeout=60,
        dimensions=(24, 80),
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
    )
    child.expect(rb"1m> ?")
    wall, used = time.perf_counter() - started, processor_seconds(child.pid)
    child.close(force=True)
    return wall, used


def python(code: str) -> tuple[float, float]:
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    used = after.children_user + after.children_system
    return after.elapsed - before.elapsed, used - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    contestants = {
        "tinychat chat, to its prompt": chat,
        'python -c "import torch"': lambda: python("import torch"),
        "python -c pass": lambda: python("pass"),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(runs + 1):
        for name, contestant in contestants.items():
            measured = contestant()
            if number:  # the first round fills the disk cache
                times[name].append(measured)
    medians = {
        name: [round(statistics.median(column), 3) for column in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }
    for name, (wall, used) in medians.items():
        print(f"{name:30} {wall:6.3f} s   of the processor {used:6.3f} s")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
