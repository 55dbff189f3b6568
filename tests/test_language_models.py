"""Chapter 02: counts and smoothing by hand, the LSTM against torch's, bits per byte exactly."""

import json
import math

import pytest
import torch
from torch import nn

from tinychat.data.corpus import explanations, stories
from tinychat.data.split import split_of
from tinychat.language_models import (
    KneserNey,
    LSTMModel,
    NGram,
    add_row,
    bits_per_byte,
    documents,
    held_out_text,
    lstm_step,
    train_lstm,
    write,
)


def test_held_out_text_is_the_test_part():
    ids = [d.id for d in stories() + explanations() if split_of(d.id) == "test"]
    assert len(held_out_text()) == len(ids) > 10
    parts = [documents(split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(stories() + explanations())
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert all(isinstance(text, bytes) for text in held_out_text())


def test_bits_per_byte_by_hand():
    texts = [b"ab", b"", "é".encode()]
    assert bits_per_byte(lambda text: len(text) * math.log(1 / 256), texts) == pytest.approx(8)
    # A fair coin for each document, whatever its length: 3 bits over 4 bytes.
    assert bits_per_byte(lambda text: math.log(0.5), texts) == pytest.approx(0.75)


def test_add_k_by_hand():
    model = NGram([b"abab", b"ac"], 2, k=0.5)
    assert model.probability(b"a", ord("b")) == (2 + 0.5) / (3 + 128)
    assert model.probability(b"a", ord("c")) == (1 + 0.5) / (3 + 128)
    assert model.probability(b"a", ord("z")) == 0.5 / (3 + 128)
    assert model.probability(b"q", ord("z")) == pytest.approx(1 / 256)
    assert model.probability(b"\0", ord("a")) == (2 + 0.5) / (2 + 128), "both texts begin with a"
    wanted = math.log(2.5 / 130) + math.log(1.5 / 131)
    assert model.log_probability(b"ac") == pytest.approx(wanted)


def test_unigram_needs_no_context():
    model = NGram([b"aab"], 1, k=1)
    assert model.probability(b"", ord("a")) == 3 / 259
    assert float(model.next_byte(b"anything")[ord("b")]) == pytest.approx(2 / 259)


def test_kneser_ney_by_hand():
    model = KneserNey([b"abab", b"cb"], 2)
    # Level 1: "b" stood after a and c, "a" after the beginning and b, "c" after the beginning.
    level, totals, discount = model.levels[0]
    assert level == {b"": {ord("b"): 2, ord("a"): 2, ord("c"): 1}} and totals == {b"": 5}
    assert discount == 1 / (1 + 2 * 2)
    # Level 2: \0a, ba, \0c, cb came once, ab twice.
    assert model.levels[1][2] == pytest.approx(4 / (4 + 2))
    low_b = (2 - 0.2 + 0.2 * 3 / 256) / 5
    low_z = 0.2 * 3 / 256 / 5
    d = 4 / 6
    assert model.probability(b"a", ord("b")) == pytest.approx((2 - d + d * low_b) / 2)
    assert model.probability(b"a", ord("z")) == pytest.approx(d * low_z / 2)
    assert model.probability(b"q", ord("b")) == pytest.approx(low_b), "never seen: ask the shorter"


@pytest.mark.parametrize("kind", [NGram, KneserNey])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_distributions_sum_to_one(kind, order):
    model = kind(documents("validation")[:3], order)
    for start in (b"", b"t", b"the sto", b"\xff\xfe\xfd\xfc\xfb"):
        shares = model.next_byte(start)
        assert shares.shape == (256,) and (shares > 0).all()
        assert float(shares.double().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [NGram, KneserNey])
def test_text_and_next_byte_agree(kind):
    model = kind(documents("validation")[:3], 4)
    text = b"He was zzz"
    step_by_step = sum(float(model.next_byte(text[:i])[b].log()) for i, b in enumerate(text))
    assert model.log_probability(text) == pytest.approx(step_by_step, rel=1e-5)


def test_kneser_ney_beats_add_k_on_unseen_text():
    train, unseen = documents("train")[:40], documents("validation")
    for order in (3, 5):
        kneser_ney = bits_per_byte(KneserNey(train, order).log_probability, unseen)
        assert kneser_ney < bits_per_byte(NGram(train, order).log_probability, unseen) < 8


@pytest.mark.parametrize(("order", "k"), [(0, 1), (2, 0), (2, -1)])
def test_senseless_orders(order, k):
    with pytest.raises(ValueError, match=f"order {order} and k {k}"):
        NGram([b"a"], order, k)


def test_write_draws_from_the_guess():
    def always(text):
        shares = torch.zeros(256)
        shares[b"ab"[len(text) % 2]] = 1
        return shares

    assert write(always, b"ab", 4, torch.Generator()) == "ababab"
    model = NGram([b"hello world"], 2)
    told = [write(model.next_byte, b"h", 20, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert told[0] == told[1] != told[2]


def test_lstm_step_by_hand():
    # All sums are zero: every gate is half open and the note is 0, so half of the notebook stays.
    zero = torch.zeros(1, 1)
    h, c = lstm_step(zero, zero, torch.ones(1, 1), torch.zeros(4, 1), torch.zeros(4, 1), zero[0])
    assert float(c) == 0.5 and float(h) == pytest.approx(0.5 * math.tanh(0.5))


def test_lstm_step_equals_torch():
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 5)
    x, h, c = torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 5)
    ours = lstm_step(x, h, c, cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh)
    for mine, theirs in zip(ours, cell(x, (h, c)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_lstm_model_reads_byte_by_byte_as_at_once():
    torch.manual_seed(0)
    model, text = LSTMModel(8), b"abc abc"
    step_by_step = sum(float(model.next_byte(text[:i])[b].log()) for i, b in enumerate(text))
    assert model.log_probability(text) == pytest.approx(step_by_step, rel=1e-4)
    assert float(model.next_byte(b"").sum()) == pytest.approx(1, abs=1e-5)
    # The carried state is worth the bytes that it has read.
    row = torch.tensor([list(text)])
    whole, _ = model(row)
    first, state = model(row[:, :3])
    second, _ = model(row[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


def test_lstm_learns_a_rhythm():
    torch.manual_seed(0)
    model = LSTMModel(16, embedding=8)
    texts = [b"abcd" * 20] * 20
    before = bits_per_byte(model.log_probability, texts[:1])
    losses = train_lstm(model, texts, epochs=12, rate=2e-2, strips=4, stretch=16)
    assert losses[-1] < losses[0]
    assert bits_per_byte(model.log_probability, texts[:1]) < 1 < 7 < before
    assert chr(int(model.next_byte(b"abcdabc").argmax())) == "d"


def test_too_little_text_for_the_lstm():
    with pytest.raises(ValueError, match="give at least 1024 bytes"):
        train_lstm(LSTMModel(4), [b"short"], epochs=1)


def test_rows_are_kept_and_sorted(tmp_path):
    path = tmp_path / "new" / "table.json"
    assert add_row("small", 3.0, path) == {"small": 3.0}
    assert list(add_row("nothing", 8.0, path)) == ["nothing", "small"]
    assert add_row("small", 2.5, path) == {"nothing": 8.0, "small": 2.5}
    assert json.loads(path.read_text()) == {"nothing": 8.0, "small": 2.5}
