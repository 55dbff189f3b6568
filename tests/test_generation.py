"""Chapter 08: filters by hand, the KV cache against none, text that streams whole characters."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import ByteTokenizer, FakeCache, Fork, ScriptedGPT, UniformGPT
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.data import tokenizer_model
from tinychat.generation import (
    Sampling,
    TextStream,
    filter_logits,
    generate,
    generate_batch,
    keep_likely,
    keep_top,
    make_generator,
    next_logits,
    penalize,
    rewind,
    sample,
    sentence_ends,
    stop_ids,
    stream,
)
from tinychat.gpt import GPT, GPTConfig, KVCache
from tinychat.runtime.errors import ConfigError
from tinychat.tokenizer import Tokenizer

TOKENIZER = ByteTokenizer()
OFF = dict(temperature=1.0, top_p=1.0)
GREEDY = Sampling(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """A small real GPT with weights large enough that its replies vary."""
    torch.manual_seed(3)
    shape = GPTConfig(
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=16,
        hidden=64,
        vocab_size=263,
        context=96,
    )
    model = GPT(shape).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def kept(logits_BV: torch.Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero()[:, 0].tolist() for row in logits_BV]


# ------------------------------------------------------------------ filters, worked out by hand

# Token:            0     1     2      3     4
SHARES = torch.tensor([[0.25, 0.5, 0.0625, 0.125, 0.0625]])


def test_top_k_keeps_exactly_k_also_when_scores_tie():
    assert kept(keep_top(SHARES.log(), 2, 1.0)) == [[0, 1]]
    assert [len(row) for row in kept(keep_top(SHARES.log(), 4, 1.0))] == [4]
    assert kept(keep_top(SHARES.log(), 99, 1.0)) == [[0, 1, 2, 3, 4]]
    assert kept(keep_top(SHARES.log(), 0, 1.0)) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.01, [1]), (0.49, [1]), (0.51, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 3])],
)
def test_top_p_keeps_the_smallest_set_that_holds_enough(top_p, expected):
    assert kept(keep_top(SHARES.log(), 0, top_p)) == [expected]


def test_top_p_counts_within_what_top_k_left():
    # After top-k 2 the shares are 1/3 and 2/3: the best alone holds 0.6.
    assert kept(keep_top(SHARES.log(), 2, 0.6)) == [[1]]
    assert kept(keep_top(SHARES.log(), 2, 0.7)) == [[0, 1]]


def test_min_p_is_a_share_of_the_best():
    assert kept(keep_likely(SHARES.log(), 0.3)) == [[0, 1]]
    assert kept(keep_likely(SHARES.log(), 0.2)) == [[0, 1, 3]]
    assert kept(keep_likely(SHARES.log(), 1.0)) == [[1]]


def test_temperature_is_a_power_of_the_shares():
    found = filter_logits(SHARES.log(), Sampling(temperature=0.5, top_p=1.0)).softmax(-1)
    squares = SHARES**2
    torch.testing.assert_close(found, squares / squares.sum())


def test_a_tiny_temperature_is_nearly_greedy_and_never_nan():
    found = filter_logits(torch.tensor([[900.0, 1000.0]]), Sampling(temperature=1e-30, top_p=1.0))
    assert found.softmax(-1).tolist() == [[0.0, 1.0]]


def test_temperature_zero_leaves_the_best_token_alone():
    assert kept(filter_logits(SHARES.log(), Sampling(temperature=0))) == [[1]]
    assert sample(SHARES.log(), Sampling(temperature=0)).tolist() == [1]


def test_the_repetition_penalty_lowers_both_signs_and_counts_once():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    found = penalize(logits, torch.tensor([[0, 1, 0, 0]]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0]]
    assert logits.tolist() == [[2.0, -2.0, 1.0]], "the model's own scores stay as they are"


def test_the_order_is_penalty_temperature_top_k_top_p_min_p():
    logits = SHARES.log()
    # The penalty (log 0.5 × 2 = log 0.25) makes tokens 1 and 0 equal before the temperature squares
    # the shares: 1/16, 1/16, 1/256, 1/64, 1/256. Top-k 3 leaves 0, 1, 3 with 4/9, 4/9, 1/9.
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.95, min_p=0.1, repetition_penalty=2.0)
    found = filter_logits(logits, sampling, torch.tensor([[1]])).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[4 / 9, 4 / 9, 0.0, 1 / 9, 0.0]]))
    # min-p comes last and compares with the best: 1/9 is a quarter of 4/9.
    sampling = Sampling(temperature=0.5, top_k=3, top_p=1.0, min_p=0.3, repetition_penalty=2.0)
    found = filter_logits(logits, sampling, torch.tensor([[1]])).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]))


def reference_top_p(row: torch.Tensor, top_p: float) -> set[int]:
    """The definition, written down plainly: take the best until there is enough."""
    shares = row.double().softmax(-1)
    chosen, total = set(), 0.0
    for token in shares.argsort(descending=True).tolist():
        chosen.add(token)
        total += float(shares[token])
        if total >= top_p:
            break
    return chosen


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), top_p=st.floats(0.05, 0.99), spread=st.sampled_from([0.1, 1.0, 6.0])
)
def test_the_shortlist_changes_nothing(seed, top_p, spread):
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed)) * spread
    for row, ids in zip(logits, kept(keep_top(logits, 0, top_p)), strict=True):
        expected = reference_top_p(row, top_p)
        # Rounding in float32 may move the border by one token.
        assert len(expected ^ set(ids)) <= 1


def test_samples_follow_the_distribution():
    generator = make_generator(0, torch.device("cpu"))
    drawn = sample(SHARES.log().expand(20_000, 5), Sampling(**OFF), generator=generator)
    found = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(found, SHARES[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(min_p=2),
        dict(repetition_penalty=0),
        dict(drafts=0),
        dict(drafts=65),
        dict(max_tokens=0),
        dict(seed=-1),
    ],
)
def test_settings_without_sense_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


# ------------------------------------------------------------------ generate


def uncached(model: GPT, ids: list[int], count: int) -> list[int]:
    """Greedy decoding that reads everything again for every token."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_cached_greedy_is_uncached_greedy(gpt):
    prompt = TOKENIZER.encode("once upon")
    found = list(generate(gpt, prompt, GREEDY))
    assert found == uncached(gpt, prompt, 40)
    assert len(set(found)) > 5, "a reply of one token would prove nothing"


