"""Blind readings: replies of several checkpoints on one sheet, and what the readers' marks say.

    python tests/reading/panel.py sheet FOLDER CKPT[:DRAFTS[:TEMPERATURE]] ... [--parts 4]
    python tests/reading/panel.py score FOLDER MARKS ...

`sheet` asks every checkpoint what nobody trained on: the four lists of this folder and opening
messages of held-out conversations of the basics, `--openers` of them; with `--behind 2` each behind
two held-out conversations about something else, as in a longer chat. It writes FOLDER/sheet-1.md
and so on, each reply under a letter that the prompt's own dice chose, and FOLDER/key.json. A
reader follows GUIDE.md and writes one line a prompt, `12 A3 B0 C1`. One file of MARKS is one
reader's, all parts together; `score` prints a table for each, the first checkpoint the rival.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path
from typing import Any

from tinychat.data import corpus
from tinychat.data.preferences import digest
from tinychat.data.records import Message
from tinychat.data.split import split_of
from tinychat.evaluation import answer_all
from tinychat.generation import Sampling
from tinychat.gpt import load_model
from tinychat.runtime.checkpoint import find

HERE = Path(__file__).parent
LISTS = ("prompts", "strangers", "newcomers", "visitors")
GOOD, NONSENSE = 3, 0
MARKS = re.compile(r"\b([A-Z])\s*([0-4])\b")


def prompts_to_read(openers: int) -> list[tuple[str, str]]:
    """(where from, prompt), the lists first; of d15 what no training conversation opens with."""
    found = [
        (name, line)
        for name in LISTS
        for line in (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    ]
    talks = [*corpus.dialogues(), *corpus.basics()]
    trained = {one.messages[0].content for one in talks if split_of(one.id) == "train"}
    held_out = {
        one.messages[0].content
        for one in talks
        if one.id.startswith("d15") and one.messages[0].role == "user"
    }
    order = sorted(held_out - trained, key=lambda text: digest("panel", text))
    return [*found, *(("openers", text) for text in order[:openers])]


def others(count: int, each: int) -> list[tuple[Message, ...]]:
    """For each of `count` prompts, `each` held-out conversations of two turns in one chat."""
    talks = [one for one in (*corpus.dialogues(), *corpus.basics()) if split_of(one.id) != "train"]
    talks = [one for one in talks if [m.role for m in one.messages] == ["user", "assistant"]]
    talks.sort(key=lambda one: digest("before", one.id))
    return [
        tuple(m for one in talks[each * n : each * (n + 1)] for m in one.messages)
        for n in range(count)
    ]


def as_the_chat(drafts: int, temperature: float, seed: int = 0) -> Sampling:
    """How the chat speaks, in 120 tokens at most."""
    return Sampling(temperature=temperature, drafts=drafts, max_tokens=120, seed=seed)


def replies(
    name: str, prompts: list[str], before: list[tuple[Message, ...]], seed: int
) -> list[str]:
    """What CKPT:DRAFTS:TEMPERATURE says to each prompt, as the chat would."""
    checkpoint, drafts, temperature = [*name.split(":"), "8", "0.5"][:3]
    model, tokenizer, _ = load_model(find(checkpoint))
    sampling = as_the_chat(int(drafts), float(temperature), seed)
    asked = [(*chat, Message("user", one)) for chat, one in zip(before, prompts, strict=True)]
    return [answer.text for answer in answer_all(model, tokenizer, asked, sampling)]


def sheet(
    folder: Path, checkpoints: list[str], openers: int, behind: int, parts: int, seed: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    asked = prompts_to_read(openers)
    prompts = [prompt for _, prompt in asked]
    before = others(len(prompts), behind)
    said = {name: replies(name, prompts, before, seed) for name in checkpoints}
    dice = random.Random(seed)
    key: list[dict[str, Any]] = []
    pages: list[str] = []
    for number, (where, prompt) in enumerate(asked, 1):
        order = checkpoints[:]
        dice.shuffle(order)
        letters = {chr(ord("A") + place): name for place, name in enumerate(order)}
        shown = [
            f"{letter}: {' / '.join(said[name][number - 1].splitlines()) or '(nothing)'}"
            for letter, name in letters.items()
        ]
        chat = [f"({m.role}: {' / '.join(m.content.splitlines())})" for m in before[number - 1]]
        pages.append("\n".join([*chat, f"### {number}. {prompt}", *shown, ""]))
        texts = {name: said[name][number - 1] for name in checkpoints}
        key.append({"where": where, "prompt": prompt, "letters": letters, "replies": texts})
    (folder / "key.json").write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    size = math.ceil(len(pages) / parts)
    for part in range(parts):
        page = "\n".join(pages[part * size : (part + 1) * size])
        (folder / f"sheet-{part + 1}.md").write_text(page, encoding="utf-8")


def read_marks(text: str, key: list[dict[str, Any]]) -> dict[int, dict[str, int]]:
    """Number of the prompt -> checkpoint -> mark; SystemExit names what is missing."""
    found: dict[int, dict[str, int]] = {}
    for line in text.splitlines():
        if (head := re.match(r"\s*(\d+)[.:]?\s", line)) and int(head[1]) <= len(key):
            letters = key[int(head[1]) - 1]["letters"]
            marks = {a: int(b) for a, b in MARKS.findall(line[head.end() :])}
            if marks.keys() != letters.keys():
                raise SystemExit(f"{line!r} does not mark each of {', '.join(letters)} once.")
            found[int(head[1])] = {letters[letter]: mark for letter, mark in marks.items()}
    if missing := [n for n in range(1, len(key) + 1) if n not in found]:
        raise SystemExit(f"No marks for the prompts {missing}.")
    return found


def sign_test(wins: int, losses: int) -> float:
    """Two-sided: how likely so uneven a split of wins + losses fair coins is."""
    count, most = wins + losses, max(wins, losses)
    tail = sum(math.comb(count, n) for n in range(most, count + 1)) / 2**count
    return min(1.0, 2 * tail)


def table(marks: dict[int, dict[str, int]], key: list[dict[str, Any]]) -> str:
    """Mean, good (3, 4), nonsense (0) of each checkpoint, all and by list; better : worse."""
    names = list(key[0]["replies"])
    rows = []
    for where in ("all", *dict.fromkeys(one["where"] for one in key)):
        chosen = [n for n, one in enumerate(key, 1) if where in ("all", one["where"])]
        for name in names:
            own = [marks[n][name] for n in chosen]
            better = sum(marks[n][name] > marks[n][names[0]] for n in chosen)
            worse = sum(marks[n][name] < marks[n][names[0]] for n in chosen)
            rows.append(
                f"{where:10} {name:40} mean {sum(own) / len(own):.2f}  "
                f"good {sum(m >= GOOD for m in own) / len(own):4.0%}  "
                f"nonsense {sum(m == NONSENSE for m in own) / len(own):4.0%}"
                + (
                    f"  {better} : {worse} (p {sign_test(better, worse):.3f})"
                    if name != names[0]
                    else ""
                )
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("sheet")
    write.add_argument("folder", type=Path)
    write.add_argument("checkpoints", nargs="+")
    write.add_argument("--openers", type=int, default=182)
    write.add_argument("--behind", type=int, default=0)
    write.add_argument("--parts", type=int, default=4)
    write.add_argument("--seed", type=int, default=0)
    count = commands.add_parser("score")
    count.add_argument("folder", type=Path)
    count.add_argument("marks", nargs="+", type=Path)
    options = parser.parse_args()
    if options.command == "sheet":
        sheet(
            options.folder, options.checkpoints, options.openers, options.behind, options.parts,
            options.seed,
        )  # fmt: skip
        return
    key = json.loads((options.folder / "key.json").read_text(encoding="utf-8"))
    for path in options.marks:
        print(f"{path}\n{table(read_marks(path.read_text(encoding='utf-8'), key), key)}\n")


if __name__ == "__main__":
    main()
