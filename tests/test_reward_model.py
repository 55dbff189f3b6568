"""The reward model: loss by hand, padding, normalising, files, learning, resuming, the command."""

import copy
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
import torch
from fakes import ByteTokenizer
from typer.testing import CliRunner

from tinychat.cli.app import app
from tinychat.cli.loading import choose
from tinychat.data import tokenizer_model
from tinychat.data.groups import Group, tokenize_groups
from tinychat.data.preferences import Ranked, Reply, by_part, corpus_ranked
from tinychat.data.records import Message
from tinychat.gpt import GPT, GPTConfig, load_model, save_model
from tinychat.reward_model import (
    RewardBatch,
    RewardConfig,
    RewardLoss,
    RewardModel,
    accuracy,
    accuracy_by,
    add_words,
    average_weights,
    bag_of_words,
    bag_scores,
    bradley_terry,
    calibration,
    collate,
    fit_reward,
    judge,
    length_correlation,
    load_reward,
    normalize,
    question_fit,
    right_padded,
    save_reward,
    score,
    score_groups,
)
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.runtime.errors import CheckpointError, ConfigError, DataError
from tinychat.runtime.metrics import read_metrics
from tinychat.runtime.state import load_state
from tinychat.tokenizer import Tokenizer

TOKENIZER = ByteTokenizer()
PLAIN = RewardConfig(sequence=64, precision="fp32")
SHAPE = GPTConfig(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=64, vocab_size=263, context=96
)