def test_the_cache_of_one_turn_serves_the_next(gpt):
    prompt = TOKENIZER.encode("hello")
    cache = gpt.new_cache(1, 96)
    reply = list(generate(gpt, prompt, Sampling(temperature=0, max_tokens=10), cache=cache))
    assert cache.length == len(prompt) + 9, "the last token is chosen but not yet read"
    longer = prompt + reply + TOKENIZER.encode(" and?")
    assert rewind(cache, prompt + reply, longer) == len(prompt) + 9
    again = list(generate(gpt, longer, Sampling(temperature=0, max_tokens=10), cache=cache))
    assert again == uncached(gpt, longer, 10)
    # Another beginning: only what agrees is kept.
    other = prompt[:3] + TOKENIZER.encode("!!")
    assert rewind(cache, longer + again, other) == 3
    assert list(generate(gpt, other, Sampling(temperature=0, max_tokens=5), cache=cache)) == (
        uncached(gpt, other, 5)
    )


def test_only_unread_tokens_are_fed():
    model = ScriptedGPT(["abc"])
    cache = FakeCache(1, 64)
    prompt = [TOKENIZER.user_id, *TOKENIZER.encode("hey"), TOKENIZER.assistant_id]
    list(generate(model, prompt, GREEDY, stop={3}, cache=cache))
    assert cache.fed == [5, 1, 1, 1]
    list(generate(model, prompt, GREEDY, stop={3}, cache=cache))
    assert cache.fed[4:] == [1, 1, 1, 1], "the prompt was held; its last token is read again"


def test_a_stop_token_ends_and_is_not_yielded():
    model = ScriptedGPT(["hi there"])
    prompt = [TOKENIZER.assistant_id]
    assert TOKENIZER.decode(generate(model, prompt, GREEDY, stop={TOKENIZER.end_id})) == "hi there"
    stop = {TOKENIZER.encode("t")[0]}
    assert TOKENIZER.decode(generate(model, prompt, GREEDY, stop=stop)) == "hi "


def test_the_reply_ends_where_the_context_does():
    model = UniformGPT(context=20)
    assert len(list(generate(model, [9] * 15, Sampling(max_tokens=100)))) == 5
    assert len(list(generate(model, [9] * 15, Sampling(max_tokens=3)))) == 3
    with pytest.raises(ConfigError, match="20 tokens long and the model reads 20"):
        generate(model, [9] * 20, Sampling())
    with pytest.raises(ConfigError, match="empty"):
        generate(model, [], Sampling())


