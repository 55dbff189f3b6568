"""Prompts and texts that no stage of the training has read: what an evaluation may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from tinychat.data import corpus
from tinychat.data.jsonl import parse_dialogue, parse_lines, read_lines
from tinychat.data.preferences import (
    PUBLIC,
    by_part,
    corpus_graded,
    corpus_ranked,
    digest,
    prompt_key,
    read_ranked,
)
from tinychat.data.public import (
    BRACKETS,
    read_dialogues,
    read_documents,
    source_path,
    sources,
)
from tinychat.data.records import Dialogue, Document, Message
from tinychat.data.split import split_of
from tinychat.runtime.errors import ConfigError

Prompt = tuple[Message, ...]
PUBLIC_PROMPTS = "ppo_prompts"


def prompts_of(dialogue: Dialogue) -> Iterator[Prompt]:
    """Every user turn with what was said before it."""
    for number, message in enumerate(dialogue.messages):
        if message.role == "user":
            yield dialogue.messages[: number + 1]


def public_prompts(folder: Path) -> Iterator[Prompt]:
    """Every public prompt, to train on and to measure with; raises DataError."""
    for where, line in parse_lines(read_lines(source_path(PUBLIC_PROMPTS, folder)), PUBLIC_PROMPTS):
        record: dict[str, object] = {"messages": line.get("prompt")}
        yield parse_dialogue(record, where, PUBLIC_PROMPTS, "?").messages


def unseen_prompts(
    count: int,
    folder: Path | None = None,
    *,
    seed: int = 0,
    fits: Callable[[Prompt], bool] = lambda prompt: True,
) -> list[Prompt]:
    """Return `count` prompts that no stage has learned from, in an order that `seed` decides.

    From the validation and test parts of our corpus; with the public `folder`, half of them are
    public ones. A prompt that also stands in a training part, of fine-tuning, ranked replies or
    PPO, is left out, whatever its commas and capitals. Raises ConfigError where fewer are left.
    """
    if count < 1:
        raise ConfigError(f"{count} prompts tell nothing; ask for at least 1.")
    own: dict[str, Prompt] = {}
    seen: set[str] = set()
    for dialogue in corpus.dialogues():
        for prompt in prompts_of(dialogue):
            if split_of(dialogue.id) == "train":
                seen.add(prompt_key(prompt))
            else:
                own.setdefault(prompt_key(prompt), prompt)
    public = _left_out_by_ppo(folder) if folder else {}
    ranked = by_part([*corpus_ranked(), *corpus_graded()])["train"]
    seen |= {prompt_key(group.prompt) for group in ranked}
    seen |= _seen_elsewhere(folder, own.keys() | public.keys())
    ours, theirs = (
        sorted(
            (key for key in some if key not in seen),
            key=lambda key: digest(f"evaluation {seed}", key),
        )
        for some in (own, public)
    )
    mixed = [key for pair in zip_longest(ours, theirs) for key in pair if key is not None]
    either = public | own
    found = list(islice((either[key] for key in dict.fromkeys(mixed) if fits(either[key])), count))
    if len(found) < count:
        more = "" if folder else ", or add public ones with --data DIR"
        raise ConfigError(
            f"{count} prompts are wanted and only {len(found)} are unseen and short enough; "
            f"ask for fewer{more}."
        )
    return found


def _left_out_by_ppo(folder: Path) -> dict[str, Prompt]:
    """The public prompts that PPO leaves out."""
    found: dict[str, Prompt] = {}
    for prompt in public_prompts(folder):
        key = prompt_key(prompt)
        unfilled = any(BRACKETS.search(message.content) for message in prompt)
        if is_asked(prompt) and not unfilled and split_of(key) != "train":
            found.setdefault(key, prompt)
    return found


def is_asked(prompt: Sequence[Message]) -> bool:
    """True where the turns alternate and the last one is the user's."""
    turns = [message.role for message in prompt if message.role != "system"]
    return turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]


def _seen_elsewhere(folder: Path | None, asked: Iterable[str]) -> set[str]:
    """Which of these prompts stand in the basics or in the training parts of the public files."""
    asked = set(asked)
    # Most turns can be told apart by their last words, before a long conversation is put together.
    ends = {key.rpartition("\n")[2] for key in asked}
    seen: set[str] = set()

    def look(prompt: Prompt) -> None:
        if prompt_key(prompt[-1:]) in ends and (key := prompt_key(prompt)) in asked:
            seen.add(key)

    for dialogue in corpus.basics():  # whole: its parts ask the same in other words
        for prompt in prompts_of(dialogue):
            look(prompt)
    if not folder:
        return seen
    for entry in sources("sft"):
        if (folder / entry.file).is_file():
            for dialogue in read_dialogues(entry.name, folder):
                if split_of(dialogue.id) == "train":
                    for prompt in prompts_of(dialogue):
                        look(prompt)
    ranked = [*corpus_ranked(), *corpus_graded()]
    for entry in sources("preference"):  # whole: how much of each is learned from has changed
        if entry.name in PUBLIC and (folder / entry.file).is_file():
            ranked += read_ranked(folder / entry.file, entry.name)
    for group in by_part(ranked)["train"]:
        look(group.prompt)
    return seen


def unseen_texts(count: int, folder: Path | None = None) -> dict[str, list[Document | Dialogue]]:
    """Return up to `count` held-out texts of each source, under its name."""
    held: dict[str, Iterator[Document | Dialogue]] = {
        "dialogues": iter(corpus.dialogues()),
        "stories": iter(corpus.stories()),
        "explanations": iter(corpus.explanations()),
    }
    if folder:
        for entry in sources("pretrain"):
            if (folder / entry.file).is_file():
                held[entry.name] = read_documents(entry.name, folder)
    return {
        name: list(islice((one for one in records if split_of(one.id) != "train"), count))
        for name, records in held.items()
    }
