"""Pairs of replies that a person reads without knowing whose they are, and the count."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.runtime.errors import DataError

if TYPE_CHECKING:
    from tinychat.data.unseen import Prompt

HEAD = """\
Which reply is better? Write A, B, tie (both good) or bad (both bad) behind each "verdict:".
Leave one empty to skip it. The key is in another file: don't look. When you are done:
tinychat eval --count {name}
"""
VERDICTS = ("a", "b", "tie", "bad")


def key_path(path: Path) -> Path:
    return path.with_name(path.name + ".key")


def write_blind(
    path: Path,
    asked: Sequence[Prompt],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    count: int,
    seed: int,
) -> int:
    """Write `count` pairs in random order, each with its sides tossed, and the key beside them.

    Returns how many there are: pairs of equal replies are left out.

    A model is a mapping with name, path, answers and marks (or None). Nothing in the file to read
    tells the models apart but what they wrote.
    """
    import numpy as np

    from tinychat.runtime.files import write_atomic

    dice = np.random.default_rng(seed)
    different = [
        n for n in range(len(asked)) if first["answers"][n].text != second["answers"][n].text
    ]
    chosen = [different[n] for n in dice.permutation(len(different))[:count]]
    parts = [HEAD.format(name=path)]
    key = []
    for place, number in enumerate(chosen, 1):
        sides = [first, second] if dice.integers(2) else [second, first]
        lines = [f"=== {place}"]
        lines += [_said(message.role, message.content) for message in asked[number]]
        for side, model in zip("AB", sides, strict=True):
            answer = model["answers"][number]
            text = answer.text or "(nothing)"
            lines.append(_said(side, text if answer.ended else f"{text} [cut]"))
        parts.append("\n".join([*lines, "verdict:", ""]))
        marks = [model["marks"][number] for model in sides] if first["marks"] else None
        key.append({"a": sides[0]["name"], "b": sides[1]["name"], "marks": marks})
    record = {
        "models": [{"name": m["name"], "path": m["path"]} for m in (first, second)],
        "seed": seed,
        "pairs": key,
    }
    write_atomic(key_path(path), [(json.dumps(record, indent=1) + "\n").encode()])
    write_atomic(path, ["\n".join(parts).encode()])
    return len(chosen)


def _said(name: str, text: str) -> str:
    """Indented, so that no reply can look like a line of ours."""
    from tinychat.cli.console import printable

    lines = printable(text).splitlines() or [""]
    return "\n".join([f"{name}:", *(f"    {line}" for line in lines)])


def read_verdicts(path: Path) -> dict[int, str]:
    """Number of the pair -> a, b, tie or bad, as a person wrote it; DataError for other words."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as text: {error}") from None
    found: dict[int, str] = {}
    place = 0
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.fullmatch(r"=== (\d+)\s*", line):
            place = int(head[1])
        elif line.startswith("verdict:"):
            word = line.partition(":")[2].strip().lower().strip(".")
            if word and word not in VERDICTS:
                raise DataError(f"{path}:{number}: {word!r} is no verdict; write A, B, tie or bad.")
            if word:
                found[place] = word
    if not found:
        raise DataError(f'{path} holds no verdicts; write A, B, tie or bad behind "verdict:".')
    return found


def tally(verdicts: Mapping[int, str], key: Mapping[str, Any]) -> dict[str, Any]:
    """Wins of the first model by the reader's eyes, and how far the judge agrees."""
    first = key["models"][0]["name"]
    counts = {"wins": 0, "ties": 0, "losses": 0, "both_bad": 0, "left_side": 0}
    agreed = decided = 0
    against: list[int] = []
    for place, verdict in sorted(verdicts.items()):
        pair = key["pairs"][place - 1]
        if verdict in ("tie", "bad"):
            counts["ties"] += 1
            counts["both_bad"] += verdict == "bad"
            continue
        counts["wins" if pair[verdict] == first else "losses"] += 1
        counts["left_side"] += verdict == "a"
        if pair["marks"]:
            decided += 1
            of_judge = "a" if pair["marks"][0] > pair["marks"][1] else "b"
            agreed += of_judge == verdict
            if of_judge != verdict:
                against.append(place)
    marked = [pair["marks"] for pair in key["pairs"]]
    judge_wins = sum(
        (pair["marks"][0] > pair["marks"][1]) == (pair["a"] == first)
        for place, pair in enumerate(key["pairs"], 1)
        if place in verdicts and pair["marks"]
    )
    return counts | {
        "agreed": agreed,
        "decided": decided,
        "against": against,
        "judge_wins": judge_wins if all(marked) else None,
        "read": len(verdicts),
    }


def count_verdicts(path: Path) -> None:
    """Print the count of a file that was read blind."""
    from tinychat.evaluation import wilson

    verdicts = read_verdicts(path)
    try:
        key = json.loads(key_path(path).read_text(encoding="utf-8"))
        pairs, (first, second) = key["pairs"], (model["name"] for model in key["models"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{key_path(path)}, the key of {path}, can't be read ({error}); "
            "keep both files together."
        ) from None
    if max(verdicts) > len(pairs) or min(verdicts) < 1:
        raise DataError(f"{path} has other pairs than {key_path(path)}; keep the two together.")
    found = tally(verdicts, key)
    rate = wilson(found["wins"] + found["ties"] / 2, found["read"])
    decisive = found["wins"] + found["losses"]
    print(f"{found['read']} of {len(pairs)} pairs read")
    print(f"  {first} better: {found['wins']}   {second} better: {found['losses']}")
    print(f"  equal: {found['ties']} (both bad: {found['both_bad']})")
    print(f"  {first} wins {rate.show()}, equal counted half")
    if decisive:
        print(f"  chosen on side A: {wilson(found['left_side'], decisive).show()} of {decisive}")
    if found["judge_wins"] is not None:
        print(f"  the judge on the same pairs: {first} wins {found['judge_wins']}/{found['read']}")
    if found["decided"]:
        share = wilson(found["agreed"], found["decided"])
        print(f"  judge and reader agree in {share.show()} of {found['decided']}")
        print(f"  they disagree in: {', '.join(map(str, found['against'])) or 'none'}")