def test_the_same_seed_gives_the_same_reply(gpt):
    prompt = TOKENIZER.encode("tell me")
    seeded = Sampling(seed=5, max_tokens=20)
    assert list(generate(gpt, prompt, seeded)) == list(generate(gpt, prompt, seeded))
    others = [list(generate(gpt, prompt, Sampling(seed=s, max_tokens=20))) for s in (6, 7, 8)]
    assert any(other != list(generate(gpt, prompt, seeded)) for other in others)
    fresh = [list(generate(gpt, prompt, Sampling(max_tokens=20))) for _ in range(5)]
    assert any(one != fresh[0] for one in fresh)


def test_generating_leaves_the_global_dice_alone(gpt):
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    list(generate(gpt, [9, 10], Sampling(max_tokens=5)))
    assert torch.rand(3).tolist() == expected


def test_between_tokens_gradients_work_as_ever(gpt):
    reply = generate(gpt, [9, 10], Sampling(max_tokens=5))
    next(reply)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_strong_penalty_stops_loops():
    class Loop(UniformGPT):
        def scores(self, ids):
            logits = torch.zeros(self.config.vocab_size)
            logits[9], logits[10] = 3.0, 2.0
            return logits

    sampling = dict(temperature=0, max_tokens=4)
    assert list(generate(Loop(), [8], Sampling(**sampling))) == [9, 9, 9, 9]
    found = list(generate(Loop(), [8], Sampling(**sampling, repetition_penalty=2.0)))
    assert found == [9, 10, 9, 9], "3, then 2 against 1.5, then 1.5 against 1"


# ------------------------------------------------------------------ drafts

A, B, C, D, END, ASK = 20, 21, 22, 23, TOKENIZER.end_id, [TOKENIZER.assistant_id]
MANY = Sampling(temperature=1, top_p=1, drafts=64, max_tokens=6, seed=1)


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        # Greedy takes A, and then anything goes: (ln 0.6 + ln 0.1 + 0) / 3 = -0.94 a token.
        # B is the less likely start, and sure of its end: (ln 0.4 + 0) / 2 = -0.46.
        ({A: 0.6, B: 0.4}, {A: {40 + n: 0.1 for n in range(10)}}, [B]),
        # A reply that never ends is surer of itself, and one that says nothing is surest of all.
        ({A: 0.5, B: 0.5}, {A: {A: 1.0}, B: {B: 0.3, END: 0.7}}, [B]),
        ({END: 0.9, B: 0.1}, {}, [B]),
        # Where nothing else is there, it is said all the same.
        ({A: 1.0}, {A: {A: 1.0}}, [A] * 6),
        ({END: 1.0}, {}, []),
    ],
)
def test_the_surest_draft_is_said(first, then, said):
    model = Fork(first, then)
    assert list(generate(model, ASK, MANY, stop={END})) == said
    assert generate_batch(model, [ASK, ASK * 3, ASK], MANY, stop={END}) == [said] * 3
    ended = said != [A] * 6
    assert list(generate(model, ASK, MANY, stop={END}, keep_stop=True)) == said + [END] * ended
    assert generate_batch(model, [ASK], MANY, stop={END}, keep_stop=True) == [said + [END] * ended]


@pytest.mark.parametrize("pauses", [(), (C, D)])
def test_drafts_are_compared_at_the_end_of_each_sentence(pauses):
    # "A C B D": of the whole drafts, A with its unsure second sentence loses to B and its sure one,
    # ln 0.45 / 3 = -0.27 against (ln 0.55 + ln 0.1) / 4 = -0.73. Of the first sentences alone,
    # A C wins with ln 0.55 / 2 = -0.30 against ln 0.45 / 2 = -0.40.
    unsure = {40 + n: 0.1 for n in range(10)}
    model = Fork({A: 0.55, B: 0.45}, {A: {C: 1.0}, B: {D: 1.0}, C: unsure})
    said = list(generate(model, ASK, MANY, stop={END}, pauses=pauses))
    assert said[:2] == ([A, C] if pauses else [B, D])
    assert generate_batch(model, [ASK], MANY, stop={END}, pauses=pauses)[0][:2] == said[:2]


