"""PPO: every detail by its number, the toy that it must solve, stopping and resuming."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import PERU, TORCHRUN, talk
from torch import Tensor
from typer.testing import CliRunner

from tinychat import ppo
from tinychat.cli.app import app
from tinychat.cli.conditions import (
    asked,
    beginnings,
    with_all,
    with_facts,
    with_fit,
    with_rules,
    with_stock,
    with_sure,
    written_replies,
)
from tinychat.cli.ppo_prompts import checked_prompts, find_prompts, in_chats
from tinychat.cli.train_ppo import RECIPE
from tinychat.data import corpus, tokenizer_model
from tinychat.data.batch import Batch
from tinychat.data.facts import Facts
from tinychat.data.records import Message
from tinychat.data.split import by_split
from tinychat.data.unseen import prompts_of
from tinychat.dialogue import render_prompt
from tinychat.gpt import GPT, GPTConfig, load_model, save_model
from tinychat.ppo import (
    ActorCritic,
    KLController,
    PPOConfig,
    PPOProgress,
    Rollout,
    TokenLogprobs,
    collect,
    distinct,
    draw,
    gae,
    kl_terms,
    lay_out,
    minus_siblings,
    place_rewards,
    policy_loss,
    prompts_of_step,
    repetition,
    reply_logprobs,
    sample_replies,
    summary,
    train_ppo,
    update,
    value_loss,
    whiten,
)
from tinychat.pretraining import LossFunction
from tinychat.reward_model import RewardModel, mean_logprobs, question_fit, save_reward
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.runtime.errors import ConfigError, DataError, TinychatError
from tinychat.runtime.metrics import read_metrics
from tinychat.runtime.state import load_state
from tinychat.tokenizer import Tokenizer

PAD, END, WANTED, V, LENGTH, ENOUGH = 0, 1, 5, 32, 12, 8
TOKENS = {"stop": {PAD, END}, "end": END, "pad": PAD}
CPU = torch.device("cpu")
PROMPTS = [[2 + n % 30, 2 + 7 * n % 30, 3][: 1 + n % 3] for n in range(64)]
SMALL = PPOConfig(steps=1, episodes=12, minibatch=4, epochs=2, max_tokens=8, lr=1e-2, warmup=0)


def tiny(seed: int = 0, layers: int = 1) -> GPT:
    torch.manual_seed(seed)
    shape = GPTConfig(
        width=32, layers=layers, heads=2, kv_heads=1, head_width=16, hidden=64, vocab_size=V,
        context=32,
    )  # fmt: skip
    return GPT(shape)


def stirred(seed: int = 0) -> GPT:
    """A model whose blocks do something and whose guesses are far from even."""
    model = tiny(seed, layers=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.25)
    return model


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wanted(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
    return torch.tensor([min(reply.count(WANTED), ENOUGH) / ENOUGH for reply in replies])


def collected(
    config: PPOConfig = SMALL, reference: GPT | None = None, seed: int = 0, beta: float = 0.1
) -> tuple[ActorCritic, Rollout]:
    policy = ActorCritic(stirred())
    rollout = collect(
        policy, reference or stirred(7), PROMPTS[:12], wanted, config, beta=beta, **TOKENS,
        generator=dice(seed),
    )  # fmt: skip
    return policy, rollout


# Rollouts


def test_draws_follow_the_softmax_and_know_their_log_probs():
    logits_V = torch.tensor([1.0, -math.inf, 0.0, 2.0, -1.0])
    tokens_N, logprobs_N = draw(logits_V.expand(20_000, 5), dice())
    p_V = logits_V.softmax(-1)
    shares_V = tokens_N.bincount(minlength=5) / 20_000
    assert shares_V[1] == 0, "what is impossible never comes"
    assert (shares_V - p_V).abs().max() < 0.015
    torch.testing.assert_close(logprobs_N, p_V.log()[tokens_N])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_the_rollout_are_those_of_a_full_forward(temperature):
    config = replace(SMALL, temperature=temperature)
    model = stirred()
    replies, logprobs = sample_replies(
        model, PROMPTS, config, stop={PAD, END}, pad=PAD, generator=dice()
    )
    lengths = {len(reply) for reply in replies}
    assert len(lengths) > 3, "rows must have left the batch at different times"
    for prompt, reply, found in zip(PROMPTS, replies, logprobs, strict=True):
        alone_TV = (model(torch.tensor([prompt + reply]))[0] / temperature).log_softmax(-1)
        expected = [alone_TV[len(prompt) - 1 + n, token] for n, token in enumerate(reply)]
        torch.testing.assert_close(
            torch.tensor(found), torch.stack(expected).detach(), atol=1e-5, rtol=0
        )


def test_a_reply_stops_at_its_first_stop_token():
    replies, _ = sample_replies(
        stirred(), PROMPTS, SMALL, stop={PAD, END}, pad=PAD, generator=dice()
    )
    for reply in replies:
        assert 1 <= len(reply) <= SMALL.max_tokens
        assert not {PAD, END} & set(reply[:-1])
        assert reply[-1] in (PAD, END) or len(reply) == SMALL.max_tokens


def test_same_dice_same_replies():
    def replies(seed: int) -> list[list[int]]:
        found, _ = sample_replies(
            stirred(), PROMPTS, SMALL, stop={END}, pad=PAD, generator=dice(seed)
        )
        return found

    assert replies(1) == replies(1) != replies(2)


def test_no_room_for_a_reply():
    with pytest.raises(ConfigError, match="prompt of 30 tokens and a reply of 8 don't fit"):
        sample_replies(
            tiny(), [[2] * 30], SMALL, stop={END}, pad=PAD, generator=dice()
        )  # fmt: skip


# Log-probs


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradients_by_hand_are_those_of_autograd(chunk):
    generator = dice()
    h_ND = torch.randn(10, 6, generator=generator, requires_grad=True)
    weight_VD = torch.randn(9, 6, generator=generator, requires_grad=True)
    ids_N = torch.randint(9, (10,), generator=generator)
    slope_N = torch.randn(10, generator=generator)
    plain_N = (h_ND @ weight_VD.T / 0.7).log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    ours_N = TokenLogprobs.apply(h_ND, weight_VD, ids_N, 0.7, torch.float32, chunk)
    torch.testing.assert_close(ours_N, plain_N)
    expected = torch.autograd.grad(plain_N, (h_ND, weight_VD), slope_N)
    found = torch.autograd.grad(ours_N, (h_ND, weight_VD), slope_N)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_ratio_is_one_and_the_same_policy_has_no_kl():
    policy, rollout = collected(reference=stirred())
    assert torch.equal(rollout.logprobs_BT, rollout.ref_logprobs_BT)
    report = summary(rollout)
    assert report["kl"] == report["kl_k3"] == 0
    assert report["mismatch"] < 1e-5
    rows = torch.arange(SMALL.minibatch)
    mask_bT = rollout.mask_BT[rows]
    with torch.enable_grad():
        logprobs_N, values_N = policy(
            rollout.tokens_BT[rows], rollout.segments_BT[rows], mask_bT, SMALL
        )
    assert torch.equal(logprobs_N.detach(), rollout.logprobs_BT[rows][mask_bT]), "to the last bit"
    assert torch.equal(values_N.detach(), rollout.values_BT[rows][mask_bT])
    optimizer = ppo.make_optimizer(policy, SMALL)
    learned = update(policy, optimizer, rollout, SMALL, dice())
    assert learned["ratio_first"] == pytest.approx(1, abs=1e-6)
    assert learned["ratio_max"] > 1.01, "and afterwards it isn't"


def test_temperature_mismatch_shows_in_the_first_ratio():
    policy, rollout = collected()
    other = replace(SMALL, temperature=1.5)
    learned = update(policy, ppo.make_optimizer(policy, other), rollout, other, dice())
    assert learned["ratio_first"] > 1.1


def test_padding_and_order_of_the_batch_change_nothing():
    _, rollout = collected()
    model = stirred()
    prompts, replies = PROMPTS[:12], rollout.replies
    wide = lay_out([*prompts, [3] * 20], [*replies, [4] * 12], PAD, CPU)
    together_N, _ = reply_logprobs(model, *wide, SMALL)
    together = together_N.detach().split([*map(len, replies), 12])
    for n in (5, 0, 11):
        alone_N, _ = reply_logprobs(model, *lay_out([prompts[n]], [replies[n]], PAD, CPU), SMALL)
        torch.testing.assert_close(alone_N.detach(), together[n], atol=2e-6, rtol=0)


def test_what_is_only_filled_up_is_not_read(monkeypatch):
    model, widths = stirred(), []
    whole = model.hidden
    monkeypatch.setattr(
        model,
        "hidden",
        lambda tokens_BT, **rest: widths.append(tokens_BT.shape[1]) or whole(tokens_BT, **rest),
    )
    prompts, replies = [[3, 4], [5, 6, 7], [3] * 20], [[8, 9, 1], [9, 1], [4] * 12]
    tensors = lay_out(prompts, replies, PAD, CPU)
    assert tensors[0].shape == (3, 32)
    some_N, _ = reply_logprobs(model, *(part_BT[:2] for part_BT in tensors), SMALL)
    all_N, _ = reply_logprobs(model, *tensors, SMALL)
    assert widths == [3 + 3 - 1, 32 - 1], "the last token is only predicted"
    torch.testing.assert_close(some_N, all_N[:5], atol=2e-6, rtol=0)


def test_an_update_does_not_see_the_order_of_the_batch():
    config = replace(SMALL, minibatch=12, epochs=1)
    order_B = torch.randperm(12, generator=dice(4))
    ends = []
    for order in (torch.arange(12), order_B):
        policy, rollout = collected(config)
        mixed = Rollout(
            **{
                name: [value[n] for n in order] if isinstance(value, list) else value[order]
                for name, value in vars(rollout).items()
            }
        )
        update(policy, ppo.make_optimizer(policy, config), mixed, config, dice())
        ends.append([w.detach().clone() for w in policy.parameters()])
    before = list(ActorCritic(stirred()).parameters())
    assert any((one - old).abs().max() > 1e-4 for one, old in zip(ends[0], before, strict=True))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# Rewards, advantages


def test_the_score_lands_on_the_last_token_and_nowhere_else():
    _, rollout = collected()
    assert 0 < rollout.ended_B.sum() < 12, "some end by themselves, some don't"
    for row, reply in enumerate(rollout.replies):
        places = rollout.mask_BT[row].nonzero()[:, 0].tolist()
        assert rollout.tokens_BT[row, places].tolist() == reply
        last = places[-1]
        assert bool(rollout.ended_B[row]) == (rollout.tokens_BT[row, last] == END)
        kl_T = 0.1 * (rollout.logprobs_BT[row] - rollout.ref_logprobs_BT[row])
        paid_T = rollout.rewards_BT[row] + kl_T
        expected = torch.zeros_like(paid_T)
        penalty = 0.0 if rollout.ended_B[row] else SMALL.end_penalty
        expected[last] = rollout.scores_B[row] - penalty
        torch.testing.assert_close(paid_T, expected)
        assert not rollout.rewards_BT[row][~rollout.mask_BT[row]].any()


def test_a_score_counts_by_what_it_is_above_its_siblings():
    scores_B = torch.tensor([1.0, 0.0, 0.0, 4.0, 4.0, 7.0])
    by_hand = [1.0, -0.5, -0.5, -1.5, -1.5, 3.0]
    torch.testing.assert_close(minus_siblings(scores_B, 3), torch.tensor(by_hand))
    assert minus_siblings(scores_B, 1) is scores_B
    with pytest.raises(ConfigError, match="a multiple of samples"):
        replace(SMALL, samples=5)


def test_siblings_answer_one_prompt_side_by_side(tmp_path):
    seen = []

    def marks(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        seen.append(prompts)
        return wanted(prompts, replies) + 100 * torch.tensor([len(prompt) for prompt in prompts])

    policy, heads = ActorCritic(stirred()), []
    expect = policy.expect
    policy.expect = lambda score: (heads.append(score), expect(score))
    config = replace(RUN, steps=2, episodes=12, samples=4)
    train_ppo(policy, stirred(), PROMPTS[:9], marks, config, tmp_path, **TOKENS)
    for prompts in seen:
        groups = [prompts[start : start + 4] for start in (0, 4, 8)]
        assert all(group == [group[0]] * 4 for group in groups)
        assert len({tuple(group[0]) for group in groups}) == 3, "three prompts a step"
        assert [len(group[0]) for group in groups] == sorted(len(group[0]) for group in groups)
    assert abs(heads[0]) < 1e-3, "the hundreds are gone: all siblings have them"


def test_gae_by_hand():
    # Values 1, 2, 3; rewards 0, 1, 4; gamma 1/2, lambda 1/2; then padding, which must stay out.
    rewards_BT = torch.tensor([[0.0, 0.0, 1.0, 4.0, 0.0]])
    values_BT = torch.tensor([[9.0, 1.0, 2.0, 3.0, 9.0]])
    mask_BT = torch.tensor([[False, True, True, True, False]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, 0.5, 0.5)
    # 4 - 3 = 1; (1 + 3/2 - 2) + 1/4 = 0.75; (0 + 2/2 - 1) + 0.75/4 = 0.1875
    assert advantages_BT.tolist() == [[0.0, 0.1875, 0.75, 1.0, 0.0]]
    assert returns_BT.tolist() == [[0.0, 1.1875, 2.75, 4.0, 0.0]]


def test_gae_is_the_sum_of_discounted_surprises():
    generator = dice()
    rewards_BT, values_BT = torch.rand(2, 4, 9, generator=generator)
    mask_BT = torch.zeros(4, 9, dtype=torch.bool)
    for row, (first, stop) in enumerate(((2, 9), (2, 5), (3, 4), (0, 9))):
        mask_BT[row, first:stop] = True
    found_BT, _ = gae(rewards_BT, values_BT, mask_BT, 0.9, 0.8)
    for row in range(4):
        places = mask_BT[row].nonzero()[:, 0].tolist()
        for t in places:
            total = 0.0
            for k in range(t, places[-1] + 1):
                after = float(values_BT[row, k + 1]) if k < places[-1] else 0.0
                surprise = float(rewards_BT[row, k]) + 0.9 * after - float(values_BT[row, k])
                total += (0.9 * 0.8) ** (k - t) * surprise
            assert float(found_BT[row, t]) == pytest.approx(total, abs=1e-5)
        assert not found_BT[row][~mask_BT[row]].any()


def test_whitening_over_the_mask_only():
    mask_BT = torch.tensor([[False, True, True], [True, True, False]])
    x_BT = torch.tensor([[100.0, 1.0, 2.0], [3.0, 4.0, -100.0]])
    white_BT = whiten(x_BT, mask_BT)
    spread = math.sqrt(1.25)
    expected = torch.tensor([[0, -1.5, -0.5], [0.5, 1.5, 0]]) / spread
    torch.testing.assert_close(white_BT, expected)
    flat = whiten(torch.full((1, 3), 2.0), torch.ones(1, 3, dtype=torch.bool))
    assert flat.tolist() == [[0.0] * 3], "no spread: nothing to learn, and no division by zero"


def test_kl_terms_are_never_negative_and_have_the_right_mean():
    logits = torch.randn(2, 50, 8, generator=dice()) * 2
    p, q = logits.log_softmax(-1)
    k3 = kl_terms(p, q)
    assert (k3 >= 0).all() and (kl_terms(p, p) == 0).all()
    exact = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close((p.exp() * k3).sum(-1), exact, atol=1e-4, rtol=1e-4)


def test_the_controller_moves_the_right_way():
    controller = KLController(beta=0.1, target=6.0)
    controller.update(6.0)
    assert controller.beta == 0.1
    controller.update(7.2)  # a fifth too far: the largest step
    assert controller.beta == pytest.approx(0.1 * 1.02)
    controller.update(600.0)
    assert controller.beta == pytest.approx(0.1 * 1.02**2), "limited"
    controller.update(5.4)
    assert controller.beta == pytest.approx(0.1 * 1.02**2 * 0.99)
    fixed = KLController(beta=0.1, target=0.0)
    fixed.update(600.0)
    assert fixed.beta == 0.1


# Losses and the value head


def test_clipped_losses_by_hand():
    one = torch.tensor([1.0])
    # advantage, ratio, what it costs (-min of both)
    for advantage, ratio, expected in ((2, 1.1, -2.2), (2, 1.5, -2.4), (2, 0.5, -1.0),
                                       (-2, 1.5, 3.0), (-2, 0.5, 1.6)):  # fmt: skip
        found = policy_loss(ratio * one, advantage * one, 0.2)
        assert float(found) == pytest.approx(expected)
    # Old value 0, return 1: 0.1 is near; 0.5 is held at 0.2, whose error is the worse one.
    assert float(value_loss(0.1 * one, 0 * one, one, 0.2)) == pytest.approx(0.5 * 0.81)
    assert float(value_loss(0.5 * one, 0 * one, one, 0.2)) == pytest.approx(0.5 * 0.64)
    assert float(value_loss(-0.5 * one, 0 * one, one, 0.2)) == pytest.approx(0.5 * 2.25)


def test_a_clipped_token_has_no_gradient_and_a_spoiled_one_has():
    for advantage, ratio, moves in ((1.0, 1.5, False), (-1.0, 1.5, True), (1.0, 0.5, True)):
        ratio_N = torch.tensor([ratio], requires_grad=True)
        policy_loss(ratio_N, torch.tensor([advantage]), 0.2).backward()
        assert bool(ratio_N.grad) == moves


def test_the_value_head_starts_at_the_expected_score_and_leaves_the_trunk_alone():
    policy = ActorCritic(stirred())
    policy.expect(1.75)
    parts = lay_out([[3, 4]], [[5, 6, END]], PAD, CPU)
    _, values_N = policy(*parts, SMALL)
    assert values_N.tolist() == [1.75] * 3
    torch.nn.init.normal_(policy.value[-1].weight)
    policy(*parts, SMALL)[1].sum().backward()
    assert all(w.grad is None for w in policy.gpt.parameters())
    assert all(w.grad is not None for w in policy.value.parameters())


def test_values_belong_to_the_moment_before_their_token():
    policy = ActorCritic(stirred())
    torch.nn.init.normal_(policy.value[-1].weight)
    one = policy(*lay_out([[3, 4]], [[5, 6, 7]], PAD, CPU), SMALL)[1]
    other = policy(*lay_out([[3, 4]], [[5, 6, 8]], PAD, CPU), SMALL)[1]
    torch.testing.assert_close(one, other)  # the last token differs, its value doesn't
    changed = policy(*lay_out([[3, 4]], [[5, 9, 7]], PAD, CPU), SMALL)[1]
    torch.testing.assert_close(one[:2], changed[:2])
    assert (one[2] - changed[2]).abs() > 1e-4


# Reports


def test_reports_by_hand():
    assert distinct([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert repetition([[1, 2, 3, 1, 2, 3], [4, 5, 6]]) == 1 / 5
    assert distinct([[1]]) == repetition([[1]]) == 0
    _, rollout = collected()
    report = summary(rollout)
    assert report["length"] == pytest.approx(sum(map(len, rollout.replies)) / 12)
    ended = sum(reply[-1] == END for reply in rollout.replies)
    assert report["ended"] == pytest.approx(ended / 12)
    assert report["kl_k3"] > 0 and report["entropy"] > 0


def test_prompts_come_once_before_any_comes_again():
    steps = [prompts_of_step(10, 4, step, seed=3) for step in range(10)]
    flat = [n for step in steps for n in step]
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert prompts_of_step(10, 4, 7, seed=3) == steps[7]
    assert len(prompts_of_step(3, 8, 0, seed=0)) == 8


# Settings and bad rewards


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"episodes": 0}, "episodes is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"clip": 0}, "clip is 0"),
        ({"beta": -1}, "beta is -1"),
        ({"end_penalty": math.inf}, "end_penalty is inf"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_settings_without_sense(values, named):
    with pytest.raises(ConfigError, match=named):
        PPOConfig(**values)


@pytest.mark.parametrize(
    "marks", [torch.tensor([math.nan] * 12), torch.zeros(11), torch.zeros(12, 1)]
)
def test_a_reward_that_is_no_number_stops_the_run(marks, tmp_path):
    def broken(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        return marks

    with pytest.raises(TinychatError, match="one finite score to each of the 12 replies"):
        train_ppo(
            ActorCritic(tiny()), tiny(), PROMPTS, broken, SMALL, tmp_path, **TOKENS
        )  # fmt: skip


def test_no_prompts(tmp_path):
    with pytest.raises(DataError, match="no prompt"):
        train_ppo(ActorCritic(tiny()), tiny(), [], wanted, SMALL, tmp_path, **TOKENS)


def test_bf16_stays_near_fp32():
    exact, rough = (replace(SMALL, precision=name) for name in ("fp32", "bf16"))
    parts = lay_out(PROMPTS[:8], [[5, 6, 7, 8, END]] * 8, PAD, CPU)
    one_N, _ = reply_logprobs(stirred(), *parts, exact)
    other_N, _ = reply_logprobs(stirred(), *parts, rough)
    assert 0 < (one_N - other_N).abs().max() < 0.3
    policy, rollout = collected(rough)
    learned = update(policy, ppo.make_optimizer(policy, rough), rollout, rough, dice())
    assert learned["ratio_first"] == pytest.approx(1, abs=1e-3)


# The run

RUN = PPOConfig(
    steps=5, episodes=8, minibatch=4, epochs=2, max_tokens=6, lr=5e-3, warmup=0, kl_target=0.5,
    save_minutes=1e-9,
)  # fmt: skip


def run(folder: Path, **keywords) -> tuple[ActorCritic, PPOProgress]:
    policy = ActorCritic(tiny())
    done = train_ppo(policy, tiny(), PROMPTS[:20], wanted, RUN, folder, **TOKENS, **keywords)
    return policy, done


def rows_without_time(folder: Path) -> list[dict]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("killed", [False, True])
def test_stopped_or_killed_and_resumed_gives_the_same_numbers(tmp_path, killed):
    whole, unbroken = run(tmp_path / "whole")

    class Killed(BaseException):
        pass

    seen: list[int] = []

    def on_step(progress: PPOProgress) -> None:
        seen.append(progress.step)
        if killed and progress.step == 3:  # this step is in the metrics, but in no saved state
            raise Killed

    part = tmp_path / "part"
    try:
        run(part, on_step=on_step, should_stop=lambda: seen[-1] == 3)
    except Killed:
        pass
    assert seen == [1, 2, 3]
    again, resumed = run(part, resume=True)
    assert resumed.finished and (resumed.step, resumed.tokens) == (5, unbroken.tokens)
    assert rows_without_time(part) == rows_without_time(tmp_path / "whole")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    betas = [row["beta"] for row in rows_without_time(part)]
    assert len(set(betas)) > 2, "beta is steered, and is taken up again"


def test_a_judge_only_looks_on(tmp_path):
    def judge(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        return torch.tensor([float(len(reply)) for reply in replies])

    alone, _ = run(tmp_path / "alone")
    watched, _ = run(tmp_path / "watched", judge=judge)
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = rows_without_time(tmp_path / "watched")
    assert [row["judge"] for row in rows] == pytest.approx([row["length"] for row in rows])
    assert "judge" not in rows_without_time(tmp_path / "alone")[0]


SHARED = """
import sys, torch.distributed as dist
from pathlib import Path
from test_ppo import shared

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
shared(folder, processes=2)
dist.destroy_process_group()
"""


def shared(folder: Path, processes: int) -> ActorCritic:
    """A run whose replies depend on nothing but policy and prompt; it leaves its weights."""

    def one_by_one(policy, prompts, config, *, generator, **tokens):
        alone = [
            sample_replies(policy, [p], config, **tokens, generator=dice(100 * sum(p) + len(p)))
            for p in prompts
        ]
        return [row for rows, _ in alone for row in rows], [
            row for _, rows in alone for row in rows
        ]

    torch.set_num_threads(1)
    policy = ActorCritic(tiny())
    config = replace(RUN, episodes=8 // processes, minibatch=4 // processes, beta=0.1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ppo, "sample_replies", one_by_one)
        done = train_ppo(
            policy, tiny(7), PROMPTS[:20], wanted, config, folder, stop=(), end=-1, pad=PAD
        )  # fmt: skip
    name = f"{done.step} steps, {done.tokens} tokens, {os.getpid()}.weights"
    torch.save(dict(policy.state_dict()), folder / name)
    return policy


@pytest.mark.slow
def test_two_processes_with_half_the_episodes_are_one_with_all(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = dict(shared(tmp_path / "one", processes=1).state_dict())
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(rank), str(tmp_path / "two")],
            cwd=Path(__file__).parent,
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    alone, *_ = (tmp_path / "one").glob("*.weights")
    both = list((tmp_path / "two").glob("*.weights"))
    assert len(both) == 2
    for path in both:
        assert path.name.rpartition(", ")[0] == alone.name.rpartition(", ")[0]
        torch.testing.assert_close(torch.load(path, weights_only=True), one, atol=2e-5, rtol=0)
    before = dict(ActorCritic(tiny()).state_dict())
    moved = max(float((one[name] - before[name]).abs().max()) for name in one)
    assert moved > 100 * 2e-5, "it learned something that could have differed"
    rows = [rows_without_time(tmp_path / name) for name in ("one", "two")]
    for key in ("score", "kl", "beta", "policy_loss", "value_loss", "norm", "entropy"):
        first, second = ([row[key] for row in found] for found in rows)
        assert first == pytest.approx(second, abs=1e-4), key


def conversations(start: int) -> Iterator[Batch]:
    """Batch number n says one of eight texts, over and over."""
    for number in itertools.count(start):
        ids = torch.randint(2, V, (2, 12), generator=dice(number % 8))
        yield Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 11))


def test_reading_on_keeps_what_was_read(tmp_path):
    """PPO-ptx: each update takes the next batch, and only with a weight above 0."""
    taken: list[int] = []

    def counted(start: int) -> Iterator[Batch]:
        for number, batch in enumerate(conversations(start), start):
            taken.append(number)
            yield batch

    losses = {}
    for ptx in (0.0, 1.0):
        policy, config = ActorCritic(tiny()), replace(RUN, ptx=ptx, lr=2e-2)
        train_ppo(
            policy, tiny(), PROMPTS[:20], wanted, config, tmp_path / str(ptx), **TOKENS,
            conversations=counted,
        )  # fmt: skip
        loss = LossFunction(policy.gpt, dtype=torch.float32, compiled=False)
        with torch.no_grad():
            losses[ptx] = sum(float(loss(b)) for b in itertools.islice(conversations(0), 8)) / 8
    assert taken == list(range(5 * 2 * 2)), "five steps of two epochs over two minibatches"
    assert losses[1.0] < losses[0.0] - 0.1
    assert "ptx_loss" not in rows_without_time(tmp_path / "0.0")[0]
    assert rows_without_time(tmp_path / "1.0")[0]["ptx_loss"] == pytest.approx(math.log(V), abs=0.5)


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_run_that_reads_on_resumes_to_the_same_numbers(tmp_path, stop_at):
    config, found = replace(RUN, ptx=0.5), []
    for name, stops in (("whole", [9]), ("part", [stop_at, 9])):
        for stop_here in stops:
            seen: list[int] = []
            policy = ActorCritic(tiny())
            train_ppo(
                policy, tiny(), PROMPTS[:20], wanted, config, tmp_path / name, **TOKENS,
                conversations=conversations, resume=stop_here == 9 and len(stops) > 1,
                on_step=lambda p, seen=seen: seen.append(p.step),
                should_stop=lambda seen=seen, at=stop_here: seen[-1] == at,
            )  # fmt: skip
        found.append(dict(policy.named_parameters()))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_a_finished_policy_keeps_some_of_the_reference(tmp_path):
    learned, _ = run(tmp_path / "run")
    before = dict(tiny().named_parameters())
    policy, config = ActorCritic(tiny()), replace(RUN, keep=0.25)
    train_ppo(policy, tiny(), PROMPTS[:20], wanted, config, tmp_path / "run", **TOKENS, resume=True)
    for name, weight in policy.gpt.named_parameters():
        expected = 0.25 * before[name] + 0.75 * dict(learned.gpt.named_parameters())[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
    state = load_state(tmp_path / "run")
    assert state is not None and torch.equal(
        state[0]["model/gpt.embed.weight"], learned.gpt.embed.weight
    )


def test_a_used_folder_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        run(tmp_path)


def test_minutes_become_steps(tmp_path):
    policy = ActorCritic(tiny())
    config = replace(RUN, steps=0, episodes=4, epochs=1)
    done = train_ppo(policy, tiny(), PROMPTS, wanted, config, tmp_path, **TOKENS, minutes=0.01)
    assert done.finished and done.steps >= 7


# The toy: eight wanted tokens, then an end of one's own

TOY = PPOConfig(
    steps=60, minibatch=32, max_tokens=LENGTH, lr=8e-3, value_lr=8e-3, warmup=0, decay=0.3,
    beta=0.001, kl_stop=0.1, end_penalty=0.5,
)  # fmt: skip


def toy(folder: Path, **changes) -> float:
    """The mean mark of the last five steps, less the penalty; the best possible is 1."""
    marks: list[float] = []

    def on_step(progress: PPOProgress) -> None:
        marks.append(progress.metrics["score"] - 0.5 * (1 - progress.metrics["ended"]))

    train_ppo(
        ActorCritic(tiny()), tiny(), PROMPTS, wanted, replace(TOY, **changes), folder, **TOKENS,
        on_step=on_step,
    )  # fmt: skip
    return sum(marks[-5:]) / 5


def test_the_toy_gets_better_soon(tmp_path):
    assert toy(tmp_path, steps=14) > 0.1  # -0.35 at the start


@pytest.mark.slow
def test_the_toy_reaches_95_percent_of_the_optimum(tmp_path):
    assert toy(tmp_path) > 0.95


def last_column(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, beta):
    rewards_BT = place_rewards(logprobs_BT, ref_logprobs_BT, mask_BT, 0 * scores_B, beta)
    rewards_BT[:, -1] += scores_B
    return rewards_BT


def first_token(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, beta):
    rewards_BT = place_rewards(logprobs_BT, ref_logprobs_BT, mask_BT, 0 * scores_B, beta)
    rewards_BT[torch.arange(len(scores_B)), mask_BT.float().argmax(1)] += scores_B
    return rewards_BT


def other_temperature(gpt, tokens_BT, segments_BT, mask_BT, config):
    # A third reaches 0.66 of the optimum; twice the right one 0.87 to 0.95, as the machine adds.
    cold = replace(config, temperature=0.33)
    return reply_logprobs(gpt, tokens_BT, segments_BT, mask_BT, cold)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wrong",
    [
        ("place_rewards", last_column),
        ("place_rewards", first_token),
        ("reply_logprobs", other_temperature),
        ("end_penalty", 0.0),
    ],
)
def test_the_toy_fails_when_a_detail_is_broken(tmp_path, monkeypatch, name, wrong):
    changes = {}
    if isinstance(wrong, Callable):
        monkeypatch.setattr(ppo, name, wrong)
    else:
        changes[name] = wrong
    assert toy(tmp_path, **changes) < 0.95


# The command


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a chat model and a reward model, far too small to say anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    torch.manual_seed(0)
    shape = GPTConfig(
        width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=160
    )
    pieces = Tokenizer(tokenizer_model())
    common = {"tokenizer": pieces, "lineage": {"tokens": 7}, "metrics": {}}
    save_model("sft.safetensors", GPT(shape), stage="sft", **common)
    save_model("base.safetensors", GPT(shape), stage="base", **common)
    save_reward("reward.safetensors", RewardModel(GPT(shape)), **common)
    common["lineage"] = {"half": "judge"}
    save_reward("judge.safetensors", RewardModel(GPT(shape)), **common)
    return tmp_path


QUICK = ["--set", "episodes=4", "--set", "samples=1", "--set", "max_tokens=16"]
QUICK += ["--set", "steps=2", "--set", "lr=0.001", "--set", "ptx=0"]


def command(*words: str):
    return CliRunner().invoke(app, ["train", "ppo", *words], env={"COLUMNS": "300"})


def test_the_command_from_sft_and_reward_to_rlhf(here):
    files = ["--from", "sft.safetensors", "--reward", "reward.safetensors"]
    result = command(*files, *QUICK)
    assert result.exit_code == 0, result.output
    assert "Talk to it: tinychat chat --ckpt" in result.output
    info = read_info("runs/ppo/rlhf.safetensors")
    assert info.stage == "rlhf"
    assert info.lineage["parent_sha256"] == file_sha256("sft.safetensors")
    assert info.lineage["reward_sha256"] == file_sha256("reward.safetensors")
    assert len(info.lineage["ancestors"]) == 2
    assert (info.lineage["steps"], info.lineage["settings"]["episodes"]) == (2, 4)
    assert info.metrics["before"]["kl"] == pytest.approx(0, abs=1e-4)
    assert info.metrics["after"].keys() >= {"score", "kl", "length", "distinct_2", "ended"}
    model, _, _ = load_model("runs/ppo/rlhf.safetensors")
    assert not torch.equal(model.embed.weight, load_model("sft.safetensors")[0].embed.weight)
    samples = Path("runs/ppo/samples.txt").read_text(encoding="utf-8")
    for name in ("before", "after"):
        marked = re.findall(rf"^ *{name} [+-]\d", samples, re.MULTILINE)
        assert len(marked) == info.metrics["held_out_prompts"]
    assert json.loads(Path("runs/ppo/run.json").read_text())["set"] == [*RECIPE, *QUICK[1::2]]
    for words in ([], [*files, "--fit", "0"]):
        again = command("--resume", *words)
        assert again.exit_code == 0 and "is finished already" in again.stdout
    # It goes on as it began, or says that it won't.
    for words, sentence in (
        (["--fit", "1"], "was begun with --fit 0.0; leave --fit 1.0 out"),
        (["--reward", "judge"], "was begun with --reward reward.safetensors; leave --reward judge"),
        (["--judge", "judge"], "was begun without --judge; leave --judge judge.safetensors out"),
        (["--data", "texts"], "was begun without --data (or TINYCHAT_DATA)"),
    ):
        refused = command("--resume", *words)
        assert refused.exit_code == 2
        assert sentence in " ".join(refused.stderr.replace("│", " ").split())
    # Minutes undo the number of steps for good.
    assert command("--resume", "--minutes", "0.001").exit_code == 0
    record = json.loads(Path("runs/ppo/run.json").read_text())
    assert record["minutes"] == 0.001
    assert record["set"] == [*RECIPE, *(one for one in QUICK[1::2] if one != "steps=2")]


@pytest.mark.slow
def test_the_command_shared_by_two_processes(here):
    files = ["--from", "sft.safetensors", "--reward", "reward.safetensors"]
    done = subprocess.run(
        [*TORCHRUN, "tinychat", "train", "ppo", *files, *QUICK],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Talk to it") == 1
    info = read_info("runs/ppo/rlhf.safetensors")
    assert (info.lineage["processes"], info.lineage["settings"]["episodes"]) == (2, 4)
    record = json.loads(Path("runs/ppo/run.json").read_text())
    assert (record["processes"], record["rows"]) == (2, 8)
    # One process alone goes on only with as many episodes a step.
    refused = command("--resume", "--set", "steps=3")
    assert refused.exit_code == 2 and "these are 1 with 4; add --set episodes=8" in " ".join(
        refused.stderr.replace("│", " ").split()
    )
    went_on = command("--resume", "--set", "steps=3", "--set", "episodes=8")
    assert went_on.exit_code == 0, went_on.output
    assert read_info("runs/ppo/rlhf.safetensors").lineage["steps"] == 3


def test_a_judge_looks_on_and_is_no_teacher(here):
    files = ["--from", "sft.safetensors", "--reward", "reward.safetensors"]
    result = command(*files, *QUICK, "--judge", "judge.safetensors")
    assert result.exit_code == 0, result.output
    info = read_info("runs/ppo/rlhf.safetensors")
    rows = read_metrics(Path("runs/ppo/metrics.jsonl"))
    assert info.metrics["curve"][0] == pytest.approx(
        [1, rows[0]["score"], rows[0]["kl"], rows[0]["judge"]], abs=1e-3
    )
    assert info.metrics["before"]["judge"] != info.metrics["before"]["score"]
    assert re.search(r"^ +the judge's mark, mean +-?\d", result.stdout, re.MULTILINE)
    assert info.lineage["reward_sha256"] == file_sha256("reward.safetensors")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "1", "--judge", "reward.safetensors"], "is no judge"),
        (["--minutes", "1", "--judge", "sft.safetensors"], "gives no marks"),
        (
            ["--minutes", "1", "--reward", "judge.safetensors", "--judge", "judge.safetensors"],
            "gives the rewards already",
        ),
        (["--from", "base.safetensors", "--minutes", "1"], "is a base model"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--minutes", "1", "--fit", "-1"], "--fit is -1"),
        (["--minutes", "1", "--rules", "nan"], "--rules is nan"),
        (["--minutes", "1", "--facts", "-1"], "--facts is -1"),
        (["--minutes", "1", "--sure", "inf"], "--sure is inf"),
        (["--minutes", "1", "--marks", "-2"], "--marks is -2"),
        (["--minutes", "1", "--stock", "-1"], "--stock is -1"),
        ([], "How long? Give a budget"),
        (["--minutes", "1", "--set", "max_tokens=400"], "No prompt is short enough"),
        (["--minutes", "1", "--reward", "sft.safetensors"], "gives no marks"),
        (["--resume", "--run", "nothing"], "There is no run to resume"),
    ],
)
def test_mistakes_are_told_in_a_sentence(here, words, told):
    words = [*words] if "--from" in words else ["--from", "sft.safetensors", *words]
    words = words if "--reward" in words else [*words, "--reward", "reward.safetensors"]
    result = command(*words)
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("runs/ppo").exists()


def test_a_missing_reward_model_is_told_how_to_make(here, monkeypatch):
    monkeypatch.setattr("tinychat.runtime.search.search_folders", lambda: [])
    Path("reward.safetensors").unlink()
    result = command("--from", "sft.safetensors", "--minutes", "1")
    assert result.exit_code == 2
    told = " ".join(result.stderr.replace("│", " ").split())
    assert "no reward model yet: make one with `tinychat train reward`, or name one with" in told
    assert not Path("runs").exists()


def test_what_fits_worse_than_written_replies_loses_and_nothing_gains(here):
    gpt, pieces, _ = load_model("sft.safetensors")
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    prompts, replies = written_replies(pieces, 120)
    assert 20 < len(prompts) == len(replies) <= 300
    assert all(len(p) + len(r) <= 120 for p, r in zip(prompts, replies, strict=True))

    def marks(prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
        return torch.arange(float(len(replies)))

    rewards = with_fit(marks, gpt, pieces, 2.0)(prompts, replies)
    lost_N = marks(prompts, replies) - rewards
    blank = render_prompt((Message("user", "..."),), pieces, context=160, reserve=8)
    fit_N = question_fit(gpt, prompts, replies, blank, pieces.pad_id)
    known_N = question_fit(gpt, *written_replies(pieces, 160), blank, pieces.pad_id)
    expected_N = 2 * ((known_N.mean() - fit_N) / known_N.std()).clamp(min=0)
    torch.testing.assert_close(lost_N, expected_N, atol=1e-3, rtol=1e-3)
    assert bool((lost_N == 0).any()) and bool((lost_N > 0).any())


def test_a_reply_that_breaks_a_rule_loses_once(here):
    _, pieces, _ = load_model("sft.safetensors")
    said = [("user", "hi, I am Boo"), ("assistant", "Hello!"), ("user", "and why?")]
    messages = tuple(Message(*turn) for turn in said)
    prompt = render_prompt(messages, pieces, context=160, reserve=8)
    assert asked(prompt, pieces) == [
        Message("system", "hi, I am Boo\nHello!"),
        Message("user", "and why?"),
    ]
    end = pieces.end_id
    replies = [
        [*pieces.encode("Because of the cat, Boo."), end],
        [*pieces.encode("Because of the stickericky cat."), end],
        pieces.encode("Because of the cat"),
        [*pieces.encode("cat cat cat cat cat"), end],
        [*pieces.encode("stick stick stick stick stickericky")],
        [end],
    ]
    rewards = with_rules(lambda prompts, replies: torch.arange(6.0), pieces, 1.5)
    lost_N = torch.arange(6.0) - rewards([prompt] * 6, replies)
    assert lost_N.tolist() == [0.0, 1.5, 0.0, 1.5, 1.5, 1.5], "no end has a price of its own"


def test_what_the_chat_model_holds_for_likelier_earns(here):
    gpt, pieces, _ = load_model("sft.safetensors")
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    prompts, replies = (some[:40] for some in written_replies(pieces, 120))
    rewards = with_sure(lambda prompts, replies: torch.arange(40.0), gpt, pieces, 2.0)
    earned_N = rewards(prompts, replies) - torch.arange(40.0)
    for n in (0, 17, 39):
        with torch.no_grad():
            scores_TV = gpt(torch.tensor([prompts[n] + replies[n]]))[0].log_softmax(-1)
        places = range(len(prompts[n]) - 1, len(prompts[n]) + len(replies[n]) - 1)
        by_hand = [float(scores_TV[t, id]) for t, id in zip(places, replies[n], strict=True)]
        assert float(earned_N[n]) == pytest.approx(2 * sum(by_hand) / len(by_hand), rel=1e-4)


def test_phrases_that_other_replies_wear_out_lose(here):
    _, pieces, _ = load_model("sft.safetensors")
    assert beginnings("I'm sorry. What next? Yes!") == {"i'm sorry", "what next"}

    def lost(texts: list[str], samples: int, written: list[str]) -> list[float]:
        replies = [[*pieces.encode(text), pieces.end_id] for text in texts]
        prompts = [[n // samples, 3] for n in range(len(replies))]
        rewards = with_stock(
            lambda prompts, replies: torch.zeros(len(replies)), pieces, written, 2.0
        )
        return (-rewards(prompts, replies)).tolist()

    # 32 prompts, one reply each; half of them are sorry, and of the written ones one in ten.
    texts = ["I'm sorry about it.", "Bees make honey."] * 16
    written = ["I'm sorry.", *["You can."] * 9]
    expected = 0.1
    by_hand = math.log((15 + 32 * expected) / (31 + 32) / expected)
    found = lost(texts, 1, written)
    assert found[0] == pytest.approx(2 * by_hand, rel=1e-5)
    # Honey is in no written reply, so it may be in one of a hundred.
    assert found[1] == pytest.approx(2 * math.log((15 + 32 * 0.01) / (31 + 32) / 0.01), rel=1e-5)
    # What is as usual there loses nothing, nor what only the siblings say.
    assert lost(texts, 1, ["I'm sorry now.", "Bees make honey."])[:2] == [0, 0]
    siblings = ["I'm sorry about it."] * 4 + ["The bees.", "A fox.", "My hat.", "Old cars."] * 8
    assert lost(siblings, 4, written)[:4] == [0] * 4


def test_a_right_answer_earns_and_a_wrong_one_loses(here):
    _, pieces, _ = load_model("sft.safetensors")
    peru = talk(*PERU)
    moo = talk("what does the cow say and why does it say that?", "A cow says moo.", "science")
    facts = Facts([peru, moo])
    room = len(render_prompt(peru.messages[:1], pieces, context=160, reserve=8))
    checked = checked_prompts(facts, pieces, room)
    assert list(checked.values()) == [peru], "the other question is too long"
    (prompt,) = checked
    replies = [
        [*pieces.encode("It is Lima."), pieces.end_id],
        pieces.encode("It is Lima"),
        [*pieces.encode("It is Rome."), pieces.end_id],
        [*pieces.encode("It is Lima."), pieces.end_id],
    ]
    prompts = [[*prompt]] * 3 + [pieces.encode("and why?")]
    rewards = with_facts(lambda prompts, replies: torch.arange(4.0), pieces, facts, checked, 1.5)
    earned_N = rewards(prompts, replies) - torch.arange(4.0)
    assert earned_N.tolist() == [1.5, 1.5, -1.5, 0.0]


def test_checked_questions_are_asked_and_none_that_is_held_out(here):
    _, pieces, _ = load_model("sft.safetensors")
    facts = Facts(by_split(corpus.basics())["train"])
    checked = checked_prompts(facts, pieces, 60)
    plain, held_out, _ = find_prompts(None, pieces, 60, 64, {})
    train, same, sources = find_prompts(None, pieces, 60, 64, checked)
    assert len(checked) > 10_000 and len(train) > len(plain) + 5_000
    assert held_out == same and not {tuple(one) for one in held_out} & {tuple(one) for one in train}
    # Trivia must not drown the talk that the chat is there for.
    assert 0.45 < sum(tuple(one) in checked for one in train) / len(train) < 0.6
    assert sources["graded"]["prompts"] > 1_000
    assert sum(source["prompts"] for source in sources.values()) >= len(train)


def test_every_third_prompt_stands_in_a_chat(here):
    _, pieces, _ = load_model("sft.safetensors")
    facts = Facts(by_split(corpus.basics())["train"][:4000])
    checked = checked_prompts(facts, pieces, 60)
    asked = [[*ids] for ids in checked]
    asked[3] = [pieces.bos_id, pieces.system_id, 9, pieces.end_id, *asked[3][1:]]
    asked[6] = [pieces.bos_id, *[9] * 127]
    prompts, known = in_chats(asked, checked, pieces, 128)
    changed = [n for n, (old, new) in enumerate(zip(asked, prompts, strict=True)) if old != new]
    assert set(changed) <= set(range(0, len(asked), 3)) and {3, 6}.isdisjoint(changed)
    assert len(changed) > 0.3 * len(asked)
    sides = by_split([*corpus.dialogues(), *corpus.basics()])
    read = {turn.content for one in sides["train"] for turn in one.messages}
    for n in changed[:200]:
        before = prompts[n][: 1 - len(asked[n])]
        assert [*before, *asked[n][1:]] == prompts[n] and len(prompts[n]) <= 128
        assert before[-1] == pieces.end_id and before.count(pieces.assistant_id) >= 1
        assert prompts[n].count(pieces.bos_id) == 1
        assert known[tuple(prompts[n])] is checked[tuple(asked[n])]
        assert pieces.decode(before[2 : before.index(pieces.end_id)]) in read
    assert known.items() >= checked.items()
    assert in_chats(asked, checked, pieces, 128)[0] == prompts
    assert in_chats(asked[:3], checked, pieces, 4)[0] == asked[:3], "no room for more"


def test_every_condition_has_a_weight(here):
    gpt, pieces, _ = load_model("sft.safetensors")
    peru = talk(*PERU)
    facts = Facts([peru])
    checked = checked_prompts(facts, pieces, 60)
    prompts = [[*next(iter(checked))]] * 2
    replies = [[*pieces.encode(text), pieces.end_id] for text in ("It is Lima.", "It is Rome.")]

    def rewards(**weights: float) -> list[float]:
        reward = with_all(
            lambda prompts, replies: torch.tensor([1.0, 3.0]),
            weights, gpt, pieces, facts, checked, ["It is so."],
        )  # fmt: skip
        return reward(prompts, replies).tolist()

    assert rewards() == [1, 3], "a run from before there were weights"
    assert rewards(marks=0.5) == [0.5, 1.5]
    assert rewards(marks=0, facts=2) == [2, -2]
    sure = mean_logprobs(gpt, prompts, replies, pieces.pad_id).tolist()
    assert rewards(marks=0, sure=0.5) == pytest.approx([one / 2 for one in sure])
    assert rewards(marks=0, facts=2, sure=0.5) == pytest.approx([sure[0] / 2 + 2, sure[1] / 2 - 2])


def test_no_reply_is_asked_for_that_there_is_no_room_for(here):
    """A fine for every story that doesn't end in time would teach to tell none."""
    _, pieces, _ = load_model("sft.safetensors")
    some, all_of_them = (
        {tuple(one) for one in find_prompts(None, pieces, 128, longest, {})[0]}
        for longest in (40, 1_000)
    )
    long, short = set(), set()
    for dialogue in by_split(corpus.dialogues())["train"]:
        for prompt in prompts_of(dialogue):
            size = len(pieces.encode(dialogue.messages[len(prompt)].content))
            (short if size < 40 else long).add(tuple(render_prompt(prompt, pieces)))
    assert some < all_of_them
    assert len(long & all_of_them) > 500 and len(short & all_of_them) > 1_000
    # Some of the long ones are asked among the graded, too, and were answered in few words there.
    assert len((long - short) & some) < 0.2 * len(long & all_of_them)
    assert len(short & some) > 0.99 * len(short & all_of_them)


def test_another_reward_file_than_the_run_began_with(here):
    files = ["--from", "sft.safetensors", "--reward", "reward.safetensors"]
    assert command(*files, *QUICK, "--set", "steps=1").exit_code == 0
    Path("reward.safetensors").write_bytes(Path("sft.safetensors").read_bytes())
    result = command("--resume", "--set", "steps=2")
    assert result.exit_code == 2
    assert "has changed since this run began" in " ".join(result.stderr.split())
