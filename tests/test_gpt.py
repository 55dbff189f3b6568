"""Chapter 06: causal; the same packed, padded and cached; equal to Qwen3; able to learn."""

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F

from tinychat.data import tokenizer_model
from tinychat.gpt import (
    GPT,
    PRESETS,
    GPTConfig,
    config_from,
    load_model,
    preset,
    save_model,
)
from tinychat.runtime import checkpoint
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.tokenizer import Tokenizer

TINY = GPTConfig(
    width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=48, vocab_size=97, context=48
)


def lively(config: GPTConfig = TINY, seed: int = 0) -> GPT:
    """A GPT whose every weight matters: fresh blocks write zeros, which would hide mistakes."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3 if name == "embed.weight" else 0.2)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return lively()


def ids_of(batch: int, length: int, seed: int = 1, vocab: int = TINY.vocab_size) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=draw)


@torch.no_grad()
def logits_of(model: GPT, ids: torch.Tensor, **keywords) -> torch.Tensor:
    return model(ids, **keywords)


# ------------------------------------------------------------------------------ configs, presets


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameter_formula_counts_the_real_weights(name):
    config = preset(name)
    with torch.device("meta"):
        model = GPT(config)
    assert config.parameters == sum(weight.numel() for weight in model.parameters())


def test_the_formula_holds_for_odd_shapes():
    for config in (TINY, dataclasses.replace(TINY, heads=6, kv_heads=3, head_width=10, layers=3)):
        model = GPT(config)
        assert config.parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("nano", 1, 3), ("mini", 8, 16), ("small", 34, 38), ("medium", 120, 128)],
)
def test_presets_have_the_promised_size(name, low, high):
    assert low <= preset(name).parameters / 1e6 <= high


@pytest.mark.parametrize(
    ("typed", "meant"), [("smal", "small"), ("Medium", "medium"), ("nan", "nano")]
)
def test_an_unknown_preset_names_the_nearest(typed, meant):
    with pytest.raises(ConfigError) as caught:
        preset(typed)
    assert repr(typed) in str(caught.value) and f"did you mean {meant!r}" in str(caught.value)


def test_an_unknown_preset_like_none_lists_them():
    with pytest.raises(ConfigError, match="'huge'; there are nano, mini, small, medium"):
        preset("huge")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 0}, "width is 0"),
        ({"layers": 2.0}, "layers is 2.0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"head_width": 7}, "head_width is 7"),
        ({"heads": 3, "kv_heads": 2}, "3 heads can't share 2"),
        ({"context": 10**12}, "context is 1,000,000,000,000"),
    ],
)
def test_impossible_shapes_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(TINY, **change)


def test_flops_are_six_a_weight_and_more_with_longer_sequences():
    config = preset("nano")
    assert config.flops_per_token(0) == 6 * config.parameters
    # 2 matrix products (scores, mixing) of 2 x K x T each and head; backward doubles the forward.
    attention = 3 * 2 * 2 * config.head_width * config.heads * config.layers * 256
    assert config.flops_per_token(256) == 6 * config.parameters + attention


# ------------------------------------------------------------------------------ the fresh model


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_a_fresh_model_finds_all_tokens_equally_likely(name):
    torch.manual_seed(0)
    model = GPT(preset(name))
    ids = ids_of(4, 129, vocab=8192)
    loss = F.cross_entropy(logits_of(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) - math.log(8192)) < 0.05


@pytest.mark.parametrize("name", PRESETS)
def test_every_fresh_preset_does_so_for_any_target(name):
    """Fresh blocks add nothing to the stream, so one of them stands for all.

    The mean over all targets is what the loss of random tokens is expected to be, without the luck
    of a small draw.
    """
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(preset(name), layers=1))
    ids = ids_of(1, 32, vocab=8192)
    with torch.no_grad():
        hidden = model.hidden(ids)
        torch.testing.assert_close(hidden, model.norm(model.embed(ids)))
    expected = -logits_of(model, ids).log_softmax(-1).mean()
    assert abs(float(expected) - math.log(8192)) < 0.05


# ------------------------------------------------------------------------------ who sees whom


@pytest.mark.parametrize("grad", [True, False])
def test_logits_do_not_change_when_later_tokens_do(gpt, grad):
    ids = ids_of(2, 20)
    with torch.set_grad_enabled(grad):
        before = gpt(ids)
        for place in (1, 7, 19):
            changed = ids.clone()
            changed[:, place:] = (changed[:, place:] + 1) % TINY.vocab_size
            after = gpt(changed)
            assert torch.equal(before[:, :place], after[:, :place])
            assert not torch.allclose(before[:, place], after[:, place])


def test_every_earlier_token_counts(gpt):
    ids = ids_of(1, 12)
    last = logits_of(gpt, ids)[:, -1]
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % TINY.vocab_size
        assert not torch.allclose(logits_of(gpt, changed)[:, -1], last, atol=1e-4)


def test_order_counts(gpt):
    ids = ids_of(1, 6)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(logits_of(gpt, ids)[:, -1], logits_of(gpt, swapped)[:, -1], atol=1e-3)


@pytest.mark.parametrize("grad", [True, False])
def test_left_padding_changes_nothing(gpt, grad):
    rows = [ids_of(1, length, seed=length) for length in (11, 6, 1)]
    padded = torch.zeros(3, 11, dtype=torch.long)
    segments = torch.zeros(3, 11, dtype=torch.long)
    for number, row in enumerate(rows):
        padded[number, 11 - row.shape[1] :] = row
        segments[number, 11 - row.shape[1] :] = 1
    with torch.set_grad_enabled(grad):
        together = gpt(padded, segments_BT=segments)
        for number, row in enumerate(rows):
            alone = gpt(row)[0]
            torch.testing.assert_close(together[number, -len(alone) :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_packed_texts_are_read_as_if_alone(gpt, grad):
    texts = [ids_of(1, length, seed=length) for length in (7, 12, 5)]
    packed = torch.cat(texts, dim=1)
    segments = torch.cat([torch.full_like(one, n) for n, one in enumerate(texts)], dim=1)
    with torch.set_grad_enabled(grad):
        together = gpt(packed, segments_BT=segments).split([7, 12, 5], dim=1)
        for found, text in zip(together, texts, strict=True):
            torch.testing.assert_close(found, gpt(text), atol=1e-5, rtol=1e-5)


def test_training_and_inference_paths_agree(gpt):
    ids = ids_of(2, 30)
    segments = (torch.arange(30) // 11).expand(2, -1)
    for extra in ({}, {"segments_BT": segments}):
        torch.testing.assert_close(
            gpt(ids, **extra).detach(), logits_of(gpt, ids, **extra), atol=1e-5, rtol=1e-5
        )


def test_logits_are_float32_for_bfloat16_weights():
    model = lively().to(torch.bfloat16)
    assert model(ids_of(1, 4)).dtype == torch.float32
    cache = model.new_cache()
    assert logits_of(model, ids_of(1, 4), cache=cache).dtype == torch.float32


def test_a_text_longer_than_the_context_is_refused(gpt):
    with pytest.raises(ConfigError, match="49 tokens long; this model reads 48"):
        gpt(ids_of(1, 49))
    cache = gpt.new_cache()
    logits_of(gpt, ids_of(1, 40), cache=cache)
    with pytest.raises(ConfigError, match="50 tokens long"):
        logits_of(gpt, ids_of(1, 10), cache=cache)
    assert cache.length == 40, "a refused text leaves the cache as it was"


# ------------------------------------------------------------------------------ the cache


def in_parts(model: GPT, ids: torch.Tensor, parts: list[int], **keywords) -> torch.Tensor:
    cache, pieces, start = model.new_cache(len(ids)), [], 0
    for part in parts:
        extra = {name: value[:, start : start + part] for name, value in keywords.items()}
        pieces.append(logits_of(model, ids[:, start : start + part], cache=cache, **extra))
        start += part
        assert cache.length == start
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("parts", [[20], [1] * 20, [13, 1, 1, 5], [1, 19], [7, 7, 6]])
def test_cached_logits_are_the_uncached_ones(gpt, parts):
    ids = ids_of(2, 20)
    torch.testing.assert_close(in_parts(gpt, ids, parts), logits_of(gpt, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [[20], [1] * 20, [12, 1, 7]])
def test_cached_logits_with_left_padding(gpt, parts):
    ids, pads = ids_of(2, 20), torch.tensor([[0], [6]])
    segments = (torch.arange(20) >= pads).long()
    found = in_parts(gpt, ids, parts, segments_BT=segments)
    wanted = logits_of(gpt, ids, segments_BT=segments)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:, 6:], logits_of(gpt, ids[1:, 6:]), atol=1e-5, rtol=1e-5)


def test_padding_may_come_with_the_first_chunk_only(gpt):
    ids, pads = ids_of(2, 12), torch.tensor([[0], [3]])
    segments = (torch.arange(12) >= pads).long()
    cache = gpt.new_cache(2)
    logits_of(gpt, ids[:, :8], cache=cache, segments_BT=segments[:, :8])
    rest = torch.cat([logits_of(gpt, ids[:, t : t + 1], cache=cache) for t in range(8, 12)], dim=1)
    wanted = logits_of(gpt, ids, segments_BT=segments)[:, 8:]
    torch.testing.assert_close(rest, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_truncate_and_go_on(gpt, padded):
    ids, other = ids_of(2, 15), ids_of(2, 8, seed=5)
    extra = {"segments_BT": (torch.arange(15) >= torch.tensor([[0], [4]])).long()} if padded else {}
    cache = gpt.new_cache(2)
    logits_of(gpt, ids, cache=cache, **extra)
    cache.truncate(9)
    assert cache.length == 9
    found = logits_of(gpt, other, cache=cache)
    joined = torch.cat((ids[:, :9], other), dim=1)
    if padded:
        first = extra["segments_BT"][:, :9]
        extra = {"segments_BT": torch.cat((first, torch.ones_like(other)), dim=1)}
    wanted = logits_of(gpt, joined, **extra)[:, 9:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_truncate_refuses_what_is_not_there(gpt):
    cache = gpt.new_cache()
    logits_of(gpt, ids_of(1, 5), cache=cache)
    for length in (6, -1):
        with pytest.raises(ValueError, match=f"to {length}"):
            cache.truncate(length)
    cache.truncate(0)
    torch.testing.assert_close(
        logits_of(gpt, ids_of(1, 3), cache=cache), logits_of(gpt, ids_of(1, 3)), atol=1e-5, rtol=0
    )


def test_a_full_cache_says_so_and_stays_whole(gpt):
    cache = gpt.new_cache(capacity=8)
    logits_of(gpt, ids_of(1, 6), cache=cache)
    with pytest.raises(ValueError, match="holds 8 tokens; 6 \\+ 3 don't fit"):
        logits_of(gpt, ids_of(1, 3), cache=cache)
    assert cache.length == 6
    assert gpt.new_cache(capacity=10**6).capacity == TINY.context


@torch.no_grad()
def test_greedy_decoding_agrees_token_for_token(gpt):
    prompt = ids_of(1, 5)
    plain = prompt
    while plain.shape[1] < 40:
        plain = torch.cat((plain, gpt(plain)[:, -1:].argmax(-1)), dim=1)
    cache, cached, unread = gpt.new_cache(), prompt, prompt
    while cached.shape[1] < 40:
        unread = gpt(unread, cache=cache)[:, -1:].argmax(-1)
        cached = torch.cat((cached, unread), dim=1)
    assert plain.tolist() == cached.tolist()
    assert len(set(plain[0, 5:].tolist())) > 3, "a reply of one token would prove little"


# ------------------------------------------------------------------------------ an outside witness


def qwen3_name(name: str) -> str:
    """Translate the name of one of our weights into transformers' name."""
    for ours, theirs in (
        ("embed.", "model.embed_tokens."),
        ("blocks.", "model.layers."),
        ("attention_norm.", "input_layernorm."),
        ("feed_forward_norm.", "post_attention_layernorm."),
        ("attention.q.", "self_attn.q_proj."),
        ("attention.k.", "self_attn.k_proj."),
        ("attention.v.", "self_attn.v_proj."),
        ("attention.out.", "self_attn.o_proj."),
        ("attention.q_norm.", "self_attn.q_norm."),
        ("attention.k_norm.", "self_attn.k_norm."),
        ("feed_forward.gate.", "mlp.gate_proj."),
        ("feed_forward.up.", "mlp.up_proj."),
        ("feed_forward.down.", "mlp.down_proj."),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}" if name.startswith("norm.") else name


