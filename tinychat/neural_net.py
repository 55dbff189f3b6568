"""A small network that learns from its mistakes, with every slope worked out by hand.

Generated from chapters/01_neural_net.py: edit that file,
then run `python -m tinychat.book export`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def finite_differences(loss: Callable[[], Tensor], weights: Tensor, nudge: float) -> Tensor:
    """Return the slope of `loss` along each of the weights, by nudging them one at a time.

    Slow and honest: it asks for nothing but the loss itself, so it checks every other way. The
    weights are nudged in place, up and down, and put back.
    """
    slopes = torch.zeros_like(weights)
    for place in range(weights.numel()):
        kept = weights.view(-1)[place].item()
        weights.view(-1)[place] = kept + nudge
        above = loss()
        weights.view(-1)[place] = kept - nudge
        slopes.view(-1)[place] = (above - loss()) / (2 * nudge)
        weights.view(-1)[place] = kept
    return slopes


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean surprise at the labels (nats) and its slopes along the logits, `[B, C]`."""
    rows = torch.arange(len(labels_B))
    # The largest logit of each row becomes 0: the same shares, and nothing overflows.
    shifted_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
    logprobs_BC = shifted_BC - shifted_BC.exp().sum(dim=1, keepdim=True).log()
    slopes_BC = logprobs_BC.exp()
    slopes_BC[rows, labels_B] -= 1
    return -logprobs_BC[rows, labels_B].mean(), slopes_BC / len(labels_B)


class MLP:
    """Layers of weighted votes with tanh between them, and their slopes by hand.

    `sizes` counts the inputs, the neurons of each hidden layer, and the outputs. `parameters` holds
    the weights `[outputs, inputs]` and the bias `[outputs]` of each layer in turn.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes {tuple(sizes)}: give inputs and outputs, each 1 or more")
        draw = torch.Generator().manual_seed(seed)
        self.parameters: list[Tensor] = []
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            # Divided by the root, a sum of many votes is about as large as one of them, and tanh
            # starts where it is steep.
            weights_OI = torch.randn(outputs, inputs, generator=draw, dtype=dtype) / inputs**0.5
            self.parameters += [weights_OI, torch.zeros(outputs, dtype=dtype)]
        self._inputs: list[Tensor] = []  # what each layer read, for the way back

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return the logits, one row for each row of inputs, and remember what each layer read."""
        self._inputs = []
        layers = list(zip(self.parameters[::2], self.parameters[1::2], strict=True))
        for number, (weights_OI, bias_O) in enumerate(layers):
            x_BI = x_BI.tanh() if number else x_BI
            self._inputs.append(x_BI)
            x_BI = x_BI @ weights_OI.T + bias_O
        return x_BI

    def backward(self, slopes_BO: Tensor) -> list[Tensor]:
        """Return the slopes along the parameters, in their order, given those along the logits.

        It goes back through the latest `forward`.
        """
        slopes: list[Tensor] = []
        for number in reversed(range(len(self._inputs))):
            x_BI, weights_OI = self._inputs[number], self.parameters[2 * number]
            slopes = [slopes_BO.T @ x_BI, slopes_BO.sum(dim=0), *slopes]
            # x is tanh of the sums before it (but for the first layer), and tanh' = 1 - tanh².
            slopes_BO = (slopes_BO @ weights_OI) * (1 - x_BI**2)
        return slopes


def train(network: MLP, batches: Iterable[tuple[Tensor, Tensor]], rate: float) -> list[float]:
    """Take one step of gradient descent for each batch of inputs and labels.

    Returns the loss of each batch, measured before its step.
    """
    losses = []
    for x_BI, labels_B in batches:
        loss, slopes_BC = cross_entropy(network.forward(x_BI), labels_B)
        for weights, slopes in zip(network.parameters, network.backward(slopes_BC), strict=True):
            weights -= rate * slopes
        losses.append(float(loss))
    return losses
