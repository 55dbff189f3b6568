"""Chapter 01: forward, loss and slopes by hand, against numbers, autograd and nudging."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tinychat.neural_net import MLP, cross_entropy, finite_differences, train


def test_cross_entropy_by_hand():
    # Logits 0 and ln 3: the shares are 1/4 and 3/4.
    logits = torch.tensor([[0.0, math.log(3)]])
    loss, slopes = cross_entropy(logits, torch.tensor([0]))
    assert float(loss) == pytest.approx(math.log(4))
    assert slopes.tolist() == [pytest.approx([-0.75, 0.75])]
    loss, slopes = cross_entropy(logits.repeat(2, 1), torch.tensor([0, 1]))
    assert float(loss) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert slopes.flatten().tolist() == pytest.approx([-0.375, 0.375, 0.125, -0.125])


def test_cross_entropy_equals_torch_and_never_overflows():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 300
    labels = torch.arange(7) % 5
    torch.testing.assert_close(cross_entropy(logits, labels)[0], F.cross_entropy(logits, labels))
    loss, slopes = cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert float(loss) == 2e4 and slopes.tolist() == [[1.0, -1.0]]


def test_one_neuron_by_hand():
    network = MLP((2, 2), dtype=torch.float64)
    weights, bias = network.parameters
    weights.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    bias.copy_(torch.tensor([math.log(3) - 1, 0.0]))
    x = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    logits = network.forward(x)  # 2 - 1 + ln 3 - 1 = ln 3, and 0
    assert logits[0].tolist() == pytest.approx([math.log(3), 0.0])
    loss, slopes = cross_entropy(logits, torch.tensor([0]))
    assert float(loss) == pytest.approx(math.log(4 / 3))
    by_weights, by_bias = network.backward(slopes)
    # Said 3/4 and 1/4, true is 1 and 0: -1/4 and 1/4, times the inputs 2 and 1.
    assert by_bias.tolist() == pytest.approx([-0.25, 0.25])
    assert by_weights.flatten().tolist() == pytest.approx([-0.5, -0.25, 0.5, 0.25])


def test_hidden_layer_by_hand():
    network = MLP((1, 1, 1), dtype=torch.float64)
    for weights, value in zip(network.parameters, (0.5, 0.1, 2.0, -1.0), strict=True):
        weights.fill_(value)
    h = math.tanh(0.5 * 3 + 0.1)
    out = network.forward(torch.tensor([[3.0]], dtype=torch.float64))
    assert float(out) == pytest.approx(2 * h - 1)
    slopes = network.backward(torch.ones(1, 1, dtype=torch.float64))
    wanted = [2 * (1 - h * h) * 3, 2 * (1 - h * h), h, 1.0]
    assert [float(one) for one in slopes] == pytest.approx(wanted)


@pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3), (9, 8, 8, 4), (2, 7, 1, 6, 3)])
def test_backward_equals_autograd_and_nudging(sizes):
    network = MLP(sizes, seed=3, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, sizes[0], generator=draw, dtype=torch.float64)
    labels = torch.randint(sizes[-1], (6,), generator=draw)

    def loss():
        return cross_entropy(network.forward(x), labels)[0]

    by_nudging = [finite_differences(loss, weights, 1e-5) for weights in network.parameters]
    by_hand = network.backward(cross_entropy(network.forward(x), labels)[1])
    leaves = [weights.requires_grad_() for weights in network.parameters]
    by_autograd = torch.autograd.grad(F.cross_entropy(network.forward(x), labels), leaves)
    for ours, torchs, nudged in zip(by_hand, by_autograd, by_nudging, strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(ours, nudged, atol=1e-6, rtol=0)


def test_finite_differences_put_the_weights_back():
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    kept = weights.clone()
    slopes = finite_differences(lambda: (weights**2).sum(), weights, 1e-4)
    torch.testing.assert_close(slopes, 2 * kept)
    assert torch.equal(weights, kept)


def test_one_step_of_training_by_hand():
    network = MLP((1, 2))
    for weights in network.parameters:
        weights.zero_()
    losses = train(network, [(torch.tensor([[2.0]]), torch.tensor([1]))], rate=0.1)
    assert losses == [pytest.approx(math.log(2))]
    # Half and half against 0 and 1: slopes 1/2 and -1/2, times the input 2 for the weights.
    assert network.parameters[0].flatten().tolist() == pytest.approx([-0.1, 0.1])
    assert network.parameters[1].tolist() == pytest.approx([-0.05, 0.05])


def test_training_learns_what_one_layer_cannot():
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])  # exclusive or
    batches = [(x, labels)] * 400
    deep, flat = MLP((2, 4, 4, 2), seed=1), MLP((2, 2), seed=1)
    assert train(deep, batches, 0.5)[-1] < 0.05
    assert (deep.forward(x).argmax(dim=1) == labels).all()
    assert train(flat, batches, 0.5)[-1] == pytest.approx(math.log(2), abs=1e-3)


def test_the_seed_decides_and_batches_may_be_any_iterable():
    x, labels = torch.eye(3), torch.arange(3)
    runs = [
        train(MLP((3, 5, 3), seed=seed), itertools.repeat((x, labels), 5), 0.1)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 5


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0, 2)])
def test_sizes_that_make_no_network(sizes):
    with pytest.raises(ValueError, match="give inputs and outputs"):
        MLP(sizes)
