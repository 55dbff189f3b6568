"""Replies of our own model, ranked by rules that anybody can read and dispute.

Three orders, none of which needs a person: the written reply is better than a sample, a sample that
breaks no rule is better than one that does, and a calm sample is better than one drawn at a higher
temperature (the words that a model holds for unlikely are, as a rule, where it falls apart).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from tinychat.data import corpus
from tinychat.data.preferences import Ranked, Reply
from tinychat.data.records import Message
from tinychat.data.words import words

if TYPE_CHECKING:
    from tinychat.generation import Sampling
    from tinychat.gpt import GPT
    from tinychat.tokenizer import Tokenizer


def is_empty(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """Not one letter or digit."""
    return not words(text)


def is_broken(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """Pieces of the template, half characters, or a role played aloud ("User: ...")."""
    return bool(re.search(r"<\||\|>|\ufffd|(?:^|\n)\s*(?:user|assistant|system)\s*:", text, re.I))


def repeated_share(text: str, run: int = 3) -> float:
    """Which share of the runs of three words has been said before in the same text."""
    said = words(text)
    runs = [tuple(said[start : start + run]) for start in range(len(said) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_repetitive(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """A fifth of it was said before, or one word four times in a row."""
    stuck = re.search(r"\b(\w+)(?:\W+\1\b){3}", text, re.I)
    return repeated_share(text) > 0.2 or stuck is not None


def is_unfinished(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """The model never said that it was done."""
    return not ended


@cache
def known_words() -> frozenset[str]:
    """Every word of the embedded corpus, in small letters."""
    conversations = [*corpus.dialogues(), *corpus.basics()]
    texts = [message.content for one in conversations for message in one.messages]
    texts += [one.text for one in (*corpus.stories(), *corpus.explanations())]
    return frozenset(word for text in texts for word in _letters(text))


def _letters(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


def is_made_up(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """A word that stands neither in our corpus nor in the conversation: "the stickericky one".

    True of most replies in other languages than the corpus's, and of a rare name.
    """
    asked = {word for message in prompt for word in _letters(message.content)}
    return bool(set(_letters(text)) - known_words() - asked)


def is_echo(prompt: Sequence[Message], text: str, ended: bool) -> bool:
    """Four words in five, in runs of three, are the user's own."""
    asked, said = words(prompt[-1].content), words(text)
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
    "made-up word": is_made_up,
    "echo": is_echo,
}


def flaw_of(prompt: Sequence[Message], text: str, ended: bool = True) -> str:
    """Return the name of the worst rule that a reply breaks, or an empty string."""
    return next((name for name, broken in RULES.items() if broken(prompt, text, ended)), "")


def rank_samples(
    prompt: Sequence[Message],
    written: str | None,
    samples: Sequence[Sequence[tuple[str, bool]]],
    id: str,
) -> Ranked:
    """Rank (text, ended) samples below the written reply, if there is one; the source is on-policy.

    `samples` holds a list for each temperature, the calmest first. First come those that break no
    rule, the calmer ones before the others, then the flawed ones, the mildest flaw first. Of a text
    that was drawn twice, the better rank counts.
    """
    order = ["", *reversed(RULES)]  # the mildest rule comes last in the table
    places: dict[str, tuple[int, int, bool]] = {}
    for heat, drawn in enumerate(samples):
        for text, ended in drawn:
            place = order.index(flaw_of(prompt, text, ended)), heat, ended
            places[text] = min(places.get(text, place), place)
    places.pop((written or "").strip(), None)
    steps = sorted({place[:2] for place in places.values()})
    replies = [] if written is None else [Reply(written, 0)]
    first = len(replies)
    replies += [
        Reply(text, first + steps.index((flaw, heat)), order[flaw], ended)
        for text, (flaw, heat, ended) in sorted(places.items(), key=lambda item: item[1])
    ]
    return Ranked(tuple(prompt), tuple(replies), "on-policy", id, weight=0.5)


def sample_ranked(
    model: GPT,
    tokenizer: Tokenizer,
    groups: Sequence[Ranked],
    samplings: Sequence[Sampling],
    *,
    count: int = 1,
    rows: int = 32,
) -> list[Ranked]:
    """Let the model answer each prompt `count` times in each way of `samplings`, and rank that.

    The calmest way comes first. The best reply of a group stands above all; a group may have none.
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
                reserve=max(sampling.max_tokens for sampling in samplings),
            )
        except ConfigError:
            continue
        asked.append((group, ids))
    stop = stop_ids(tokenizer)
    prompts = [ids for _, ids in asked for _ in range(count)]
    found = [
        generate_batch(
            model,
            prompts,
            sampling,
            stop=stop,
            keep_stop=True,
            rows=rows,
            pad_id=tokenizer.pad_id,
        )
        for sampling in samplings
    ]

    def said(reply: Sequence[int]) -> tuple[str, bool]:
        ended = bool(reply) and reply[-1] == tokenizer.end_id
        body = reply[:-1] if reply and reply[-1] in stop else reply
        return tokenizer.decode(list(body)).strip(), ended

    ranked = []
    for number, (group, _) in enumerate(asked):
        here = slice(number * count, (number + 1) * count)
        samples = [[said(reply) for reply in replies[here]] for replies in found]
        written = group.replies[0].text if group.replies else None
        fresh = rank_samples(group.prompt, written, samples, group.id)
        if fresh.pairs:
            ranked.append(fresh)
    return ranked