def test_how_often_a_reply_goes_on_is_drawn_and_not_chosen():
    # After a sentence three in ten replies end. An end is surer than any sentence that could
    # follow (ln 0.3 = -1.20 a token against (ln 0.07 + 0) / 2 = -1.33), so comparing would end all.
    more = {END: 0.3, **{40 + n: 0.07 for n in range(10)}}
    then = {A: {C: 1.0}, C: more, **{40 + n: {D: 1.0} for n in range(10)}}
    model = Fork({A: 1.0}, then)
    replies = [
        list(generate(model, ASK, replace(MANY, seed=seed), stop={END}, pauses={C, D}))
        for seed in range(200)
    ]
    assert {tuple(reply[:2]) for reply in replies} == {(A, C)}
    ended = sum(len(reply) == 2 for reply in replies)
    assert 41 <= ended <= 80, "60 of 200; three deviations are 19"
    assert all(len(reply) == 4 and reply[3] == D for reply in replies if len(reply) > 2)


def test_a_penalty_counts_the_sentences_before():
    # A is the surer start of the second sentence, but it stands in the first.
    model = Fork({A: 1.0}, {A: {C: 1.0}, C: {A: 0.6, B: 0.4}, B: {D: 1.0}})
    strict = replace(MANY, repetition_penalty=100.0, max_tokens=3)
    said = {
        tuple(generate(model, ASK, replace(strict, seed=seed), stop={END}, pauses={C, D}))
        for seed in range(5)
    }
    assert said == {(A, C, B)}


def test_a_sentence_ends_with_its_stop_and_what_closes_it():
    ends = {TOKENIZER.decode([id]) for id in sentence_ends(TOKENIZER)}
    assert ends == {".", "!", "?"}
    real = Tokenizer(tokenizer_model())
    pieces = {real.decode([id]) for id in sentence_ends(real)}
    assert {".", "!", "?", '."', '?"'} <= pieces
    assert not {",", ":", "a", " the", ""} & pieces


def test_the_first_sentence_is_there_before_the_second_is_begun():
    model = ScriptedGPT(["Yes. No. Why?"])
    cache = model.new_cache()
    long = replace(MANY, max_tokens=20)
    tokens = generate(model, ASK, long, stop={END}, pauses=sentence_ends(TOKENIZER), cache=cache)
    assert TOKENIZER.decode([next(tokens) for _ in range(4)]) == "Yes."
    assert cache.length == 4, "the prompt, and the sentence without its last token"
    assert TOKENIZER.decode(tokens) == " No. Why?"


def test_greedy_needs_no_drafts():
    model = Fork({A: 0.6, B: 0.4}, {})
    cache = model.new_cache()
    sampling = Sampling(temperature=0, drafts=8)
    assert list(generate(model, ASK, sampling, stop={END}, cache=cache)) == [A]
    assert cache.fed == [1, 1]


@pytest.mark.parametrize("pauses", [(), tuple(range(8, 263, 4))])
@pytest.mark.parametrize("stop", [(), tuple(range(7, 263, 9))])
def test_after_drafts_the_cache_holds_what_was_said(gpt, stop, pauses):
    prompt = TOKENIZER.encode("hello")
    sampling = Sampling(**OFF, drafts=5, max_tokens=12, seed=2)
    cache = gpt.new_cache()
    list(generate(gpt, prompt[:3], Sampling(max_tokens=1), cache=cache))  # an earlier turn
    rewind(cache, prompt[:3], prompt)
    ends = {"stop": stop, "pauses": pauses}
    said = list(generate(gpt, prompt, sampling, **ends, cache=cache))
    assert said == list(generate(gpt, prompt, sampling, **ends)), "the same without it"
    assert 0 < len(said) <= 12
    assert len(prompt) + len(said) - 1 <= cache.length <= len(prompt) + len(said)
    fresh = gpt.new_cache()
    with torch.inference_mode():
        gpt.hidden(torch.tensor([[*prompt, *said][: cache.length]]), cache=fresh)
    for mine, its in zip(cache.layers, fresh.layers, strict=True):
        for one, other in zip(mine.held(0, cache.length), its.held(0, cache.length), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ batches


def test_a_batch_of_different_lengths_is_the_same_as_one_by_one(gpt):
    prompts = [TOKENIZER.encode(text) for text in ("a", "a longer one", "hello", "zz", "hello")]
    sampling = Sampling(temperature=0, max_tokens=12)
    alone = [list(generate(gpt, prompt, sampling)) for prompt in prompts]
    assert generate_batch(gpt, prompts, sampling) == alone
    assert generate_batch(gpt, prompts, sampling, rows=2) == alone


def test_rows_stop_on_their_own():
    model = ScriptedGPT(["one", "three3"])
    ask = [TOKENIZER.assistant_id]
    prompts = [ask + ask, ask]
    stop = {TOKENIZER.end_id}
    found = generate_batch(model, prompts, GREEDY, stop=stop)
    assert [TOKENIZER.decode(reply) for reply in found] == ["three3", "one"]
    found = generate_batch(model, prompts, GREEDY, stop=stop, keep_stop=True)
    assert [reply[-1] for reply in found] == [TOKENIZER.end_id] * 2
    assert generate_batch(model, [], GREEDY) == []
    with pytest.raises(ConfigError, match="empty"):
        generate_batch(model, [[9], []], GREEDY)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_rows_that_stopped_leave_and_change_nothing(gpt, penalty, monkeypatch):
    sampling = Sampling(temperature=0, max_tokens=20, repetition_penalty=penalty)
    prompts = [TOKENIZER.encode(text) for text in ("a", "bb", "hello", "zz", "hi there", "q")]
    free = generate_batch(gpt, prompts, sampling)
    stop = {free[1][2], free[3][5], free[4][9]}  # rows end at different steps
    alone = [list(generate(gpt, prompt, sampling, stop=stop)) for prompt in prompts]
    assert len({len(reply) for reply in alone}) >= 3
    kept = []
    drop = KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda c, rows: (kept.append(len(rows)), drop(c, rows)))
    assert generate_batch(gpt, prompts, sampling, stop=stop) == alone
    assert kept and kept == sorted(kept, reverse=True) and kept[0] <= 3