def stirred(seed: int = 0, shape: GPTConfig = SHAPE) -> RewardModel:
    return RewardModel(fakes.stirred(shape, seed, by=0.2)).eval()


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts and replies of many lengths."""
    draw = torch.Generator().manual_seed(seed)

    def some(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=draw))
        return torch.randint(7, 263, (length,), generator=draw).tolist()

    return [[2, 5, *some(9), 3, 6, *some(30), 3] for _ in range(count)]


def group_of(prompt: str, *replies: str, flaws: tuple[str, ...] = (), source: str = "t") -> Group:
    flaws = flaws or ("", *["bad"] * (len(replies) - 1))
    named = enumerate(zip(replies, flaws, strict=True))
    order = tuple(Reply(text, rank, flaw) for rank, (text, flaw) in named)
    ranked = Ranked((Message("user", prompt),), order, source, prompt)
    (group,) = tokenize_groups([ranked], TOKENIZER, sequence=96)
    return group


# The loss


def test_three_replies_are_the_mean_of_three_pairs():
    batch = collate([group_of("q", "a", "bb", "ccc")], pad=0)
    assert batch.ids_BT.shape[0] == 3, "three forward passes for three pairs"
    assert list(zip(batch.better_P.tolist(), batch.worse_P.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 2),
    ]
    marks = torch.tensor([2.0, 0.5, 1.0])
    by_hand = sum(math.log(1 + math.exp(-d)) for d in (1.5, 1.0, -0.5)) / 3
    assert bradley_terry(marks, *batch[2:]).item() == pytest.approx(by_hand, abs=1e-6)


def test_a_prompt_counts_once_and_by_its_weight():
    many, two = group_of("q", "a", "bb", "ccc"), group_of("r", "d", "e")
    marks = torch.tensor([2.0, 0.5, 1.0, 0.0, 3.0])
    loss_many = sum(math.log(1 + math.exp(-d)) for d in (1.5, 1.0, -0.5)) / 3
    loss_two = math.log(1 + math.exp(3.0))
    batch = collate([many, two], pad=0)
    expected = (loss_many + loss_two) / 2
    assert bradley_terry(marks, *batch[2:]).item() == pytest.approx(expected, abs=1e-6)
    light = replace(two, weights=(0.25,))
    batch = collate([many, light], pad=0)
    expected = (loss_many + 0.25 * loss_two) / 1.25
    assert bradley_terry(marks, *batch[2:]).item() == pytest.approx(expected, abs=1e-6)


def test_huge_differences_stay_finite():
    pair = torch.tensor([0]), torch.tensor([1]), torch.ones(1)
    assert bradley_terry(torch.tensor([-1e4, 1e4]), *pair).item() == pytest.approx(2e4)
    assert bradley_terry(torch.tensor([1e4, -1e4]), *pair).item() == 0


def test_the_loss_of_a_batch_is_the_loss_of_its_marks():
    model, groups = stirred(), [group_of("q", "a", "bb", "ccc"), group_of("r", "dddd", "e")]
    batch = collate(groups, pad=0)
    marks = torch.tensor([mark for one in score_groups(model, groups, 0) for mark in one])
    expected = bradley_terry(marks, *batch[2:])
    loss = RewardLoss(model, torch.float32)(batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert isinstance(batch, RewardBatch)


# Marks


def test_marks_do_not_depend_on_padding_or_order():
    model, some = stirred(), texts(23)
    alone = torch.cat([score(model, [text], pad=0) for text in some])
    assert alone.std() > 0.05, "a model that gives one mark to all would pass everything"
    for pad, batch in ((0, 4), (0, 32), (99, 7)):
        torch.testing.assert_close(score(model, some, pad, batch), alone, atol=1e-5, rtol=0)
    backwards = score(model, some[::-1], 0, 5).flip(0)
    torch.testing.assert_close(backwards, alone, atol=1e-5, rtol=0)


def test_the_mark_is_read_at_the_last_token():
    model = stirred()
    ids, last = right_padded(texts(6), pad=0)
    marks = model(ids, last_B=last)
    with torch.no_grad():
        h_BTD = model.gpt.hidden(ids)
    for row in range(6):
        by_hand = float(h_BTD[row, last[row]] @ model.head.weight[0].detach())
        assert marks[row].item() == pytest.approx(by_hand, abs=1e-5)
    # Without an index it is the row's end; a changed reply changes the mark.
    whole = ids[:1, : int(last[0]) + 1]
    assert model(whole).item() == pytest.approx(marks[0].item(), abs=1e-5)
    other = whole.clone()
    other[0, -2] = 50
    assert abs(model(other).item() - marks[0].item()) > 1e-3


def test_segments_keep_texts_apart():
    model, (one, two) = stirred(), texts(2, seed=3)
    ids = torch.tensor([one + two])
    segments = torch.tensor([[1] * len(one) + [2] * len(two)])
    last = torch.tensor([len(one) + len(two) - 1])
    apart = model(ids, segments, last)
    assert apart.item() == pytest.approx(score(model, [two], 0).item(), abs=1e-4)


def test_log_lengths_by_hand():
    ids, last = right_padded([[2, 5, 9, 3, 6, 8, 8, 3], [2, 5, 9, 3, 6, 3], [7, 7]], pad=0)
    expected = [math.log(4), math.log(2), math.log(2)]
    assert stirred().log_lengths(ids, last).tolist() == pytest.approx(expected)
    # An earlier reply doesn't count: the last opener does.
    talk = torch.tensor([[2, 5, 9, 3, 6, 8, 8, 8, 3, 5, 9, 3, 6, 8, 3]])
    assert stirred().log_lengths(talk, torch.tensor([14])).item() == pytest.approx(math.log(3))
    # One that a policy writes in place of its end opens nothing: that reply isn't empty.
    slip = torch.tensor([[2, 5, 9, 3, 6, 8, 6]])
    assert stirred().in_reply(slip, torch.tensor([6])).tolist() == [[False] * 5 + [True] * 2]


def test_an_empty_text_is_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        score(stirred(), [[2, 3], []], pad=0)
    assert score(stirred(), [], pad=0).tolist() == []


# Normalising


@pytest.mark.parametrize("cure", [True, False])
def test_reference_replies_have_mean_0_and_deviation_1(cure):
    model, references = stirred(), texts(40)
    raw = score(model, references, 0)
    normalize(model, references, 0, cure_length=cure)
    marks = score(model, references, 0)
    assert marks.mean().item() == pytest.approx(0, abs=1e-4)
    assert marks.std().item() == pytest.approx(1, abs=1e-4)
    lengths = model.log_lengths(*right_padded(references, 0))
    r = torch.corrcoef(torch.stack([lengths, marks]))[0, 1].item()
    if cure:
        assert abs(r) < 1e-4
    else:
        torch.testing.assert_close(marks, (raw - raw.mean()) / raw.std(), atol=1e-4, rtol=0)
    # Once more changes nothing: it begins from the raw marks.
    before = (model.mean.clone(), model.deviation.clone(), model.length_slope.clone())
    normalize(model, references, 0, cure_length=cure)
    assert before == (model.mean, model.deviation, model.length_slope)


def test_normalising_takes_two():
    with pytest.raises(DataError, match="at least two"):
        normalize(stirred(), texts(1), 0)


# What the writer knows


def logprob_by_hand(gpt: GPT, tokens: list[int]) -> float:
    """Mean log-prob of what stands behind the last `<|assistant|>`, token by token."""
    first = len(tokens) - tokens[::-1].index(6)
    with torch.no_grad():
        logits_TV = gpt(torch.tensor([tokens]))[0].float()
    nats = [logits_TV[n - 1].log_softmax(-1)[tokens[n]].item() for n in range(first, len(tokens))]
    return sum(nats) / len(nats)


def test_with_surety_the_first_marks_are_the_log_probs():
    model = RewardModel(fakes.stirred(SHAPE, 0, by=0.2), surety=3.0).eval()
    some = texts(9)
    expected = [3 * logprob_by_hand(model.gpt, tokens) for tokens in some]
    assert score(model, some, 0, batch=4).tolist() == pytest.approx(expected, abs=1e-4)


def test_surety_is_added_to_the_head():
    plain = stirred()
    both = RewardModel(copy.deepcopy(plain.gpt), surety=0.5).eval()
    both.head.load_state_dict(plain.head.state_dict())
    some = texts(5)
    added = [0.5 * logprob_by_hand(plain.gpt, tokens) for tokens in some]
    gap = score(both, some, 0) - score(plain, some, 0)
    assert gap.tolist() == pytest.approx(added, abs=1e-4)


def test_log_probs_of_chunks_are_those_of_the_whole(monkeypatch):
    """The mark and its gradient, with three tokens' scores held at a time and with all."""
    batch = collate([group_of("q", "good one", "bad one"), group_of("r", "yes", "no")], pad=0)
    found = []
    for chunk in (3, 10_000):
        monkeypatch.setattr(RewardModel, "chunk", chunk)
        model = RewardModel(fakes.stirred(SHAPE, 0, by=0.2), surety=2.0).train()
        marks = model(batch.ids_BT, last_B=batch.last_B)
        bradley_terry(marks, *batch[2:]).backward()
        found.append((marks.detach(), model.gpt.embed.weight.grad))
    for small, whole in zip(*found, strict=True):
        torch.testing.assert_close(small, whole)
    assert found[0][1].abs().sum() > 0


