"""Chapter 04: positions as waves and as turns, and who is near whom."""

import math

import pytest
import torch

from tinychat.embeddings import apply_rotary, nearest, rotary_tables, sinusoidal_positions


def test_sinusoidal_positions_by_hand():
    table = sinusoidal_positions(3, 4)
    slow = 10000.0**-0.5
    for t in range(3):
        wanted = [math.sin(t), math.cos(t), math.sin(t * slow), math.cos(t * slow)]
        torch.testing.assert_close(table[t], torch.tensor(wanted))
    with pytest.raises(ValueError, match="5 is odd"):
        sinusoidal_positions(3, 5)


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("distance", [0, 1, 5, 60])
def test_the_product_of_two_waves_knows_the_distance_alone(width, distance):
    table = sinusoidal_positions(300, width)
    products = (table[: 300 - distance] * table[distance:]).sum(dim=1)
    # cos a cos b + sin a sin b = cos(a - b), for each pair of columns
    angles = [distance * 10000.0 ** (-2 * pair / width) for pair in range(width // 2)]
    wanted = sum(math.cos(angle) for angle in angles)
    torch.testing.assert_close(products, torch.full_like(products, wanted), atol=1e-4, rtol=1e-4)


def test_rotary_tables_by_hand():
    cos, sin = rotary_tables(5, 4, theta=100.0)
    assert cos.shape == sin.shape == (5, 2)
    # Pair 0 turns by 1 radian a token, pair 1 by 100 ** (-2 / 4) = 0.1.
    for t in range(5):
        torch.testing.assert_close(cos[t], torch.tensor([math.cos(t), math.cos(0.1 * t)]))
        torch.testing.assert_close(sin[t], torch.tensor([math.sin(t), math.sin(0.1 * t)]))


def test_rotary_turns_a_pair_by_its_angle():
    quarter = torch.tensor([[math.pi / 2]])
    x = torch.tensor([[[[1.0, 0.0]]]])
    turned = apply_rotary(x, quarter.cos(), quarter.sin())
    torch.testing.assert_close(turned, torch.tensor([[[[0.0, 1.0]]]]))


def test_rotary_leaves_position_0_and_all_lengths():
    cos, sin = rotary_tables(50, 16)
    x = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, cos, sin)
    assert turned.shape == x.shape
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[:, :, 1], x[:, :, 1])


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = rotary_tables(400, 32)
    draw = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=draw).expand(2, 1, 1, 400, 32)
    scores = (apply_rotary(q, cos, sin) @ apply_rotary(k, cos, sin).transpose(-2, -1))[0, 0]
    for distance in (0, 1, 7, 300):
        same = scores.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-4, rtol=1e-4)
    # Direction counts too: three back is not three ahead.
    assert abs(float(scores[3, 0] - scores[0, 3])) > 1e-2


def test_rotary_pairs_halves_like_llama_not_neighbours():
    cos, sin = rotary_tables(2, 4)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 2, 4)
    turned = apply_rotary(x, cos, sin)[0, 0, 1]
    torch.testing.assert_close(turned, torch.tensor([math.cos(1), 0.0, math.sin(1), 0.0]))


def test_nearest_compares_directions_not_lengths():
    table = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 0.1], [-5.0, 0.0]])
    found = nearest(table, torch.tensor([3.0, 0.0]), 3)
    assert [number for number, _ in found] == [0, 1, 2]
    wanted = [1.0, 10 / math.sqrt(101), 0.0]
    assert [score for _, score in found] == pytest.approx(wanted, abs=1e-6)


def test_nearest_survives_vectors_of_zeros_and_short_tables():
    found = nearest(torch.zeros(2, 3), torch.ones(3), 10)
    assert len(found) == 2 and all(score == 0 for _, score in found)
