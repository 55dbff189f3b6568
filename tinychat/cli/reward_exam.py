"""Two exams for a reward model: among a chat model's own replies, does it find the better one?

Held-out pairs that people wrote say little of it: all of our reward models were good at those,
chose worse than chance here, and PPO with them lost facts (chapters/lab_notes.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tinychat.data.facts import Facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from tinychat.data.groups import Group
    from tinychat.data.records import Dialogue
    from tinychat.gpt import GPT
    from tinychat.reward_model import RewardModel
    from tinychat.tokenizer import Tokenizer

QUESTIONS = 200
DRAWS = 8  # answers to each question
TEMPERATURE = 0.7
ANSWER = 48  # tokens


class Answers(NamedTuple):
    """The chat model's answers to a few questions, `DRAWS` to each, one after the other."""

    texts: list[list[int]]
    "question and answer as tokens"
    sure: list[float]
    "the chat model's own log-probability a token"
    right: list[bool]


def answers(chat: GPT, pieces: Tokenizer, facts: Facts, seed: int = 0) -> Iterator[Answers]:
    """Let `chat` answer the first `QUESTIONS` of `facts` that leave room for an answer."""
    from tinychat.generation import make_generator, stop_ids
    from tinychat.ppo import PPOConfig, sample_replies

    asked = questions(facts.asked[:QUESTIONS], pieces, chat.config.context - ANSWER)
    config = PPOConfig(max_tokens=ANSWER, temperature=TEMPERATURE)
    dice = make_generator(seed, chat.device)
    for start in range(0, len(asked), 16):
        part = [one for one in asked[start : start + 16] for _ in range(DRAWS)]
        replies, logprobs = sample_replies(
            chat,
            [ids for _, ids in part],
            config,
            stop=stop_ids(pieces),
            pad=pieces.pad_id,
            generator=dice,
        )
        yield Answers(
            [ids + reply for (_, ids), reply in zip(part, replies, strict=True)],
            [sum(some) / max(1, len(some)) for some in logprobs],
            [
                facts.right(one, pieces.decode(reply))
                for (one, _), reply in zip(part, replies, strict=True)
            ],
        )


def questions(
    asked: Iterable[Dialogue], pieces: Tokenizer, room: int
) -> list[tuple[Dialogue, list[int]]]:
    """The conversations whose first question is at most `room` tokens long, and the question."""
    from tinychat.dialogue import render_prompt

    found = ((one, render_prompt(one.messages[:1], pieces)) for one in asked)
    return [(one, ids) for one, ids in found if len(ids) <= room]


def right_share(chat: GPT, pieces: Tokenizer, facts: Facts, seed: int = 0) -> float:
    """Which share of its answers is right."""
    right = [one for some in answers(chat, pieces, facts, seed) for one in some.right]
    return sum(right) / max(1, len(right))


def sit_exam(
    model: RewardModel, chat: GPT, pieces: Tokenizer, basics: Iterable[Dialogue], seed: int = 0
) -> dict[str, Any] | None:
    """Let `chat` answer each question a few times, and `model` choose; None if it tells nothing.

    `chance`, `best` and `best_by_logprob` are shares of right answers: of all, of those with the
    highest mark, of those with the chat model's own highest log-probability a token.
    `right_above_wrong` is the mean over questions with both of the pairs in the right order.
    """
    import torch

    from tinychat.reward_model import score

    right, marks, sure = [], [], []
    for some in answers(chat, pieces, Facts(basics), seed):
        marks.append(score(model, some.texts, pieces.pad_id).float().cpu())
        sure += some.sure
        right += some.right
    if not right:
        return None
    right_QN = torch.tensor(right).view(-1, DRAWS)
    mark_QN = torch.cat(marks).view(-1, DRAWS)
    sure_QN = torch.tensor(sure).view(-1, DRAWS)
    both_Q = right_QN.any(1) & ~right_QN.all(1)
    if not both_Q.any():
        return None
    return {
        "questions": len(right_QN),
        "draws": DRAWS,
        "chance": round(float(right_QN.float().mean()), 4),
        "best": _of_the_best(right_QN, mark_QN),
        "best_by_logprob": _of_the_best(right_QN, sure_QN),
        "with_both": int(both_Q.sum()),
        "right_above_wrong": in_order(right_QN[both_Q], mark_QN[both_Q]),
        "by_logprob": in_order(right_QN[both_Q], sure_QN[both_Q]),
    }


def _of_the_best(right_QN: Tensor, mark_QN: Tensor) -> float:
    chosen_Q1 = mark_QN.argmax(1, keepdim=True)
    return round(float(right_QN.float().gather(1, chosen_Q1).mean()), 4)


def in_order(right_QN: Tensor, mark_QN: Tensor) -> float:
    """Mean over the questions of P(a right answer's mark is above a wrong one's); a tie is half."""
    shares = []
    for right_N, mark_N in zip(right_QN, mark_QN, strict=True):
        gap_RW = mark_N[right_N][:, None] - mark_N[~right_N][None, :]
        shares.append(float((gap_RW > 0).float().mean() + 0.5 * (gap_RW == 0).float().mean()))
    return round(sum(shares) / len(shares), 4)


def readers_order(
    model: RewardModel, chat: GPT, pieces: Tokenizer, held_out: Iterable[Group]
) -> dict[str, Any] | None:
    """Which share of the pairs that readers marked is in their order; None without any.

    `by_mark` is the reward model's share, and `by_logprob` that of `chat`'s mean log-probability
    a token.
    """
    from tinychat.reward_model import accuracy, group_logprobs, judge, score_groups

    graded = [group for group in held_out if group.ranked.source == "graded"]
    if not graded:
        return None
    sure = group_logprobs(chat, graded, pieces.pad_id)
    judged = judge(graded, score_groups(model, graded, pieces.pad_id))
    return {
        "pairs": len(judged),
        "by_mark": round(accuracy(judged), 4),
        "by_logprob": round(accuracy(judge(graded, sure)), 4),
    }


def print_readers(found: dict[str, Any] | None) -> None:
    """What `readers_order` found, in one sentence."""
    if found:
        print(
            f"Of {found['pairs']} held-out pairs that readers marked, {found['by_mark']:.1%} are "
            f"in their order (by the chat model's log-probability {found['by_logprob']:.1%})."
        )


def print_exam(exam: dict[str, Any] | None) -> None:
    """What the exam found, in two sentences."""
    if not exam:
        return
    print(
        f"Of the chat model's own answers to {exam['questions']} unseen questions, "
        f"{exam['chance']:.1%} are right; of the best of {exam['draws']} by mark, "
        f"{exam['best']:.1%} (by its own log-probability {exam['best_by_logprob']:.1%})."
    )
    worse = exam["right_above_wrong"] < exam["by_logprob"]
    print(
        f"Right above wrong in {exam['right_above_wrong']:.1%} of pairs "
        f"(by log-probability {exam['by_logprob']:.1%})."
        + (" It knows better than this reward: PPO may lose facts." if worse else "")
    )
