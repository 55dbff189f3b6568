"""What `tinychat train ppo` adds to the marks of the reward model: conditions and checked facts."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tinychat.data.facts import Facts
    from tinychat.data.records import Dialogue, Message
    from tinychat.gpt import GPT
    from tinychat.ppo import RewardFunction
    from tinychat.tokenizer import Tokenizer

RARE = 0.01  # the share of replies that may say a phrase without its being a stock phrase
PRIOR = 32  # prompts: a batch is small, so that many written ones are counted with it


def with_all(
    marks: RewardFunction,
    weights: Mapping[str, float],
    reference: GPT,
    pieces: Tokenizer,
    facts: Facts,
    checked: dict[tuple[int, ...], Dialogue],
    written: Sequence[str],
) -> RewardFunction:
    """The reward of `tinychat train ppo`: the marks and every condition that has a weight.

    A run that was begun before a condition existed has no weight for it. `checked` has the prompts
    whose answer `facts` can check, `written` the replies that stock phrases are compared with.
    """

    def weighted(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        return weights.get("marks", 1.0) * marks(prompts, replies).cpu()

    rewards: RewardFunction = weighted
    if weight := weights.get("sure"):
        rewards = with_sure(rewards, reference, pieces, weight)
    if weight := weights.get("fit"):
        rewards = with_fit(rewards, reference, pieces, weight)
    if weight := weights.get("rules"):
        rewards = with_rules(rewards, pieces, weight)
    if weight := weights.get("stock"):
        rewards = with_stock(rewards, pieces, written, weight)
    if weight := weights.get("facts"):
        rewards = with_facts(rewards, pieces, facts, checked, weight)
    return rewards


def with_fit(marks: RewardFunction, gpt: GPT, pieces: Tokenizer, weight: float) -> RewardFunction:
    """The marks, less `weight` for each deviation that a reply fits worse than written ones do.

    Never more for one that fits better: the best-fitting reply hands the question back.
    """
    from tinychat.data.records import Message
    from tinychat.dialogue import render_prompt
    from tinychat.reward_model import question_fit

    blank = render_prompt((Message("user", "..."),), pieces, context=gpt.config.context, reserve=8)
    prompts, replies = written_replies(pieces, min(256, gpt.config.context))
    known_N = question_fit(gpt, prompts, replies, blank, pieces.pad_id)
    mean, deviation = float(known_N.mean()), max(float(known_N.std()), 1e-6)

    def rewards(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        lack_N = (question_fit(gpt, prompts, replies, blank, pieces.pad_id) - mean) / deviation
        return marks(prompts, replies).cpu() + weight * lack_N.clamp(max=0)

    return rewards


def with_sure(marks: RewardFunction, gpt: GPT, pieces: Tokenizer, weight: float) -> RewardFunction:
    """The marks, and `weight` more for each nat a token that `gpt` holds the reply for likelier.

    Of all that chooses among a small chat model's own replies, its own log-probability is the best:
    where it knows a thing, it says it surely (Huang et al. 2024 call this sharpening).
    """
    from tinychat.reward_model import mean_logprobs

    def rewards(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        sure_N = mean_logprobs(gpt, prompts, replies, pieces.pad_id)
        return marks(prompts, replies).cpu() + weight * sure_N

    return rewards


def with_rules(marks: RewardFunction, pieces: Tokenizer, weight: float) -> RewardFunction:
    """The marks, less `weight` for a reply that breaks a rule of chapter 11, however many.

    A reward model of this size does not see that a word doesn't exist; a rule does. That a reply
    doesn't end is no matter of this: it has a price of its own in PPO.
    """
    import torch

    from tinychat.data.onpolicy import flaw_of

    def rewards(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        flawed = []
        for prompt, reply in zip(prompts, replies, strict=True):
            ended = reply[-1:] == [pieces.end_id]
            text = pieces.decode(reply[:-1] if ended else reply).strip()
            flawed.append(bool(flaw_of(asked(prompt, pieces), text, True)))
        return marks(prompts, replies).cpu() - weight * torch.tensor(flawed).float()

    return rewards


def with_stock(
    marks: RewardFunction, pieces: Tokenizer, written: Sequence[str], weight: float
) -> RewardFunction:
    """The marks, less `weight` for each nat by which a reply's phrases are worn out.

    A stock phrase fits everywhere, so a chat model holds it for likely, and a reward that begins
    with log-probabilities likes it. It shows in many replies at once: what more replies to *other*
    prompts begin a sentence with than `written` ones do costs the logarithm of that ratio. What one
    in a hundred says is never worn out.
    """
    import torch

    usual = Counter(phrase for text in written for phrase in beginnings(text))

    def share(phrase: str) -> float:
        return max(usual[phrase] / max(1, len(written)), RARE)

    def rewards(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        said = [beginnings(pieces.decode(reply)) for reply in replies]
        siblings = Counter(map(tuple, prompts))
        # Each prompt counts once, however many replies it has.
        by_prompt: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
        for prompt, phrases in zip(prompts, said, strict=True):
            for phrase in phrases:
                by_prompt[tuple(prompt)][phrase] += 1
        everywhere: dict[str, float] = defaultdict(float)
        for asked_for, counts in by_prompt.items():
            for phrase, count in counts.items():
                everywhere[phrase] += count / siblings[asked_for]

        def worn(prompt: tuple[int, ...], phrase: str) -> float:
            elsewhere = everywhere[phrase] - by_prompt[prompt][phrase] / siblings[prompt]
            expected = share(phrase)
            found = (elsewhere + PRIOR * expected) / (len(siblings) - 1 + PRIOR)
            return max(0.0, math.log(found / expected))

        lost = [
            sum(worn(tuple(prompt), phrase) for phrase in phrases)
            for prompt, phrases in zip(prompts, said, strict=True)
        ]
        return marks(prompts, replies).cpu() - weight * torch.tensor(lost)

    return rewards


def beginnings(text: str) -> set[str]:
    """The first two words of each sentence that has as many, small and without punctuation."""
    parts = re.split(r"(?<=[.!?])\s+", text.lower())
    return {" ".join(words[:2]) for part in parts if len(words := re.findall(r"[\w']+", part)) > 1}


def with_facts(
    marks: RewardFunction,
    pieces: Tokenizer,
    facts: Facts,
    checked: dict[tuple[int, ...], Dialogue],
    weight: float,
) -> RewardFunction:
    """The marks, and `weight` more for a right answer, or less for a wrong one.

    `checked` has the prompts whose answer a rule can check; behind all others the marks stay.
    """
    import torch

    def rewards(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        earned = [
            0 if (one := checked.get(tuple(prompt))) is None
            else 1 if facts.right(one, pieces.decode(reply)) else -1
            for prompt, reply in zip(prompts, replies, strict=True)
        ]  # fmt: skip
        return marks(prompts, replies).cpu() + weight * torch.tensor(earned).float()

    return rewards


def asked(prompt: list[int], pieces: Tokenizer) -> list[Message]:
    """What was said before the user's last turn, in one message, and that turn."""
    from tinychat.data.records import Message

    openings = [place for place, token in enumerate(prompt) if token == pieces.user_id]
    last = openings[-1] if openings else 0
    parts = (("system", prompt[:last]), ("user", prompt[last:]))
    return [
        Message(
            role,
            "\n".join(
                pieces.decode(list(turn))
                for control, turn in groupby(part, pieces.control_ids.__contains__)
                if not control
            ),
        )
        for role, part in parts
    ]


def written_replies(
    pieces: Tokenizer, longest: int, most: int = 300
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and written replies of the validation part, as tokens; no training has read them."""
    from tinychat.data import corpus
    from tinychat.data.split import by_split
    from tinychat.dialogue import render_prompt

    prompts: list[list[int]] = []
    replies: list[list[int]] = []
    for dialogue in by_split(corpus.dialogues())["validation"]:
        prompt = render_prompt(dialogue.messages[:-1], pieces)
        reply = [*pieces.encode(dialogue.messages[-1].content), pieces.end_id]
        if len(prompt) + len(reply) <= longest:
            prompts.append(prompt)
            replies.append(reply)
        if len(prompts) == most:
            break
    return prompts, replies
