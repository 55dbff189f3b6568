"""`tinychat eval --best-of N`: what choosing among replies is worth, to chooser and to judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.cli.contestants import Contestant
    from tinychat.data.unseen import Prompt
    from tinychat.reward_model import RewardModel
    from tinychat.tokenizer import Tokenizer


def best_of_curve(
    one: Contestant,
    asked: Sequence[Prompt],
    teacher: tuple[RewardModel, Tokenizer],
    judge: tuple[RewardModel, Tokenizer] | None,
    most: int,
    max_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A row for n = 1, 2, 4, ... up to `most`: bound of the KL, both mean marks, length in tokens.

    The replies are drawn at temperature 1 from the whole distribution: the KL is counted from that.
    """
    import torch

    from tinychat.dialogue import render_prompt
    from tinychat.evaluation import best_of, bootstrap, draw_replies
    from tinychat.reward_model import score

    pieces = one.tokenizer
    for _, its_pieces in (teacher, *([judge] if judge else [])):
        if its_pieces.sha256 != pieces.sha256:
            raise ConfigError(
                f"{one.info.path} has another tokenizer than who marks its replies; "
                "train the reward model and the judge from this chat model."
            )
    context = one.model.config.context
    prompts = [render_prompt(p, pieces, context=context, reserve=max_tokens) for p in asked]
    wanted = prompts * most
    replies = draw_replies(one.model, pieces, wanted, max_tokens=max_tokens, seed=seed)
    texts = [prompt + reply for prompt, reply in zip(wanted, replies, strict=True)]

    def table(values: torch.Tensor) -> torch.Tensor:
        return values.view(most, len(prompts)).T  # [P, N]

    of_teacher_PN = table(score(teacher[0], texts, pieces.pad_id))
    of_judge_PN = table(score(judge[0], texts, pieces.pad_id)) if judge else None
    lengths_PN = table(torch.tensor([float(len(reply)) for reply in replies]))
    rows = []
    for n in sorted({2**power for power in range(most.bit_length())} | {most}):
        lengths = best_of(n, of_teacher_PN, lengths_PN)
        rows.append(
            {
                "n": n,
                "kl": math.log(n) - (n - 1) / n,
                "reward": bootstrap(best_of(n, of_teacher_PN, of_teacher_PN)),
                "judge": None
                if of_judge_PN is None
                else bootstrap(best_of(n, of_teacher_PN, of_judge_PN)),
                "length": sum(lengths) / len(lengths),
            }
        )
    return rows
