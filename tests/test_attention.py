"""Chapter 05: two tokens worked out by hand, and agreement with PyTorch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinychat.attention import (
    Attention,
    LayerCache,
    RMSNorm,
    attend,
    attend_causal,
    causal_mask,
)
from tinychat.embeddings import rotary_tables


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_tokens_by_hand():
    # K = 1, so the scores are plain products: token 1 asks 1, the keys say 0 and log 3.
    q = torch.tensor([5.0, 1.0]).view(1, 1, 2, 1)
    k = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    v = torch.tensor([[8.0], [4.0]]).view(1, 1, 2, 1)
    found = attend(q, k, v, causal_mask(2, 2))
    # Token 0 sees itself alone. Token 1 has weights 1 : 3, so 8/4 + 3·4/4 = 5.
    torch.testing.assert_close(found.flatten(), torch.tensor([8.0, 5.0]))


def test_scores_are_divided_by_the_root_of_the_head_width():
    # K = 4: the raw score 2 log 3 halves, and the weights are 1 : 3 again.
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    k = torch.zeros(1, 1, 2, 4)
    k[0, 0, 1, 0] = 2 * math.log(3)
    v = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    found = attend(q, k, v, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(found.flatten(), torch.full((4,), 5.0))


def test_causal_mask_by_hand():
    assert causal_mask(3, 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize(("length", "total"), [(7, 7), (3, 9), (1, 5)])
@pytest.mark.parametrize("masked", ["causal", "by row", "everything"])
def test_attend_is_scaled_dot_product_attention(heads, kv_heads, length, total, masked):
    q = random(2, heads, length, 16, seed=1)
    k, v = random(2, 2, kv_heads, total, 16, seed=2)
    visible = causal_mask(length, total)
    if masked == "by row":  # each row of the batch has a mask of its own, as left padding gives
        hidden = torch.arange(total) >= torch.tensor([0, total - length])[:, None, None, None]
        visible = visible & hidden
    elif masked == "everything":
        visible = torch.ones_like(visible)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, visible), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 7, 64])
@pytest.mark.parametrize(("length", "total"), [(7, 7), (3, 9), (1, 5)])
@pytest.mark.parametrize("masked", ["causal", "by row"])
def test_attention_in_blocks_is_attention(block, length, total, masked):
    q = random(2, 4, length, 8, seed=1)
    k, v = random(2, 2, 2, total, 8, seed=2)
    visible = causal_mask(length, total)
    if masked == "by row":  # hides more than the future, and never a token from itself
        hidden = torch.arange(total) >= torch.tensor([0, total - length])[:, None, None, None]
        visible = visible & hidden
    blocks = attend_causal(q, k, v, None if masked == "causal" else visible, block=block)
    torch.testing.assert_close(blocks, attend(q, k, v, visible), atol=1e-6, rtol=1e-5)


def test_cross_attention_needs_no_mask_and_no_equal_lengths():
    """Queries of one text and keys of another (chapter 06): every row is a weighted mean."""
    q, k = random(2, 2, 3, 8, seed=1), random(2, 2, 11, 8, seed=2)
    v = random(2, 2, 11, 8, seed=3)
    found = attend(q, k, v, torch.tensor(True))
    assert found.shape == q.shape
    order = torch.randperm(11, generator=torch.Generator().manual_seed(4))
    shuffled = attend(q, k[:, :, order], v[:, :, order], torch.tensor(True))
    torch.testing.assert_close(shuffled, found, atol=1e-6, rtol=1e-5)
    assert (found <= v.amax(dim=2, keepdim=True)).all() and (
        found >= v.amin(dim=2, keepdim=True)
    ).all()


def test_attend_and_pytorch_send_the_same_gradients():
    def gradients(call):
        tensors = [random(2, 4, 6, 8, seed=1), *random(2, 2, 2, 6, 8, seed=2)]
        for one in tensors:
            one.requires_grad_()
        (call(*tensors) * random(2, 4, 6, 8, seed=3)).sum().backward()
        return [one.grad for one in tensors]

    ours = gradients(lambda q, k, v: attend(q, k, v, causal_mask(6, 6)))
    theirs = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_attend_keeps_bfloat16_and_stays_close():
    q, k, v = random(3, 1, 2, 64, 16, seed=4)
    exact = attend(q, k, v, causal_mask(64, 64))
    rough = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal_mask(64, 64))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    # The root of (9 + 16) / 2 is 5 / √2.
    wanted = torch.tensor([3.0, 4.0]) * math.sqrt(2) / 5
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), wanted)
    torch.testing.assert_close(norm(torch.tensor([-30.0, -40.0])), -wanted)
    norm.weight.data = torch.tensor([2.0, 0.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), wanted * torch.tensor([2.0, 0.0]))
    assert RMSNorm(2, eps=1e-6)(torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.fixture()
def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(width=24, heads=4, kv_heads=2, head_width=8, norm_eps=1e-6).eval()


def tables(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_tables(64, 8)
    return cos[start:stop], sin[start:stop]


def test_training_and_inference_paths_agree(layer):
    x = random(2, 9, 24)
    with torch.enable_grad():
        trained = layer(x, *tables(0, 9))
    with torch.no_grad():
        used = layer(x, *tables(0, 9))
    assert trained.requires_grad and not used.requires_grad
    torch.testing.assert_close(trained, used, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_token_never_sees_what_follows(layer, grad):
    x = random(1, 9, 24)
    changed = x.clone()
    changed[:, 5:] = random(1, 4, 24, seed=9) * 100
    with torch.set_grad_enabled(grad):
        before, after = layer(x, *tables(0, 9)), layer(changed, *tables(0, 9))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 3, 2], [5, 1, 3]])
def test_the_cache_changes_nothing(layer, parts, grad):
    x = random(2, 9, 24)
    with torch.set_grad_enabled(grad):
        whole = layer(x, *tables(0, 9))
    cache = LayerCache((2, 2, 16, 8), x.device, x.dtype)
    pieces, start = [], 0
    with torch.no_grad():
        for part in parts:
            stop = start + part
            pieces.append(layer(x[:, start:stop], *tables(start, stop), cache=cache, start=start))
            start = stop
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_qk_norm_makes_scores_blind_to_the_size_of_the_input(layer):
    """Queries and keys have unit root-mean-square, so a loud token is no better heard."""
    x = random(1, 6, 24)
    with torch.no_grad():
        small, large = layer(x, *tables(0, 6)), layer(x * 1000, *tables(0, 6))
    torch.testing.assert_close(large / 1000, small, atol=1e-4, rtol=1e-3)
