"""The cards of the shipped models: what each is and is for, made from the files' own metadata."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinychat.cli.card import licence, owner, readings_before, texts
from tinychat.cli.info import duration, machine, size
from tinychat.cli.lineage import descent
from tinychat.runtime.checkpoint import STAGES, CheckpointInfo, read_info
from tinychat.runtime.files import file_sha256


class Stage(NamedTuple):
    """What no metadata can tell of a stage."""

    is_a: str
    use: str
    limits: str
    chapter: str
    make: str


LIMITS = (
    "It is very small. It makes things up, loses the thread, reads no language but English, knows "
    "nothing of recent years and can't reckon. Take no facts, no advice and no decisions about "
    "people from it. What it says can be rude or biased, as some of its texts are."
)
WORDS = {
    "base": Stage(
        "The pretrained model: it goes on with a text, one likely token after the other.",
        "To see what pretraining alone gives, to fine-tune it, to compare later stages with it. It "
        "is no chatbot.",
        LIMITS,
        "07",
        "tinychat train base --preset mini --minutes 60",
    ),
    "sft": Stage(
        "The base model, fine-tuned on conversations: it answers in its turn and then stops.",
        "To chat with in a terminal, to learn how a chat model works, as the beginning of PPO.",
        LIMITS,
        "10",
        "tinychat train sft --from base",
    ),
    "reward": Stage(
        "The chat model with a number for an output: how much would people like this reply?",
        "To train a policy with PPO, to sort several replies of our own models. Not to judge what "
        "people write, and no filter for anything.",
        "It sees the tone of a reply, hardly its sense, and a policy that is trained against it "
        "finds its holes (see the lab notes). Marks of two reward models can't be compared.",
        "11",
        "tinychat train reward --from sft",
    ),
    "rlhf": Stage(
        "The chat model after PPO: its replies get higher marks from the reward model.",
        "To chat with in a terminal, to see what reinforcement learning changes.",
        LIMITS,
        "12",
        "tinychat train ppo --from sft --reward reward",
    ),
}
UNITS = ("tokens", "conversations", "prompts")


def shipped(folder: Path) -> dict[str, CheckpointInfo]:
    """Return the checkpoints of a folder by their stage, in the order of the stages."""
    paths = [(stage, folder / f"{stage}.safetensors") for stage in STAGES]
    return {stage: read_info(path) for stage, path in paths if path.exists()}


def model_cards(folder: Path) -> str:
    """Return the page of the model cards, a section a stage, also for those that aren't there."""
    found = shipped(folder)
    digests = {file_sha256(info.path): stage for stage, info in found.items()}
    parts = [
        "# Model cards",
        "What each of the four models is, what it was made from, and what it is not good for. Made "
        "from the files' own metadata each time this site is built.\n{ .summary }",
    ]
    for stage in STAGES:
        words, info = WORDS[stage], found.get(stage)
        parts.append(f"## {stage}")
        if info is None:
            parts.append(
                f'!!! note "Not shipped yet"\n\n    {words.is_a} There is no `{stage}.safetensors` '
                f"in `checkpoints/` so far. Chapter {words.chapter} builds it, and "
                f"`{words.make}` makes one of your own."
            )
            continue
        parts += [
            f"{words.is_a} Chapter {words.chapter} builds it.",
            table(["file", f"`{info.path.name}`, {size(info.bytes)}"], facts(info, digests)),
            f"**Meant for.** {words.use}\n\n**Limits.** {words.limits}",
            f"### What {stage} read",
            *data(info),
        ]
    parts.append(
        "The texts are not in this repository. Weights learned from them are published with these "
        "attributions; the share-alike licences among them are named so that you can judge for "
        "yourself. `tinychat info NAME` shows all that a file says of itself."
    )
    return "\n\n".join(parts) + "\n"


def facts(info: CheckpointInfo, digests: Mapping[str, str]) -> list[list[str]]:
    """Return rows of (what, value); `digests` tells which shipped file has which sha256."""
    lineage, config = info.lineage, info.config
    settings = lineage.get("settings", {})
    shape = f"{config['layers']} layers, width {config['width']}, {config['heads']} heads"
    reads = f"{config['vocab_size']:,} pieces, {config['context']:,} tokens at once"
    rows = [
        ["sha256", f"`{file_sha256(info.path)}`"],
        ["parameters", f"{info.parameters:,}, stored as {info.dtype}"],
        [
            "shape",
            f"{shape}, {reads}",
        ],
        ["trained for", _training(lineage)],
        ["on", _hardware(lineage)],
        ["seed", str(settings.get("seed", "not recorded"))],
        ["version", f"tinychat {lineage.get('tinychat', 'not recorded')}"],
    ]
    if parents := _parents(lineage, digests):
        named = ", and that with ".join(_named(digest, digests) for digest in parents)
        rows.append(["began with", named])
    if digest := lineage.get("reward_sha256"):
        rows.append(["marked by", _named(digest, digests)])
    cost = info.metrics.get("storage_cost_percent")
    if cost is not None:
        rows.append(
            [
                "storing it",
                f"as {info.dtype} costs {cost:+.2f} % in bits per byte".replace("-", "−"),
            ]
        )
    used = {key: value for key, value in settings.items() if not isinstance(value, dict | list)}
    rows.append(["settings", "`" + json.dumps(used)[1:-1].replace('"', "") + "`"])
    return rows


def data(info: CheckpointInfo) -> list[str]:
    """Return the table of what a model read, with licences; texts that it never saw left out."""
    rows = []
    for name, entry in texts(info.lineage).items():
        amount = next((f"{entry[unit]:,} {unit}" for unit in UNITS if unit in entry), "")
        passes = f", read {entry['passes']:.2f} times" if "passes" in entry else ""
        rows.append([name, amount + passes, licence(entry), owner(entry)])
    if not rows:
        return ["Nothing is recorded."]
    parts = [table(["text", "how much", "licence", "from"], rows)]
    if older := readings_before(info.lineage):
        parts.append(f"And all that the models before it read: {'; '.join(older)}.")
    return parts


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the cells hold Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _named(digest: str, digests: Mapping[str, str]) -> str:
    place = f"[{digests[digest]}](#{digests[digest]})" if digest in digests else "a file"
    return f"{place} with sha256 `{digest[:16]}…`"


def _parents(lineage: Mapping[str, Any], digests: Mapping[str, str]) -> list[str]:
    """What it began with, and what that began with, up to a shipped file."""
    found: list[str] = []
    for one in descent(lineage):
        if "parent_sha256" not in one:
            break
        found.append(one["parent_sha256"])
        if found[-1] in digests:
            break
    return found


def _training(lineage: Mapping[str, Any]) -> str:
    parts = [f"{lineage[key]:,} {key}" for key in ("tokens", "steps") if key in lineage]
    if "minutes" in lineage:
        parts.append(duration(60 * lineage["minutes"]))
    return ", ".join(parts) or "not recorded"


def _hardware(lineage: Mapping[str, Any]) -> str:
    found = lineage.get("hardware")
    if not found:
        return "not recorded"
    return f"{machine(found)}, {found['memory_gb']:.0f} GB; torch {found['torch']}"