def test_one_row_with_a_seed_is_generate_with_that_seed(gpt):
    sampling = Sampling(seed=11, max_tokens=15, repetition_penalty=1.3, top_k=20)
    prompt = TOKENIZER.encode("dice")
    assert generate_batch(gpt, [prompt], sampling) == [list(generate(gpt, prompt, sampling))]


def test_next_logits_are_the_last_of_all_logits(gpt):
    ids = torch.tensor([TOKENIZER.encode("some text")])
    with torch.inference_mode():
        torch.testing.assert_close(next_logits(gpt, ids), gpt(ids)[:, -1])


# ------------------------------------------------------------------ streaming


def check_stream(tokenizer, tokens: list[int]) -> None:
    text = TextStream(tokenizer)
    pieces = [text.push(token) for token in tokens]
    whole = "".join(pieces) + text.flush()
    assert whole == tokenizer.decode(tokens)


@given(st.text())
def test_any_text_streams_exactly(text):
    tokens = TOKENIZER.encode(text)
    streamed = TextStream(TOKENIZER)
    pieces = [streamed.push(token) for token in tokens]
    assert "".join(pieces) == text and streamed.flush() == ""


@pytest.fixture(scope="module")
def real_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_model())


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_streams_exactly_with_the_shipped_tokenizer(real_tokenizer, text):
    streamed = TextStream(real_tokenizer)
    pieces = [streamed.push(token) for token in real_tokenizer.encode(text)]
    assert "".join(pieces) == text and streamed.flush() == ""


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 511)))
def test_any_shipped_tokens_stream_as_they_decode(real_tokenizer, tokens):
    check_stream(real_tokenizer, tokens)


@given(st.lists(st.integers(0, 262)))
def test_any_tokens_stream_as_they_decode(tokens):
    check_stream(TOKENIZER, tokens)


def test_an_emoji_comes_whole_and_a_broken_one_as_a_single_mark():
    text = TextStream(TOKENIZER)
    fox = TOKENIZER.encode("🦊")
    assert [text.push(token) for token in fox] == ["", "", "", "🦊"]
    assert [text.push(token) for token in fox[:3]] == ["", "", ""]
    assert text.flush() == "\ufffd"
    assert text.push(TOKENIZER.encode("a")[0]) == "a", "flush leaves nothing behind"


def test_stream_gives_whole_characters_and_stops_at_any_control_token():
    prompt = [TOKENIZER.user_id, *TOKENIZER.encode("?"), TOKENIZER.assistant_id]
    pieces = list(stream(ScriptedGPT(["né 🦊"]), TOKENIZER, prompt, GREEDY))
    assert pieces == ["n", "é", " ", "🦊"]

    class NextUser(UniformGPT):
        def scores(self, ids):
            logits = super().scores(ids)
            logits[TOKENIZER.user_id if len(ids) > 4 else 7 + ord("x")] = 100.0
            return logits

    assert "".join(stream(NextUser(), TOKENIZER, prompt, GREEDY)) == "xx"
    assert stop_ids(TOKENIZER) == {0, 2, 3, 4, 5, 6}
