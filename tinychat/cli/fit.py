"""The condition in the rewards of `tinychat train ppo`: a reply must fit its question."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tinychat.gpt import GPT
    from tinychat.ppo import RewardFunction
    from tinychat.tokenizer import Tokenizer


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
        prompt = render_prompt(dialogue.messages[:-1], pieces, context=10**6, reserve=0)
        reply = [*pieces.encode(dialogue.messages[-1].content), pieces.end_id]
        if len(prompt) + len(reply) <= longest:
            prompts.append(prompt)
            replies.append(reply)
        if len(prompts) == most:
            break
    return prompts, replies