def test_pairs_teach_through_the_log_probs():
    model = RewardModel(fakes.stirred(SHAPE, 0, by=0.2), surety=2.0).train()
    model.head.weight.requires_grad_(False)
    group = group_of("q", "good one", "bad one")
    batch = collate([group], pad=0)
    optimizer = torch.optim.SGD(model.gpt.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        marks = model(batch.ids_BT, last_B=batch.last_B)
        loss = bradley_terry(marks, *batch[2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01, "with a silent head, only p can have learned"


# Files


def real(seed: int = 0) -> tuple[RewardModel, Tokenizer]:
    tokenizer = Tokenizer(tokenizer_model())
    shape = replace(SHAPE, vocab_size=tokenizer.vocab_size)
    model = stirred(seed, shape)
    model.surety.fill_(1.5)
    add_words(model, torch.randn(tokenizer.vocab_size), texts(20), 0)
    normalize(model, texts(20), 0)
    return model, tokenizer


@pytest.mark.parametrize(("kind", "off"), [("fp32", 1e-6), ("bf16", 0.2), ("int8", 0.2)])
def test_round_trip(tmp_path, kind, off):
    model, tokenizer = real()
    path = tmp_path / "reward.safetensors"
    save_reward(path, model, tokenizer=tokenizer, lineage={}, metrics={}, quantize=kind)
    again, its_tokenizer, info = load_reward(path)
    assert info.stage == "reward" and its_tokenizer.sha256 == tokenizer.sha256
    assert not again.training
    some = texts(20, seed=5)
    moved = (score(again, some, 0) - score(model, some, 0)).abs()
    assert moved.max().item() <= off
    for name in ("mean", "deviation", "length_slope", "surety"):
        assert torch.equal(getattr(again, name), getattr(model, name))
    assert torch.equal(again.head.weight, model.head.weight), "the head stays exact"
    assert torch.equal(again.words, model.words), "so do the words"


def test_other_files_are_refused_in_one_sentence(tmp_path, monkeypatch):
    model, tokenizer = real()
    reward, sft = tmp_path / "reward.safetensors", tmp_path / "sft.safetensors"
    save_reward(reward, model, tokenizer=tokenizer, lineage={}, metrics={})
    save_model(sft, model.gpt, stage="sft", tokenizer=tokenizer, lineage={}, metrics={})
    with pytest.raises(CheckpointError, match="stage sft, which gives no marks"):
        load_reward(sft)
    with pytest.raises(CheckpointError, match="reward model, which gives marks and can't write"):
        load_model(reward)
    headless = tmp_path / "headless.safetensors"
    save_model(headless, model.gpt, stage="reward", tokenizer=tokenizer, lineage={}, metrics={})
    with pytest.raises(CheckpointError, match="head is missing or misshapen"):
        load_reward(headless)
    # The chat refuses too, and names the file beside it.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot chat; use .*sft\.safetensors instead"):
        choose(str(reward))


def test_a_wrong_shape_is_refused(tmp_path):
    model, tokenizer = real()
    model.gpt.config = replace(model.gpt.config, layers=3)
    path = tmp_path / "reward.safetensors"
    save_reward(path, model, tokenizer=tokenizer, lineage={}, metrics={})
    with pytest.raises(CheckpointError, match="its own config asks for"):
        load_reward(path)


# Measures


def test_accuracy_and_flaws_by_hand():
    groups = [
        group_of("q", "a", "b", "c", flaws=("", "rude", "vague"), source="one"),
        group_of("r", "d", "e", flaws=("", "rude"), source="two"),
    ]
    judged = judge(groups, [[2.0, 1.0, 3.0], [1.0, 1.0]])
    assert [pair.margin for pair in judged] == [1.0, -1.0, -2.0, 0.0]
    assert [pair.flaw for pair in judged] == ["rude", "vague", "", "rude"]
    assert accuracy(judged) == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    by_flaw = accuracy_by((pair for pair in judged if pair.flaw), lambda pair: pair.flaw)
    assert by_flaw == {"rude": (0.75, 2), "vague": (0.0, 1)}
    by_source = accuracy_by(judged, lambda pair: pair.source)
    assert by_source == {"one": (pytest.approx(1 / 3), 3), "two": (0.5, 1)}
    assert math.isnan(accuracy([]))


def test_calibration_by_hand():
    sure = math.log(0.9 / 0.1)
    bins = calibration([sure, sure, sure, -sure, 0.0, 1e6], bins=5)
    assert [count for _, _, count in bins] == [1, 4, 1]
    assert bins[0][:2] == pytest.approx((0.5, 0.5))
    assert bins[1][:2] == pytest.approx((0.9, 0.75))
    assert bins[2][:2] == pytest.approx((1.0, 1.0))


def test_length_correlation():
    groups = [group_of(f"q{n}", "a" * n, "b") for n in (2, 4, 8, 16)]
    longer = [[math.log1p(len(g.tokens[0]) - g.start), 9.0] for g in groups]
    assert length_correlation(groups, longer) == pytest.approx(1.0)
    assert length_correlation(groups, [[1.0, n] for n in range(4)]) == 0.0
    assert length_correlation(groups, [[-m[0], 0.0] for m in longer]) == pytest.approx(-1.0)


def test_words_alone():
    groups = [group_of(f"q{n}", f"{n} good", f"{n} bad") for n in range(10)]
    weights = bag_of_words(groups, 263)
    assert weights[7 + ord("g")] > 0 > weights[7 + ord("b")]
    unseen = [group_of("new", "good", "bad"), group_of("other", "dog dig", "bad bid")]
    assert accuracy(judge(unseen, bag_scores(weights, unseen))) == 1.0
    # Each token counts once, and the sum is divided by the root of their number: g, o, d, end.
    tokens = sorted(set(unseen[0].tokens[0][unseen[0].start :]))
    assert len(tokens) == 4
    assert bag_scores(weights, unseen)[0][0] == pytest.approx(
        weights[tokens].sum().item() / 2, abs=1e-5
    )
    # Order, repetition and prompt are nothing to it.
    swapped = [group_of("q", "ab", "ba"), group_of("other", "abab", "aaab")]
    (one, two), (three, four) = bag_scores(weights, swapped)
    assert one == pytest.approx(two, abs=1e-6) == pytest.approx(three, abs=1e-6)
    assert three == pytest.approx(four, abs=1e-6)


def test_words_have_a_say_beside_the_network():
    groups = [group_of(f"q{n}", f"{n} good" * (n % 3 + 1), f"{n} bad") for n in range(10)]
    references = [tokens for group in groups for tokens in group.tokens]
    weights = bag_of_words(groups, 263)
    model = stirred()
    of_network = score(model, references, pad=0)
    add_words(model, weights, references, 0, share=0.5)
    of_words = score(model, references, pad=0) - of_network
    assert float(of_words.std()) == pytest.approx(0.5 * float(of_network.std()), rel=1e-3)
    # The model reads the same words as the baseline does, behind the prompt and before the padding.
    torch.testing.assert_close(
        of_words, torch.tensor(sum(bag_scores(model.words, groups), [])), atol=1e-4, rtol=0
    )
    # Loud enough, they decide; silent, they change nothing.
    add_words(model, weights, references, 0, share=100)
    assert accuracy(judge(groups, score_groups(model, groups, pad=0))) == 1.0
    add_words(model, weights, references, 0, share=0)
    torch.testing.assert_close(score(model, references, pad=0), of_network)


def test_averaging_weights():
    one, two, three = stirred(0), stirred(1), stirred(2)
    expected = {
        name: (weight + dict(two.named_parameters())[name] + dict(three.named_parameters())[name])
        / 3
        for name, weight in one.named_parameters()
    }
    average_weights(one, [two, three])
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, expected[name])
    again = stirred(0)
    average_weights(again, [])
    assert torch.equal(score(again, texts(5), 0), score(stirred(0), texts(5), 0))
    with pytest.raises(ConfigError, match="same chat model"):
        average_weights(one, [stirred(0, replace(SHAPE, hidden=32))])


def test_fit_is_the_difference_of_two_log_probs():
    gpt = stirred(0).gpt
    prompts = [[2, 5, 40, 3, 6], [2, 5, 41, 42, 43, 3, 6], [2, 5, 44, 3, 6]]
    replies, blank = [[50, 51, 3], [52, 3], [53, 54, 55, 56]], [2, 5, 3, 6]

    def by_hand(head: list[int], reply: list[int]) -> float:
        logprobs_TV = gpt(torch.tensor([[*head, *reply]]))[0].log_softmax(-1).detach()
        places = range(len(head) - 1, len(head) + len(reply) - 1)
        return sum(float(logprobs_TV[at, token]) for at, token in zip(places, reply, strict=True))

    expected = [
        (by_hand(prompt, reply) - by_hand(blank, reply)) / len(reply)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    for batch in (1, 2, 32):
        found = question_fit(gpt, prompts, replies, blank, 0, batch)
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert question_fit(gpt, [blank], [[50, 3]], blank, 0).tolist() == pytest.approx([0], abs=1e-5)


# Learning


def toy(count: int, seed: int, length: int = 12) -> list[Group]:
    """The reply with more x wins: order and length say nothing."""
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for number in range(count):
        replies = []
        for share in torch.randperm(4, generator=draw)[:3].sort(descending=True).values.tolist():
            letters = ["x"] * (3 * share) + ["o"] * (length - 3 * share)
            order = torch.randperm(length, generator=draw).tolist()
            replies.append("".join(letters[place] for place in order))
        groups.append(group_of(f"p{seed}-{number}", *replies))
    return groups


def test_a_toy_preference_is_learned(tmp_path):
    torch.manual_seed(0)
    model = RewardModel(GPT(SHAPE))
    config = replace(PLAIN, epochs=6, batch=8, matrix_lr=0.02, vector_lr=3e-3, evaluate_every=40)
    unseen = toy(40, seed=1)
    before = accuracy(judge(unseen, score_groups(model, unseen, 0)))
    result = fit_reward(model.train(), toy(100, seed=0), config, tmp_path, pad=0, validation=unseen)
    assert result.finished and result.steps == 75
    after = accuracy(judge(unseen, score_groups(model.eval(), unseen, 0)))
    assert before < 0.9 and after > 0.95
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "accuracy" in row] == [40, 75]
    assert rows[-1]["accuracy"] == pytest.approx(after)
    assert rows[0]["loss"] > 0.5 > 0.3 > rows[-1]["loss"]


def test_stopped_and_resumed_is_the_same_to_the_last_bit(tmp_path):
    groups = toy(24, seed=0)
    config = replace(PLAIN, epochs=2, batch=4, matrix_lr=0.01)

    def train(folder: str, stop_at: int = 0, **keywords):
        model, steps = stirred().train(), []
        result = fit_reward(
            model,
            groups,
            config,
            tmp_path / folder,
            pad=0,
            on_step=lambda p: steps.append(p.step),
            should_stop=lambda: bool(stop_at) and steps[-1] == stop_at,
            **keywords,
        )
        return model.state_dict(), result, steps

    whole, unbroken, steps = train("whole")
    assert unbroken.steps == 12
    _, part, _ = train("parts", stop_at=5)
    assert (part.step, part.finished) == (5, False)
    again, resumed, rest = train("parts", resume=True)
    assert rest == steps[5:]
    assert (resumed.loss, resumed.tokens) == (unbroken.loss, unbroken.tokens)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(ConfigError, match="already holds a run"):
        train("parts")


def test_minutes_end_a_run_and_epochs_do_too(tmp_path):
    groups = toy(12, seed=0)
    config = replace(PLAIN, epochs=1, batch=2)
    long = fit_reward(stirred(), groups, config, tmp_path / "long", pad=0, minutes=60)
    assert (long.step, long.steps) == (6, 6), "never more than its epochs"
    many = replace(config, epochs=100_000)
    short = fit_reward(stirred(), groups, many, tmp_path / "short", pad=0, minutes=0.02)
    assert short.finished and 6 < short.steps < 600_000


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"replies": 1}, "replies is 1; a comparison needs at least 2"),
        ({"batch": 0}, "batch is 0"),
        ({"matrix_lr": -1.0}, "matrix_lr is -1"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_settings_without_sense(values, named):
    with pytest.raises(ConfigError, match=named):
        RewardConfig(**values)


# The command


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    tokenizer = Tokenizer(tokenizer_model())
    torch.manual_seed(0)
    shape = GPTConfig(
        width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=512
    )
    rest = {"tokenizer": tokenizer, "lineage": {"tokens": 7}, "metrics": {}}
    save_model("start.safetensors", GPT(shape), stage="sft", **rest)
    return tmp_path


def run(*words: str):
    return CliRunner().invoke(app, ["train", "reward", *words], env={"COLUMNS": "300"})


QUICK = ["--set", "sequence=128", "--set", "precision=fp32", "--set", "epochs=0.02"]


def test_the_command_trains_measures_and_writes(here):
    vote = {"prompt": [{"role": "user", "content": "hi"}], "a": "Hi!", "b": "no", "winner": "a"}
    Path("votes.jsonl").write_text(json.dumps(vote) + "\n", encoding="utf-8")
    result = run("--from", "start", "--votes", "votes.jsonl", "--samples", "16", *QUICK)
    assert result.exit_code == 0, result.output
    info = read_info("runs/reward/reward.safetensors")
    assert info.stage == "reward"
    assert info.lineage["half"] == "reward" and info.lineage["ancestors"] == [{"tokens": 7}]
    assert info.lineage["data"]["corpus"]["licence"] == "CC0-1.0"
    held_out = by_part(corpus_ranked())
    most = sum(len(g.pairs) for part in ("validation", "test") for g in held_out[part])
    metrics = info.metrics
    assert 0.8 * most < metrics["pairs"] <= most
    assert 0 <= metrics["accuracy"] <= 1 and metrics["baseline"] > 0.6
    assert sum(count for _, count, _ in metrics["by_flaw"].values()) > 200
    everyday = metrics["by_flaw_everyday"]
    assert sum(count for _, count, _ in everyday.values()) == metrics["by_source"]["everyday"][1]
    assert {"rude", "wrong", "ignores", "overclaim"} < everyday.keys()
    assert "\n  rude" in result.output
    assert set(metrics["by_source"]) >= {"corpus", "on-policy"}
    assert -1 <= metrics["length_correlation"] <= 1
    assert "our corpus" in result.output and "tinychat train ppo" in result.output
    model, _, _ = load_reward("runs/reward/reward.safetensors")
    assert model.deviation > 0
    assert Path("runs/reward/on_policy.jsonl").is_file()
    words = ["--from", "start", "--votes", "votes.jsonl", "--samples", "16"]
    assert "is finished already" in run("--resume", *words).output
    # It goes on as it began, or says that it won't.
    for words, sentence in (
        (["--judge"], "was begun without --judge; leave --judge out"),
        (["--votes", "more.jsonl"], "was begun with --votes votes.jsonl; leave --votes more.jsonl"),
        (["--samples", "0"], "was begun with --samples 16; leave --samples 0 out"),
        (["--data", "texts"], "was begun without --data (or TINYCHAT_DATA)"),
    ):
        refused = run("--resume", *words)
        assert refused.exit_code == 2
        assert sentence in " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused.stderr).split())
    # Minutes undo the number of readings for good.
    assert run("--resume", "--minutes", "0.001").exit_code == 0
    record = json.loads(Path("runs/reward/run.json").read_text())
    assert (record["set"], record["minutes"]) == (QUICK[1:4:2], 0.001)


def test_several_models_may_answer(here):
    shutil.copy("start.safetensors", "other.safetensors")
    words = ["--sampler", "start", "--sampler", "other", "--samples", "3"]
    result = run("--from", "start", *words, *QUICK)
    assert result.exit_code == 0, result.output
    lines = Path("runs/reward/on_policy.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = Counter(json.loads(line)["id"] for line in lines)
    assert prompts and set(prompts.values()) == {2}
    assert not Path("runs/reward/on_policy.tmp").exists()
    lineage = read_info("runs/reward/reward.safetensors").lineage
    assert lineage["sampler"] == "start.safetensors, other.safetensors"


def test_the_judge_learns_from_other_prompts(here):
    for name, words in (("one", []), ("two", ["--judge"])):
        result = run("--from", "start", "--samples", "0", "--run", name, *words, *QUICK)
        assert result.exit_code == 0, result.output
    infos = [read_info(f"runs/{name}/reward.safetensors") for name in ("one", "two")]
    assert [info.lineage["half"] for info in infos] == ["reward", "judge"]
    counts = [info.lineage["data"]["corpus"]["prompts"] for info in infos]
    assert sum(counts) <= len(by_part(corpus_ranked())["train"])
    assert min(counts) > 800
    # The next one may be averaged with the first, but never with the judge.
    refused = run("--from", "start", "--average", "runs/two/reward.safetensors", *QUICK)
    assert refused.exit_code == 2
    assert "the half of the prompts named 'judge'" in " ".join(refused.stderr.split())
    assert not Path("runs/reward").exists()
    other = ["--average", "runs/one/reward.safetensors", "--set", "surety=0"]
    refused = run("--from", "start", *other, *QUICK)
    assert refused.exit_code == 2 and "add --set surety=2" in " ".join(refused.stderr.split())
    more = ["--average", "runs/one/reward.safetensors", "--set", "seed=1", "--run", "mean"]
    result = run("--from", "start", "--samples", "0", *more, *QUICK)
    assert result.exit_code == 0, result.output
    info = read_info("runs/mean/reward.safetensors")
    assert info.lineage["averaged_with"] == [file_sha256("runs/one/reward.safetensors")]
    one, mean = (load_reward(f"runs/{name}/reward.safetensors")[0] for name in ("one", "mean"))
    state = load_state(Path("runs/mean"))
    assert state is not None
    alone = state[0]["model/head.weight"]
    torch.testing.assert_close(mean.head.weight, (one.head.weight + alone) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--from", "gone"], "No checkpoint 'gone'"),
        (["--samples", "-1"], "--samples is -1"),
        (["--exchanged", "-1"], "--exchanged is -1"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--votes", "gone.jsonl"], "gone.jsonl can't be read"),
        (["--set", "epoch=1"], "did you mean epochs?"),
        (["--set", "sequence=999"], "reads at most 512 tokens"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--resume"], "There is no run to resume in runs/reward"),
        (["--run", "../up"], "can't name a folder in runs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_change_nothing(here, words, sentence):
    if "--from" not in words and "--resume" not in words:
        words = ["--from", "start", *words]
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert sentence in text
    assert not Path("runs").exists()
