"""Replies of our own model, ranked by rules that anybody can read and dispute."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tinychat.data.preferences import Ranked, Reply
from tinychat.data.records import Message

if TYPE_CHECKING:
    from tinychat.generation import Sampling
    from tinychat.gpt import GPT
    from tinychat.tokenizer import Tokenizer


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def is_empty(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """Not one letter or digit."""
    return not _words(text)


def is_broken(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """Pieces of the template, half characters, or a role played aloud ("User: ...")."""
    return bool(re.search(r"<\||\|>|\ufffd|(?:^|\n)\s*(?:user|assistant|system)\s*:", text, re.I))


def repeated_share(text: str, run: int = 3) -> float:
    """Which share of the runs of three words has been said before in the same text."""
    words = _words(text)
    runs = [tuple(words[start : start + run]) for start in range(len(words) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_repetitive(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """A fifth of it was said before, or one word four times in a row."""
    stuck = re.search(r"\b(\w+)(?:\W+\1\b){3}", text, re.I)
    return repeated_share(text) > 0.2 or stuck is not None


def is_unfinished(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """The model never said that it was done."""
    return not ended


def is_echo(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """Four words in five, in runs of three, are the user's own."""
    asked, said = _words(prompt[-1].content), _words(text)
    if len(said) < 3:
        return False
    known = {tuple(asked[start : start + 3]) for start in range(len(asked) - 2)}
    taken: set[int] = set()
    for start in range(len(said) - 2):
        if tuple(said[start : start + 3]) in known:
            taken |= {start, start + 1, start + 2}
    return len(taken) >= 0.8 * len(said)


# Worst first: the first rule that a reply breaks decides its rank.
RULES: dict[str, Callable[[Sequence[Message], str, bool], bool]] = {
    "empty": is_empty,
    "broken": is_broken,
    "repetition": is_repetitive,
    "unfinished": is_unfinished,
    "echo": is_echo,
}


def flaw_of(prompt: Sequence[Message], text: str, ended: bool = True) -> str:
    """Return the name of the worst rule that a reply breaks, or an empty string."""
    return next((name for name, broken in RULES.items() if broken(prompt, text, ended)), "")


def rank_samples(
    prompt: Sequence[Message], written: str, samples: Sequence[tuple[str, bool]], id: str
) -> Ranked:
    """Rank (text, ended) samples below the written reply: rule-abiding ones first, as equals."""
    order = ["", *reversed(RULES)]  # the mildest rule comes last in the table
    flaws = [flaw_of(prompt, text, ended) for text, ended in samples]
    present = sorted(set(flaws), key=order.index)
    replies = [Reply(written, 0)]
    replies += [
        Reply(text, 1 + present.index(flaw), flaw, ended)
        for (text, ended), flaw in zip(samples, flaws, strict=True)
        if text.strip() != written.strip()
    ]
    return Ranked(
        tuple(prompt), tuple(sorted(replies, key=lambda r: r.rank)), "on-policy", id, weight=0.5
    )


def sample_ranked(
    model: GPT,
    tokenizer: Tokenizer,
    groups: Sequence[Ranked],
    sampling: Sampling,
    *,
    count: int = 3,
    rows: int = 32,
) -> list[Ranked]:
    """Let the model answer each prompt `count` times, and rank that below the written reply.

    A prompt that leaves no room for a reply is left out. The new groups keep the id, so they stay
    in the same part of the split.
    """
    from tinychat.dialogue import render_prompt
    from tinychat.generation import generate_batch, stop_ids
    from tinychat.runtime.errors import ConfigError

    asked: list[tuple[Ranked, list[int]]] = []
    for group in groups:
        try:
            ids = render_prompt(
                group.prompt,
                tokenizer,
                context=model.config.context,
                reserve=sampling.max_tokens,
            )
        except ConfigError:
            continue
        asked.append((group, ids))
    stop = stop_ids(tokenizer)
    found = generate_batch(
        model,
        [ids for _, ids in asked for _ in range(count)],
        sampling,
        stop=stop,
        keep_stop=True,
        rows=rows,
        pad_id=tokenizer.pad_id,
    )
    ranked = []
    for number, (group, _) in enumerate(asked):
        samples = []
        for reply in found[number * count : (number + 1) * count]:
            ended = bool(reply) and reply[-1] == tokenizer.end_id
            body = reply[:-1] if reply and reply[-1] in stop else reply
            samples.append((tokenizer.decode(body).strip(), ended))
        fresh = rank_samples(group.prompt, group.replies[0].text, samples, group.id)
        if fresh.pairs:
            ranked.append(fresh)
    return ranked