@pytest.mark.parametrize(
    "config",
    [TINY, dataclasses.replace(TINY, heads=6, kv_heads=1, rope_theta=500.0, layers=3, width=40)],
    ids=["grouped", "one key head"],
)
def test_logits_equal_those_of_transformers_qwen3(config, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    ours = lively(config, seed=7)
    state = {qwen3_name(name): weight for name, weight in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (
        "only the tied head is not in the file"
    )
    theirs.tie_weights()
    ids = ids_of(3, 40, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
        assert ours(ids).std() > 0.5, "logits near zero would prove little"


# ------------------------------------------------------------------------------ learning


def test_a_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, width=64, hidden=128))
    ids = ids_of(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _step in range(150):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    assert loss.item() < 0.05
    assert all(weight.grad is not None for weight in model.parameters()), "every weight learns"


# ------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_model())


@pytest.fixture(scope="module")
def saved(tokenizer) -> GPT:
    return lively(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))


@pytest.mark.parametrize(("quantize", "tolerance"), [("fp32", 0), ("bf16", 2e-2), ("int8", 2e-2)])
def test_save_and_load(saved, tokenizer, tmp_path, quantize, tolerance):
    path = tmp_path / "model.safetensors"
    written = save_model(
        path,
        saved,
        stage="base",
        tokenizer=tokenizer,
        lineage={"seed": 1},
        metrics={"loss": 2.5},
        quantize=quantize,
    )
    model, found, info = load_model(path)
    assert info == written
    assert (info.stage, info.dtype, info.lineage, info.metrics) == (
        "base", quantize, {"seed": 1}, {"loss": 2.5},
    )  # fmt: skip
    assert found.model == tokenizer.model
    assert model.config == saved.config and not model.training
    assert info.parameters == model.config.parameters
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    for name, weight in saved.state_dict().items():
        scale = float(weight.abs().max())
        torch.testing.assert_close(model.state_dict()[name], weight, atol=tolerance * scale, rtol=0)
    ids = ids_of(1, 30)
    ours, theirs = logits_of(saved, ids), logits_of(model, ids)
    if not tolerance:
        assert torch.equal(ours, theirs)
    away = F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum")
    assert float(away) / 30 < 0.05
    # It is a whole model again: it can go on learning, and move.
    model(ids).sum().backward()
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())


