"""Fine-tuning: packing by hand, the same loss packed and apart, learning, stopping, resuming."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.data.batch import Batch
from tinychat.data.records import Dialogue, Message
from tinychat.dialogue import Rendered, render, render_prompt
from tinychat.generation import Sampling, generate
from tinychat.gpt import GPT, GPTConfig
from tinychat.pretraining import LossFunction
from tinychat.runtime.errors import ConfigError, DataError
from tinychat.sft import PackedConversations, SFTConfig, finetune, pack, packed_row

TOKENIZER = ByteTokenizer()
PLAIN = {"precision": "fp32", "compiled": False, "chain": 0}


def tiny(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    shape = GPTConfig(
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=16,
        hidden=64,
        vocab_size=TOKENIZER.vocab_size,
        context=64,
    )
    return GPT(shape)


def stirred() -> GPT:
    """A model whose blocks do something: fresh ones begin as "change nothing"."""
    model = tiny()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def talk(*texts: str, **keywords) -> Dialogue:
    roles = itertools.cycle(("user", "assistant"))
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
    return Dialogue(f"talk-{texts[0]}", "test", messages, **keywords)


def rendered(*texts: str, **keywords) -> Rendered:
    return render(talk(*texts, **keywords), TOKENIZER)


# Packing


def test_first_fit_by_hand():
    # 6 opens a row, 5 another; 4 fits into the first; 5 into the second; 1 opens a third.
    assert pack([6, 5, 4, 5, 1], 10, [0, 1, 2, 3, 4]) == [[0, 2], [1, 3], [4]]
    assert pack([6, 5, 4, 5, 1], 10, [4, 3, 2, 1, 0]) == [[4, 3, 2], [1], [0]]
    assert pack([], 10, []) == []


def test_only_the_newest_rows_stay_open():
    assert pack([6, 7, 8, 4], 10, [0, 1, 2, 3], open_rows=3) == [[0, 3], [1], [2]]
    assert pack([6, 7, 8, 4], 10, [0, 1, 2, 3], open_rows=2) == [[0], [1], [2], [3]]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 20), st.randoms())
def test_every_conversation_once_and_no_row_too_long(lengths, room, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(lengths, room, order)
    assert sorted(number for row in rows for number in row) == sorted(order)
    for row in rows:  # one that is longer than the room has a row for itself, and is cut
        assert sum(min(lengths[number], room) for number in row) <= room


def test_packed_row_by_hand():
    first = Rendered([2, 5, 20, 3, 6, 21, 3], [False, False, False, False, False, True, True])
    second = Rendered([2, 6, 22], [False, False, True])
    inputs, targets, mask, segments = packed_row([first, second], 10, pad=0).tolist()
    assert inputs == [2, 5, 20, 3, 6, 21, 2, 6, 0, 0]
    assert targets == [5, 20, 3, 6, 21, 3, 6, 22, 0, 0]
    assert mask == [0, 0, 0, 0, 1, 1, 0, 1, 0, 0]
    assert segments == [1, 1, 1, 1, 1, 1, 2, 2, 0, 0]
    # The last token of the first conversation (3) never predicts the first of the second (2).
    assert (3, 2) not in zip(inputs, targets, strict=True)


def test_a_conversation_that_goes_on_is_the_chat_written_as_one():
    first, second = rendered("hi", "hello"), rendered("1+1?", "2", "sure?", "yes")
    whole = rendered("hi", "hello", "1+1?", "2", "sure?", "yes")
    size = len(whole.tokens) - 1
    row = packed_row([first, second], 80, pad=0, goes_on=[True, True]).tolist()
    inputs, targets, mask, segments = (part[:size] for part in row)
    assert inputs == whole.tokens[:-1]
    assert segments == [1] * size and row[3][size:] == [0] * (80 - size)
    assert mask == [int(learned) for learned in whole.loss_mask[1:]]
    # No one is asked for a user's turn: between the two, a target may say anything unlearned.
    assert [t for t, m in zip(targets, mask, strict=True) if m] == [
        t for t, m in zip(whole.tokens, whole.loss_mask, strict=True) if m
    ]
    third = packed_row([first, second, first], 80, pad=0, goes_on=[False, True, False])[3]
    assert sorted(set(third)) == [0, 1, 2]


def test_chained_loss_is_the_loss_of_one_chat():
    talks = [rendered("hi", "hello"), rendered("1+1?", "2")]
    loss = LossFunction(stirred(), dtype=torch.float32, compiled=False)
    chained = SFTConfig(batch=1, sequence=64, **PLAIN | {"chain": 1})
    stream = PackedConversations(talks, chained, pad=0)
    first, second = (["hi", "hello"], ["1+1?", "2"])
    if stream.rows(0) == [[1, 0]]:
        first, second = second, first
    one = rendered(*first, *second)
    mask = torch.tensor([one.loss_mask[1:]]).long()
    tokens = torch.tensor([one.tokens])
    whole = loss(Batch(tokens[:, :-1], tokens[:, 1:], mask)).item()
    assert loss(next(stream.batches())).item() == pytest.approx(whole, abs=1e-5)


def test_a_system_message_never_stands_within_a_chat():
    brief = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b")]
    talks = [render(brief, TOKENIZER), rendered("c", "d"), rendered("e", "f")]
    assert talks[0].system and not talks[1].system
    stream = PackedConversations(talks, SFTConfig(batch=1, sequence=80, chain=1), pad=0)
    for order in itertools.permutations(range(3)):
        inputs, segments = stream._row(order, 1)[[0, 3]]
        for token, before in itertools.pairwise(inputs.tolist()):
            if before == TOKENIZER.system_id:
                assert token == TOKENIZER.bos_id
        assert segments.max() == (1 if order[0] == 0 else 2), "the two others go on in a chat"


def test_dice_chain_the_share_that_is_asked_for(many):
    stream = PackedConversations(many, SFTConfig(batch=1, sequence=2000, chain=0.6), pad=0)
    (row,) = stream.rows(0)
    assert len(row) == 40
    begun = [int(stream._row(stream.rows(epoch)[0], 0.6)[3].max()) for epoch in range(50)]
    # The first of a row always begins a chat; of the other 39, four in ten do.
    assert np.mean(begun) == pytest.approx(1 + 39 * 0.4, abs=1.5)
    assert begun[7] == int(stream._row(stream.rows(7)[0], 0.6)[3].max()), "the same dice again"
    never = PackedConversations(many, SFTConfig(batch=1, sequence=2000, chain=0), pad=0)
    assert next(never.batches()).segments_BT.max() == 40
    always = PackedConversations(many, SFTConfig(batch=1, sequence=2000, chain=1), pad=0)
    assert next(always.batches()).segments_BT.max() == 1


def test_what_is_measured_is_every_conversation_by_itself(many):
    stream = PackedConversations(many, SFTConfig(batch=3, sequence=40, chain=1), pad=0)
    batches = list(stream.once())
    assert {tuple(batch.inputs_BT.shape) for batch in batches} == {(3, 40)}
    begun = sum(int(row.max()) for batch in batches for row in batch.segments_BT)
    assert begun == 40, "no chats, though training would make some"
    assert sum(int(batch.mask_BT.sum()) for batch in batches) == sum(
        sum(one.loss_mask) for one in many
    )


def test_a_row_is_used_to_the_last_place():
    exact = Rendered([2, 5, 6, 9, 3], [False, False, False, True, True])
    inputs, targets, mask, _ = packed_row([exact], 4, pad=0).tolist()
    assert (inputs, targets, mask) == ([2, 5, 6, 9], [5, 6, 9, 3], [0, 0, 1, 1])
    inputs, targets, mask, _ = packed_row([exact], 3, pad=0).tolist()  # too long: cut
    assert (inputs, targets, mask) == ([2, 5, 6], [5, 6, 9], [0, 0, 1])
    assert packed_row([], 3, pad=7).tolist() == [[7] * 3, [7] * 3, [0] * 3, [0] * 3]


def test_packed_loss_is_the_loss_of_the_conversations_apart():
    talks = [rendered("hi", "hello"), rendered("1+1?", "2", "sure?", "yes"), rendered("a", "b")]
    model = stirred()
    loss = LossFunction(model, dtype=torch.float32, compiled=False)
    total, count = 0.0, 0
    for one in talks:
        tokens = torch.tensor([one.tokens])
        mask = torch.tensor([one.loss_mask[1:]]).long()
        mean = loss(Batch(tokens[:, :-1], tokens[:, 1:], mask)).detach()
        total += float(mean) * int(mask.sum())
        count += int(mask.sum())
    stream = PackedConversations(talks, SFTConfig(batch=1, sequence=64, **PLAIN), pad=0)
    assert len(stream.rows(0)) == 1, "the three share a row"
    assert loss(next(stream.batches())).item() == pytest.approx(total / count, abs=1e-5)


def test_padding_rows_change_nothing():
    stream = PackedConversations(
        [rendered("hi", "hello")], SFTConfig(batch=1, sequence=32, **PLAIN), pad=0
    )
    loss = LossFunction(stirred(), dtype=torch.float32, compiled=False)
    alone = loss(stream.batch([[0]])).item()
    assert loss(stream.batch([[0], []])).item() == pytest.approx(alone, abs=1e-6)


# The stream


@pytest.fixture
def many() -> list[Rendered]:
    return [rendered("x" * (1 + n % 7), "y" * (1 + n % 5)) for n in range(40)]


def first(stream: PackedConversations, count: int, start: int = 0) -> list[np.ndarray]:
    batches = itertools.islice(stream.batches(start), count)
    return [
        torch.stack([b.inputs_BT, b.targets_BT, b.mask_BT, b.segments_BT]).numpy() for b in batches
    ]


def test_epochs_have_orders_of_their_own(many):
    stream = PackedConversations(many, SFTConfig(batch=2, sequence=40), pad=0)
    for epoch in range(3):
        assert sorted(n for row in stream.rows(epoch) for n in row) == list(range(40))
    assert stream.rows(0) != stream.rows(1)
    again = PackedConversations(many, SFTConfig(batch=2, sequence=40), pad=0)
    assert stream.rows(1) == again.rows(1)
    other = PackedConversations(many, SFTConfig(batch=2, sequence=40, seed=1), pad=0)
    assert stream.rows(0) != other.rows(0)


def test_starting_late_is_skipping(many):
    stream = PackedConversations(many, SFTConfig(batch=3, sequence=40), pad=0)
    whole = first(stream, 12)
    for start in (0, 1, 5, 11):
        np.testing.assert_array_equal(
            np.stack(first(stream, 12 - start, start)), np.stack(whole[start:])
        )


def test_a_batch_larger_than_the_corpus_takes_several_epochs():
    stream = PackedConversations([rendered("a", "b")], SFTConfig(batch=4, sequence=20), pad=0)
    (batch,) = first(stream, 1)
    assert batch.shape == (4, 4, 20)
    assert (batch[:, 0] == batch[:, 3]).all()


def test_steps_follow_epochs(many):
    config = SFTConfig(epochs=2, batch=2, sequence=40)
    stream = PackedConversations(many, config, pad=0)
    assert stream.steps() == round(2 * len(stream.rows(0)) / 2)
    tiny_share = PackedConversations(many, SFTConfig(epochs=1e-6, batch=2, sequence=40), pad=0)
    assert tiny_share.steps() == 1
    halves = PackedConversations(many, SFTConfig(epochs=2, batch=1, sequence=40), pad=0)
    assert halves.steps(2) == stream.steps() == halves.steps() // 2


def test_processes_share_a_step(many):
    """Two that read a batch of 2 read what one reads in a batch of 4, each another half."""
    whole = PackedConversations(many, SFTConfig(batch=4, sequence=40), pad=0)
    half = PackedConversations(many, SFTConfig(batch=2, sequence=40), pad=0)
    for start in (0, 3):
        together = itertools.islice(whole.batches(start), 9)
        parts = [itertools.islice(half.batches(start, rank=r, world=2), 9) for r in (0, 1)]
        for batch, one, two in zip(together, *parts, strict=True):
            np.testing.assert_array_equal(batch.inputs_BT[0::2], one.inputs_BT)
            np.testing.assert_array_equal(batch.inputs_BT[1::2], two.inputs_BT)


def test_conversations_without_a_reply_are_dropped():
    silent = Rendered([2, 5, 9, 3], [False] * 4)
    late = Rendered([2, 5, *[9] * 30, 3, 6, 10, 3], [False] * 34 + [True, True])
    stream = PackedConversations(
        [silent, rendered("a", "b"), late], SFTConfig(batch=1, sequence=20), pad=0
    )
    assert len(stream.examples) == 1, "the reply of the third is beyond its row"
    with pytest.raises(DataError, match="no conversation with a reply"):
        PackedConversations([silent, late], SFTConfig(sequence=20), pad=0)
    with pytest.raises(DataError):
        PackedConversations([], SFTConfig(), pad=0)


def test_train_on_last_reaches_the_batch():
    stream = PackedConversations(
        [rendered("2+2?", "5", "no", "Sorry, 4.", train_on="last")],
        SFTConfig(batch=1, sequence=40),
        pad=0,
    )
    batch = next(stream.batches())
    learned = batch.targets_BT[batch.mask_BT.bool()].tolist()
    assert learned == [*TOKENIZER.encode("Sorry, 4."), TOKENIZER.end_id]


# Settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"batch": 0}, "batch is 0"),
        ({"sequence": -1}, "sequence is -1"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"matrix_lr": -1.0}, "matrix_lr is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"keep": 1.0}, "keep is 1"),
        ({"chain": 1.1}, "chain is 1.1"),
        ({"chain": -0.1}, "chain is -0.1"),
        ({"keep": -0.1}, "keep is -0.1"),
        ({"warmup": 2.0}, "warmup is 2"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_settings_without_sense(values, named):
    with pytest.raises(ConfigError, match=named):
        SFTConfig(**values)


def test_bits_per_byte_need_the_bytes(tmp_path):
    with pytest.raises(ValueError, match="give token_bytes_V"):
        talks, config = [rendered("a", "b")], SFTConfig(sequence=64)
        finetune(tiny(), talks, config, tmp_path, pad=0, validation=lambda: [])
    assert not any(tmp_path.iterdir())


def test_rows_longer_than_the_model_reads(tmp_path):
    with pytest.raises(ConfigError, match="sequence is 65; this model reads at most 64"):
        finetune(tiny(), [rendered("a", "b")], SFTConfig(sequence=65), tmp_path / "run", pad=0)
    assert not (tmp_path / "run").exists()


# Learning

QUICK = SFTConfig(
    epochs=60, batch=1, sequence=48, matrix_lr=0.02, vector_lr=5e-3, decay=0.3, **PLAIN
)


def answer(model: GPT, question: str) -> str:
    ids = render_prompt([Message("user", question)], TOKENIZER, context=64, reserve=24)
    greedy = Sampling(temperature=0, max_tokens=24)
    return TOKENIZER.decode(generate(model.eval(), ids, greedy, stop={TOKENIZER.end_id}))


def test_a_tiny_model_learns_two_answers_by_heart(tmp_path):
    model = tiny()
    talks = [rendered("hi", "Hello there!"), rendered("bye", "See you.")]
    losses = []
    result = finetune(
        model, talks, QUICK, tmp_path / "run", pad=0, on_step=lambda p: losses.append(p.loss)
    )
    assert result.finished and result.steps == 60 == len(losses)
    assert losses[0] == pytest.approx(np.log(TOKENIZER.vocab_size), abs=0.2)
    assert losses[-1] < 0.05
    assert answer(model, "hi") == "Hello there!"
    assert answer(model, "bye") == "See you."


def test_a_finished_run_goes_part_of_the_way_back_and_its_state_does_not(tmp_path):
    talks = [rendered("hi", "Hello there!"), rendered("bye", "See you.")]
    base, far, near = tiny(), tiny(), tiny()
    finetune(far, talks, replace(QUICK, epochs=8), tmp_path / "far", pad=0)
    config = replace(QUICK, epochs=8, keep=0.25)
    stop = iter([False] * 5 + [True] * 9)
    half = finetune(near, talks, config, tmp_path / "near", pad=0, should_stop=lambda: next(stop))
    assert not half.finished
    near = tiny()
    finetune(near, talks, config, tmp_path / "near", pad=0, resume=True)
    for one, two, mean in zip(*(m.parameters() for m in (base, far, near)), strict=True):
        torch.testing.assert_close(mean, 0.25 * one + 0.75 * two, atol=1e-6, rtol=1e-5)
    again = tiny()  # the state holds the weights that training reached, not the mean
    finetune(again, talks, replace(config, keep=0.0), tmp_path / "near", pad=0, resume=True)
    for two, same in zip(far.parameters(), again.parameters(), strict=True):
        assert torch.equal(two, same)


def test_stopped_and_resumed_is_the_same_to_the_last_bit(tmp_path, many):
    config = SFTConfig(epochs=4, batch=2, sequence=40, matrix_lr=0.01, **PLAIN)

    def train(folder: str, **keywords):
        model = tiny()
        steps: list[int] = []
        result = finetune(
            model,
            many,
            config,
            tmp_path / folder,
            pad=0,
            on_step=lambda p: steps.append(p.step),
            should_stop=lambda: bool(stop_at) and steps[-1] == stop_at,
            **keywords,
        )
        return model.state_dict(), result, steps

    stop_at = 0
    whole, unbroken, steps = train("whole")
    stop_at = 5
    _, part, _ = train("parts")
    assert (part.step, part.finished) == (5, False)
    stop_at = 0
    again, resumed, rest = train("parts", resume=True)
    assert rest == steps[5:]
    assert (resumed.loss, resumed.tokens) == (unbroken.loss, unbroken.tokens)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_by_minutes_keeps_its_steps_when_resumed(tmp_path, many):
    config = SFTConfig(epochs=1000, batch=1, sequence=40, **PLAIN)
    seen: list[int] = []
    begun = finetune(
        tiny(),
        many,
        config,
        tmp_path,
        pad=0,
        minutes=0.01,
        on_step=lambda p: seen.append(p.step),
        should_stop=lambda: seen[-1] == 8,
    )
    if begun.finished:
        pytest.skip("this machine is too busy for eight steps in the time")
    later: list[int] = []
    resumed = finetune(
        tiny(),
        many,
        config,
        tmp_path,
        pad=0,
        resume=True,
        on_step=lambda p: later.append(p.step),
        should_stop=lambda: later[-1] == 12,
    )
    assert later[0] == begun.step + 1
    assert resumed.steps == begun.steps