def write(path, saved, tokenizer, *, config=None, state=None, stage="base"):
    checkpoint.save(
        path,
        stage=stage,
        config=dataclasses.asdict(saved.config) | (config or {}),
        state=saved.state_dict() | (state or {}),
        tokenizer=tokenizer.model,
        lineage={},
        metrics={},
        quantize="fp32",
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"colour": 1}}, "unknown name 'colour'"),
        ({"config": {"heads": 3}}, "3 heads can't share 2 key heads"),
        ({"config": {"head_width": 7}}, "head_width is 7"),
        ({"config": {"context": 10**15}}, "context is"),
        ({"config": {"layers": 3}}, "its own config asks for"),
        ({"config": {"layers": 10**9}}, "its own config asks for"),
        ({"state": {"extra.weight": torch.ones(2, 2)}}, "its own config asks for"),
        # As many weights as asked for, in other shapes or under another name.
        ({"config": {"heads": 2, "kv_heads": 4}}, "2 heads can't share 4"),
        (
            {"state": {"blocks.0.attention.q.weight": torch.ones(16, 64)}},
            r"'blocks.0.attention.q.weight' has the shape \(16, 64\).*asks for \(32, 32\)",
        ),
        ({"stage": "reward"}, "is a reward model"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_one_sentence(saved, tokenizer, tmp_path, change, named):
    path = tmp_path / "odd.safetensors"
    write(path, saved, tokenizer, **change)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_model(path)
    message = str(caught.value)
    assert "odd.safetensors" in message and "\n" not in message and message.endswith(".")


def test_a_renamed_weight_is_named(saved, tokenizer, tmp_path):
    path = tmp_path / "odd.safetensors"
    state = saved.state_dict()
    state["normal.weight"] = state.pop("norm.weight")
    checkpoint.save(
        path,
        stage="base",
        config=dataclasses.asdict(saved.config),
        state=state,
        tokenizer=tokenizer.model,
        lineage={},
        metrics={},
    )
    with pytest.raises(CheckpointError, match="'norm.weight' has the shape of nothing"):
        load_model(path)


def test_a_tokenizer_of_another_size_is_refused(tokenizer, tmp_path):
    path = tmp_path / "odd.safetensors"
    save_model(path, lively(), stage="sft", tokenizer=tokenizer, lineage={}, metrics={})
    with pytest.raises(CheckpointError, match="tokenizer has 8192 pieces and the model 97"):
        load_model(path)


def test_config_from_names_what_is_missing(saved, tokenizer, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, saved, tokenizer)
    info = checkpoint.read_info(path)
    shorter = {name: value for name, value in info.config.items() if name != "width"}
    with pytest.raises(CheckpointError, match="incomplete.*width"):
        config_from(dataclasses.replace(info, config=shorter))
    assert config_from(info) == saved.config
