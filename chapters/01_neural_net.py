# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A neural network
#
# A small network that learns from its mistakes, with every slope worked out by hand.
#
# A chatbot is a long row of multiplications and additions, and the numbers in it were found by
# practice. Before you build a big one, build one that you can see whole. It looks at a display of
# 3×3 pixels and says which of four symbols is on it.
#
# **What you will build**
#
# 1. one neuron: a weighted vote of the pixels;
# 2. a layer of them, a measure of how wrong it is, and the plainest way to get better: nudge a
#    weight and look;
# 3. a picture puzzle that no single layer can solve, and a network with two hidden layers that can;
# 4. backpropagation: the slopes of all weights in one go, by hand, checked in two ways;
# 5. practice with noise, and a look at what the first layer has learned.
#
# **What you need:** Python, and school maths (a slope, a logarithm, a sum of products). No earlier
# chapter. The code runs in well under a minute; take an hour to read.

# %% tags=["export"]
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# %% [markdown]
# ## Four symbols
#
# Each pixel of the display is a number: 1 is white, −1 is black. A picture is nine numbers, row by
# row. They are all that the network will ever see.
#
# We keep numbers in PyTorch's **tensors**. A tensor is a table of numbers that may have any number of
# axes: a list has one, a table of rows and columns has two, a stack of such tables has three.
#
# One habit to get used to: the name of a tensor ends in letters that say what its axes are.
# `clean_BP` has one row for each picture of a **b**atch and one column for each **p**ixel. `C` stands
# for the classes, that is, the four symbols.

# %%
import itertools
import os
import time

from tinychat.book.picture import picture

FAST = os.environ.get("TINYCHAT_FAST") == "1"
NAMES = ("upright", "level", "cross", "ring")
DRAWINGS = (".#. .#. .#.", "... ### ...", "#.# .#. #.#", "### #.# ###")


def pixels(drawing: str) -> list[float]:
    """Nine numbers, row by row: `#` is white, `.` is black."""
    return [1.0 if mark == "#" else -1.0 for mark in drawing if mark != " "]


clean_BP = torch.tensor([pixels(drawing) for drawing in DRAWINGS])
labels_B = torch.arange(len(NAMES))
for name, drawing, row_P in zip(NAMES, DRAWINGS, clean_BP, strict=True):
    print(f"{name:>8}  {drawing}  {[int(x) for x in row_P.tolist()]}")

unlike_BB = (clean_BP[:, None] != clean_BP).sum(dim=2)
print("pixels in which two symbols differ:")
for name, row in zip(NAMES, unlike_BB.tolist(), strict=True):
    print(f"{name:>8} {row}")

# %% tags=["test"]
# Far enough apart that a little noise doesn't make two of them the same.
assert all(unlike_BB[i, j] >= 4 for i, j in itertools.combinations(range(4), 2))


# %%
def draw_grids(plt, rows_NP: Tensor, titles: Sequence[str], colours: str, columns: int):
    """Rows of nine numbers as 3x3 pictures, all with the same scale around zero."""
    lines = -(-len(rows_NP) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1.5 * columns, 1.8 * lines), squeeze=False)
    top = float(rows_NP.abs().max())
    for axis, row_P, title in zip(axes.flat, rows_NP, titles, strict=True):
        axis.imshow(row_P.view(3, 3).tolist(), cmap=colours, vmin=-top, vmax=top)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)  # white pixels have no edge of their own on white
    return figure


# %%
# alt: Four 3x3 pictures: a white upright bar, a level bar, a cross from corner to corner, a ring.
picture("01_symbols", lambda plt: draw_grids(plt, clean_BP, NAMES, "gray", 4))

# %% [markdown]
# ## One neuron: a weighted vote
#
# How would you recognise the cross? Let the pixels vote. A pixel that should be white gets the
# **weight** 1: if it is white, it votes for the cross, and if it is black, against. A pixel that
# should be black gets the weight −1. Multiply each pixel with its weight and add everything up. A
# last number, the **bias**, says how many votes are needed.
#
# That is a **neuron**. The word comes from biology, but there is no more to it than this sum.

# %%
weights_P = clean_BP[2]
bias = -4.0
votes_B = clean_BP @ weights_P + bias
for name, vote in zip(NAMES, votes_B.tolist(), strict=True):
    print(f"{name:>8}: {vote:+.0f}")

# %% tags=["test"]
# Nine pixels agree: 9. Each that differs turns +1 into -1: two less. Then the bias.
assert votes_B.tolist() == (9 - 2 * unlike_BB[2] - 4).tolist()
assert (votes_B > 0).tolist() == [False, False, True, False]

# %% [markdown]
# The sum can be any number, and often you want an answer between "surely no" and "surely yes".
# A **squashing function** presses the long line of numbers into a short one. Ours is the hyperbolic
# tangent, `tanh`: −1 for surely no, 1 for surely yes, and a soft slope between them.

# %%
for vote in (-5.0, -1.0, -0.1, 0.0, 0.1, 1.0, 5.0):
    squashed = float(torch.tensor(vote).tanh())
    print(f"{vote:+5.1f} → {squashed:+.3f} {' ' * round(20 * (squashed + 1))}●")

# %% [markdown]
# ## A layer: four votes at once
#
# Four symbols need four neurons, one each. Their weights are the rows of a matrix, and one matrix
# product, `@`, counts all votes for all pictures. It multiplies each row on the left with each
# *column* on the right, place by place, and adds up. So the rows of weights are turned into columns
# first: that is `.T`. All of this together is a **layer**.
#
# The four sums are called **logits**. To read them as probabilities, make them positive (e to the
# power of the logit) and let them add up to one (divide by their sum). That is the **softmax**.

# %%
weights_CP = clean_BP
bias_C = torch.zeros(4)
logits_BC = clean_BP @ weights_CP.T + bias_C
exp_C = logits_BC[3].exp()
shares_C = exp_C / exp_C.sum()
for name, logit, share in zip(NAMES, logits_BC[3].tolist(), shares_C.tolist(), strict=True):
    print(f"a ring looks like {name:>8}: logit {logit:+.0f}, probability {share:.4f}")

# %% tags=["test"]
torch.testing.assert_close(shares_C, logits_BC[3].softmax(dim=0))

# %% [markdown]
# ## How wrong is it?
#
# You wrote those weights yourself. Now throw them away. A network starts with random weights and
# must find its own, and for that it needs one number that says how badly it does: the **loss**.
#
# Take the probability that it gave to the right symbol. If that was 1, the loss is 0. The smaller
# it was, the larger the loss. Minus the logarithm does this, and it has a meaning: how *surprised*
# the network was by the truth. (We take the natural logarithm; its unit is called a **nat**.) The mean
# over all pictures is the **cross-entropy**. You will meet it again and again; a chatbot is trained
# with it too.

# %%
for probability in (1.0, 0.9, 0.5, 0.25, 0.01):
    print(f"probability {probability:4.2f} → loss {abs(-torch.tensor(probability).log()):.3f}")


def loss_of(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The mean of minus the logarithm of the right symbol's probability."""
    shares_BC = logits_BC.exp() / logits_BC.exp().sum(dim=1, keepdim=True)
    return -shares_BC[range(len(labels_B)), labels_B].log().mean()


print(f"\nyour own weights: loss {loss_of(logits_BC, labels_B):.5f}")
print(f"knowing nothing:  loss {loss_of(torch.zeros(4, 4), labels_B):.5f}")

# %% [markdown]
# ## Learning by nudging
#
# Think of an **orchestra**. Each weight is a musician. The orchestra plays the piece, and all that
# comes back from the hall is one number: how bad it sounded. What can a single musician do?
#
# Try this. One musician plays a little louder, all the others as before, and the orchestra plays
# the whole piece again. Did it sound worse or better, and by how much? The difference, divided by
# the size of the nudge, is the **slope** of the loss along this weight. Do it for every musician in
# turn. This method has a name, **finite differences**.


# %% tags=["export"]
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


# %% [markdown]
# Then all musicians change at once, each against its own slope: those who made it worse play
# softer, those who made it better play louder, and the steeper the slope, the more. Repeat. This is
# **gradient descent** (the gradient is the list of all slopes), and the size of the change is the
# **learning rate**. It's like walking downhill in fog: you feel only the slope under your feet, and
# it is enough.

# %%
draw = torch.Generator().manual_seed(0)
weights_CP = 0.1 * torch.randn(4, 9, generator=draw)
bias_C = torch.zeros(4)


def layer_loss() -> Tensor:
    """How badly the layer does on the four pictures."""
    return loss_of(clean_BP @ weights_CP.T + bias_C, labels_B)


begin = time.perf_counter()
nudging_losses = []
for step in range(21):
    nudging_losses.append(float(layer_loss()))
    if step % 5 == 0:
        right = ((clean_BP @ weights_CP.T + bias_C).argmax(dim=1) == labels_B).float().mean()
        print(f"step {step:2}: loss {nudging_losses[-1]:.4f}, {right:.0%} right")
    slopes = [finite_differences(layer_loss, weights, 1e-3) for weights in (weights_CP, bias_C)]
    weights_CP -= 0.3 * slopes[0]
    bias_C -= 0.3 * slopes[1]
played = 2 * (weights_CP.numel() + bias_C.numel())
print(f"{played} performances a step, {time.perf_counter() - begin:.2f} s")

# %% tags=["test"]
assert nudging_losses[-1] < 0.2 < nudging_losses[0]
assert right == 1

# %% [markdown]
# It works. Nobody told the layer what a cross is: only what it should have said.
#
# But count the performances. Two for every weight, and all of that for one single step. A chatbot
# has millions of weights, or billions. You need the slopes of all weights from *one* performance.
#
# ## The slope of the loss
#
# Begin at the end. How does the loss change when a logit changes? Write the loss of one picture
# with the logits $z_1 \dots z_C$ and the right symbol $y$:
#
# $$\ell = -\log \frac{e^{z_y}}{\sum_c e^{z_c}} = \log \sum_c e^{z_c} - z_y$$
#
# The slope of the logarithm of a sum is one over the sum, times the slope of the sum. That makes
# $e^{z_c} / \sum_k e^{z_k}$, which is the probability $p_c$ itself. The second part gives −1 for the
# right symbol and nothing for the others. So the slope is **what the network said minus what is
# true**:
#
# $$\frac{\partial \ell}{\partial z_c} = p_c - [c = y]$$
#
# ($\partial \ell / \partial z_c$ is the slope of the loss along $z_c$; the bracket is 1 where it is
# true, else 0.)
#
# There is one trap. e to the power of a large logit is more than a computer's number can hold, so
# subtract the largest logit first. That changes no probability, since it divides the top and the
# bottom by the same number.


# %% tags=["export"]
def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean surprise at the labels (nats) and its slopes along the logits, `[B, C]`."""
    rows = torch.arange(len(labels_B))
    # The largest logit of each row becomes 0: the same shares, and nothing overflows.
    shifted_BC = logits_BC - logits_BC.amax(dim=1, keepdim=True)
    logprobs_BC = shifted_BC - shifted_BC.exp().sum(dim=1, keepdim=True).log()
    slopes_BC = logprobs_BC.exp()
    slopes_BC[rows, labels_B] -= 1
    return -logprobs_BC[rows, labels_B].mean(), slopes_BC / len(labels_B)


# %%
logits_BC = torch.tensor([[2.0, 0.0, 1.0, 0.0]])
loss, slopes_BC = cross_entropy(logits_BC, torch.tensor([2]))
print("it says:     ", [round(x, 3) for x in logits_BC.softmax(dim=1)[0].tolist()])
print("the truth:   ", [0, 0, 1, 0])
print("the slopes:  ", [round(x, 3) for x in slopes_BC[0].tolist()])

# %% tags=["test"]
exact_BC, some_B = torch.randn(5, 4, generator=draw, dtype=torch.float64), torch.arange(5) % 4
nudged = finite_differences(lambda: cross_entropy(exact_BC, some_B)[0], exact_BC, 1e-5)
torch.testing.assert_close(cross_entropy(exact_BC, some_B)[1], nudged, atol=1e-8, rtol=0)
torch.testing.assert_close(cross_entropy(exact_BC, some_B)[0], loss_of(exact_BC, some_B))
assert cross_entropy(1000 * torch.eye(4), labels_B)[0] == 0  # the plain formula gives nan here

# %% [markdown]
# ## A puzzle for more than one layer
#
# Now the display can be **inverted**: black lines on white. A cross is still a cross. For you that
# is no harder. For a layer of votes it is impossible, and you can see why: turn every pixel around,
# and every vote turns around. What spoke for the cross now speaks against it.
#
# Train one layer on all eight pictures. From here on the slopes come from the formula: the logit is
# a sum of weight times pixel, so the slope along a weight is the slope along its logit times the
# pixel, added up over the pictures.

# %%
both_BP = torch.cat([clean_BP, -clean_BP])
both_B = torch.cat([labels_B, labels_B])
weights_CP = 0.1 * torch.randn(4, 9, generator=draw)
bias_C = torch.zeros(4)
for _step in range(500):
    one_layer_loss, slopes_BC = cross_entropy(both_BP @ weights_CP.T + bias_C, both_B)
    weights_CP -= 0.3 * slopes_BC.T @ both_BP
    bias_C -= 0.3 * slopes_BC.sum(dim=0)
logits_BC = both_BP @ weights_CP.T + bias_C
one_layer_B = logits_BC.argmax(dim=1)
print(
    f"loss {one_layer_loss:.4f} after 500 steps; knowing nothing costs {torch.tensor(4.0).log():.4f}"
)
print(f"{int((one_layer_B == both_B).sum())} of {len(both_B)} right")
print(f"the surest answer of all: {logits_BC.softmax(dim=1).max():.0%}")

# %% tags=["test"]
assert abs(one_layer_loss - torch.tensor(4.0).log()) < 1e-3
assert logits_BC.softmax(dim=1).max() < 0.35
# Of a picture and its negative, both can only be right for one symbol, the one with the best bias.
assert int((one_layer_B == both_B).sum()) <= 5

# %% [markdown]
# Training drove all answers towards equal shares. To say nothing is the best that a single layer
# can do here, and what it gets right, it gets right by luck.
#
# ## Hidden layers
#
# Don't let the pixels vote for a symbol at once. Let them vote for *hints* first ("the middle row
# is all one colour"), and then let the hints vote. Between the two stands the squashing function.
# A layer whose output you don't look at is called **hidden**, and our network has two of them.
#
# Without squashing, it would be for nothing: a vote of votes is only another vote. (In the names from
# here on, `I` counts the **i**nputs of a layer and `O` its **o**utputs. What one layer puts out, the
# next takes in.)

# %%
first_IP, second_CI = torch.randn(8, 9, generator=draw), torch.randn(4, 8, generator=draw)
two_layers_BC = both_BP @ first_IP.T @ second_CI.T
one_layer_BC = both_BP @ (second_CI @ first_IP).T
print(
    "two layers without squashing against one:", f"{(two_layers_BC - one_layer_BC).abs().max():.6f}"
)
squashed_BC = (both_BP @ first_IP.T).tanh() @ second_CI.T
print(
    "with squashing the difference is up to:  ", f"{(squashed_BC - one_layer_BC).abs().max():.6f}"
)

# %% tags=["test"]
torch.testing.assert_close(two_layers_BC, one_layer_BC, atol=1e-4, rtol=1e-4)

# %% [markdown]
# ## The chain rule, one weight at a time
#
# How does the loss depend on a weight that is deep inside? Take the smallest network that has an
# inside: one pixel $x$, one hidden neuron $h = \tanh(w x)$, one output $z = v h$, and as the loss
# the square of the distance from 1.
#
# Nudge $w$. Then $w x$ moves, $x$ times as much. Then $h$ moves, by that times the slope of tanh,
# which is $1 - h^2$. Then $z$ moves, $v$ times as much. Then the loss moves, by $2 (z - 1)$ times
# that. Each link of the chain only multiplies.

# %%
x, w, v = 0.5, 1.2, -0.8
h = float(torch.tensor(w * x).tanh())
z = v * h
links = {"loss by z": 2 * (z - 1), "z by h": v, "h by its sum": 1 - h**2, "the sum by w": x}
slope = 1.0
for name, link in links.items():
    slope *= link
    print(f"{name:>12}: times {link:+.4f} → {slope:+.4f}")

nudge = 1e-4
above, below = (
    (v * float(torch.tensor((w + way) * x, dtype=torch.float64).tanh()) - 1) ** 2
    for way in (nudge, -nudge)
)
print(f"{'by nudging':>12}: {' ' * 15}{(above - below) / (2 * nudge):+.4f}")

# %% tags=["test"]
assert abs(slope - (above - below) / (2 * nudge)) < 1e-6

# %% [markdown]
# Look at the order: from the loss **back** to the weight. On the way back, everything up to a
# neuron is shared by all the weights that feed it. So start at the end, go through the layers once,
# and hand each layer the slopes along its outputs. The layer does two things with them:
#
# 1. the slopes along its *weights*: output slope times input, added up over the pictures;
# 2. the slopes along its *inputs*: each input voted in several neurons, so add up output slope times
#    weight. Times $1 - h^2$, they are the output slopes for the layer before.
#
# This is **backpropagation** (Rumelhart, Hinton and Williams 1986). In the orchestra, no one has to
# play alone any more. The conductor hears the piece once and tells the last row how far off each of
# them was. They tell the row they were listening to, and so on to the first row. After one walk
# through the orchestra, each musician knows how to adjust.


# %% tags=["export"]
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


# %% [markdown]
# ## Do you trust it?
#
# Slopes by hand are easy to get wrong, and a wrong slope often still learns a little. So check them
# twice, with numbers of double precision: against nudging, and against **autograd**, PyTorch's own
# machine that does the same for any formula. From the next chapter on you let it do the work.

# %%
exact = MLP((9, 8, 8, 4), dtype=torch.float64)
exact_BP = both_BP.double()


def exact_loss() -> Tensor:
    return cross_entropy(exact.forward(exact_BP), both_B)[0]


begin = time.perf_counter()
by_nudging = [finite_differences(exact_loss, weights, 1e-5) for weights in exact.parameters]
middle = time.perf_counter()
by_hand = exact.backward(cross_entropy(exact.forward(exact_BP), both_B)[1])
end = time.perf_counter()

for weights in exact.parameters:
    weights.requires_grad_()
exact_loss().backward()
by_autograd = [weights.grad for weights in exact.parameters]


def furthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


weights_in_all = sum(weights.numel() for weights in exact.parameters)
print(f"{weights_in_all} weights and biases")
print(f"by hand against autograd: at most {furthest(by_hand, by_autograd):.1e} apart")
print(f"by hand against nudging:  at most {furthest(by_hand, by_nudging):.1e} apart")
print(f"nudging took {middle - begin:.3f} s, backpropagation {end - middle:.5f} s")

# %% tags=["test"]
assert furthest(by_hand, by_autograd) < 1e-6
assert furthest(by_hand, by_nudging) < 1e-6
assert middle - begin > 10 * (end - middle)

# %% [markdown]
# ## Practice
#
# The training loop of this chapter is the training loop of this whole book: look at a batch,
# measure the loss, find the slopes, take a step. Larger models only replace the parts.


# %% tags=["export"]
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


# %%
def share_right(network: MLP, x_BP: Tensor, labels_B: Tensor) -> float:
    return float((network.forward(x_BP).argmax(dim=1) == labels_B).float().mean())


network = MLP((9, 8, 8, 4))
before = share_right(network, both_BP, both_B)
begin = time.perf_counter()
losses = train(network, itertools.repeat((both_BP, both_B), 500), rate=0.3)
seconds = time.perf_counter() - begin
after = share_right(network, both_BP, both_B)
print(f"before: {before:.0%} right; after {len(losses)} steps: {after:.0%} ({seconds:.1f} s)")
print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")

# %% tags=["test"]
assert after == 1 and losses[-1] < 0.1 < one_layer_loss


# %%
# alt: The loss against steps: flat at 1.39 for one layer, falling towards zero for the network.
def draw_losses(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot(losses, color="#2a9d6f", label="two hidden layers")
    axis.axhline(float(one_layer_loss), color="#d9663d", linestyle="--", label="one layer")
    axis.set(xlabel="step", ylabel="loss in nats", ylim=(0, None))
    axis.legend()
    return figure


picture("01_loss", draw_losses)

# %% [markdown]
# ## What has it learned?
#
# Each neuron of the first layer has nine weights, one for each pixel, so draw them as a picture:
# red where it wants white, blue where it wants black, pale where it doesn't care. Nobody drew
# these.

# %%
# alt: Eight 3x3 pictures of first-layer weights, red and blue; each prefers another pattern.
hidden_names = [f"neuron {number}" for number in range(8)]
picture(
    "01_weights", lambda plt: draw_grids(plt, network.parameters[0], hidden_names, "coolwarm", 4)
)

# %% [markdown]
# Don't expect small crosses and rings. A neuron can only hint at things, and different hints
# together tell the symbols apart. Which picture excites which neuron is easier to read as a table:
# `+` for a clear yes, `-` for a clear no, `·` for anything between.

# %%
hidden_BI = (both_BP @ network.parameters[0].T + network.parameters[1]).tanh()
for number, row_I in enumerate(hidden_BI):
    name = NAMES[number % 4] + (" inverted" if number >= 4 else "")
    marks = "".join("+" if x > 0.5 else "-" if x < -0.5 else "·" for x in row_I.tolist())
    print(f"{name:>17}: {marks}")

second_BI = (hidden_BI @ network.parameters[2].T + network.parameters[3]).tanh()
places = {
    "the first hidden layer": hidden_BI,
    "the second hidden layer": second_BI,
    "the logits": network.forward(both_BP),
}
alike = {
    place: torch.cosine_similarity(rows_BI[:4], rows_BI[4:]).mean().item()
    for place, rows_BI in places.items()
}
print("\nhow alike a picture is to its negative (1: the same, -1: the opposite)")
for place, likeness in alike.items():
    print(f"{place:>23}: {likeness:+.2f}")

# %% tags=["test"]
# No two of the eight pictures look the same to the first layer.
assert torch.cdist(hidden_BI, hidden_BI).fill_diagonal_(9).min() > 0.1
first, second, last = alike.values()
assert first < -0.4 and first < second < last and last > 0.8

# %% [markdown]
# To the first layer, a picture and its negative are still rather opposite. Layer by layer they move
# together, because a hint and the opposite hint may lead to the same symbol.
#
# <!-- widget: pixels -->
#
# ## Noise
#
# Eight pictures can be learned by heart. Real displays flicker. Add random noise to each pixel, cut
# off at white and black, and show pictures that the network has never seen.
#
# Two networks compete. One has practised on the eight clean pictures only. The other has practised
# on noisy ones, new ones in every step. For comparison there is a judge that learned nothing: it
# knows the eight clean pictures and names the one that agrees best. You can't do much better.


# %%
def noisy(count: int, noise: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """That many pictures with noise of this strength on every pixel, and their labels."""
    chosen_B = torch.randint(len(both_B), (count,), generator=draw)
    x_BP = both_BP[chosen_B] + noise * torch.randn(count, 9, generator=draw)
    return x_BP.clamp(-1, 1), both_B[chosen_B]


def judge(x_BP: Tensor, labels_B: Tensor) -> float:
    return float((both_B[(x_BP @ both_BP.T).argmax(dim=1)] == labels_B).float().mean())


NOISE = 0.8
draw = torch.Generator().manual_seed(1)
practised = MLP((9, 16, 16, 4))
train(practised, (noisy(64, NOISE, draw) for _ in range(1000 if FAST else 4000)), rate=0.2)

print("noise   clean practice   noisy practice   judge")
by_noise = {}
for noise in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6):
    x_BP, truth_B = noisy(4000, noise, draw)
    by_noise[noise] = [share_right(one, x_BP, truth_B) for one in (network, practised)]
    by_noise[noise].append(judge(x_BP, truth_B))
    print(f"{noise:5.1f}" + "".join(f"{share:15.1%}" for share in by_noise[noise]))

# %% tags=["test"]
assert by_noise[0.0] == [1, 1, 1]
from_clean, from_noisy, ceiling = by_noise[NOISE]
assert from_clean + 0.05 < from_noisy
assert ceiling - 0.05 < from_noisy


# %%
# alt: Share of right answers against noise: all fall, and practice on clean pictures falls first.
def draw_noise(plt):
    figure, axis = plt.subplots(figsize=(7, 3.5))
    looks = (("#d9663d", "o-"), ("#2a9d6f", "s-"), ("#808080", "--"))
    titles = ("clean practice", "noisy practice", "judge")
    for column, ((colour, line), title) in enumerate(zip(looks, titles, strict=True)):
        shares = [row[column] for row in by_noise.values()]
        axis.plot(list(by_noise), shares, line, color=colour, label=title)
    axis.axhline(0.25, color="#808080", linewidth=0.8, linestyle=":")
    axis.set(xlabel="noise on each pixel", ylabel="right on new pictures", ylim=(0, 1.05))
    axis.legend()
    return figure


picture("01_noise", draw_noise)

# %% [markdown]
# Both networks have seen all eight symbols and know them perfectly. The second one has learned in
# addition what *doesn't* matter. A rule of thumb that holds for chatbots too: practise on what you
# will meet.
#
# ## Learned or remembered?
#
# Now let noisy pictures be scarce. Train on a handful, the same ones again and again. Then ask two
# questions: how many of *those* does the network get right, and how many new ones of the same kind?
# The first is the training score, the second the test score. The gap between them is what it has
# only remembered. That is called **overfitting**; what carries over is **generalisation**.

# %%
test_BP, test_B = noisy(4000, NOISE, draw)
gaps = {}
print("pictures   training score   test score")
for count in (8, 64, 512) if FAST else (8, 16, 32, 64, 128, 512):
    scores = []
    for seed in range(1 if FAST else 3):
        x_BP, truth_B = noisy(count, NOISE, torch.Generator().manual_seed(100 + seed))
        scarce = MLP((9, 16, 16, 4), seed)
        train(scarce, itertools.repeat((x_BP, truth_B), 500 if FAST else 1000), rate=0.3)
        scores.append([share_right(scarce, x_BP, truth_B), share_right(scarce, test_BP, test_B)])
    train_score, test_score = torch.tensor(scores).mean(dim=0).tolist()
    gaps[count] = train_score - test_score
    print(f"{count:8}{train_score:16.1%}{test_score:13.1%}")

# %% tags=["test"]
assert gaps[8] > 0.3 > 0.15 > gaps[512]

# %% [markdown]
# With few pictures the training score is perfect, and worthless. Only pictures that were kept apart
# tell you what a network has learned. So every chapter of this book keeps a part of its texts away
# from training, and the numbers that count come from there.
#
# ## Exercises
#
# **1. No squashing.** Train a network of the same sizes without `tanh` on the eight pictures. How
# low can its loss go? Say it before you try. (Overwrite two methods, or write the two lines of
# slopes by hand.)


# %% tags=["solution"]
class Flat(MLP):
    """The same layers, with nothing between them."""

    def forward(self, x_BI: Tensor) -> Tensor:
        self._inputs = []
        for weights_OI, bias_O in zip(self.parameters[::2], self.parameters[1::2], strict=True):
            self._inputs.append(x_BI)
            x_BI = x_BI @ weights_OI.T + bias_O
        return x_BI

    def backward(self, slopes_BO: Tensor) -> list[Tensor]:
        slopes: list[Tensor] = []
        for x_BI, weights_OI in zip(self._inputs[::-1], self.parameters[::2][::-1], strict=True):
            slopes = [slopes_BO.T @ x_BI, slopes_BO.sum(dim=0), *slopes]
            slopes_BO = slopes_BO @ weights_OI
        return slopes


flat = Flat((9, 8, 8, 4))
flat_losses = train(flat, itertools.repeat((both_BP, both_B), 1000), rate=0.1)
print(f"loss {flat_losses[-1]:.4f}, {share_right(flat, both_BP, both_B):.0%} right")
# Three layers of votes are one layer of votes: no better than knowing nothing.
assert abs(flat_losses[-1] - float(torch.tensor(4.0).log())) < 1e-2

# %% [markdown]
# **2. All the same.** Start with all weights at zero instead of random ones. What do the hidden
# neurons learn, and why? (Look at the slopes of the first layer.)

# %% tags=["solution"]
equal = MLP((9, 8, 8, 4))
for weights in equal.parameters:
    weights.zero_()
first_slopes = equal.backward(cross_entropy(equal.forward(both_BP), both_B)[1])
print("slopes of the first layer:", float(first_slopes[0].abs().max()))
train(equal, itertools.repeat((both_BP, both_B), 100), rate=0.3)
# What goes back is multiplied with the later weights, and those are zero: nothing arrives, ever.
assert all(float(weights.abs().max()) < 1e-6 for weights in equal.parameters)

# %% [markdown]
# **3. Too large a step.** Train with the learning rates 0.01, 0.1, 1, 10 and 100 for the same
# number of steps. Which is best, and what happens on either side of it?

# %% tags=["solution"]
ends = {}
for rate in (0.01, 0.1, 1.0, 10.0, 100.0):
    trial = MLP((9, 8, 8, 4))
    run = train(trial, itertools.repeat((both_BP, both_B), 200), rate=rate)
    ends[rate] = run[-1]
    print(f"rate {rate:6.2f}: loss {run[-1]:9.4f}, worst {max(run):9.4f}")
# Too small: it has hardly moved. Too large: it jumps over the valley and up the other side.
assert ends[1.0] < ends[0.1] < ends[0.01]
assert ends[100.0] > ends[1.0]

# %% [markdown]
# **4. A new picture.** Add a fifth symbol, a checkerboard of corners and middle-of-edges. Which of
# the four does it collide with when the display can be inverted? Find a fifth symbol that works,
# and train on all ten pictures.

# %% tags=["solution"]
board_P = torch.tensor(pixels("#.# .#. #.#"))
assert torch.equal(board_P, clean_BP[2])  # the checkerboard of 3x3 pixels *is* the cross
corner_P = torch.tensor(pixels("#.. #.. ###"))
five_BP = torch.cat([clean_BP, corner_P[None]])
ten_BP, ten_B = torch.cat([five_BP, -five_BP]), torch.arange(10) % 5
assert len({tuple(row) for row in ten_BP.tolist()}) == 10
wider = MLP((9, 8, 8, 5))
train(wider, itertools.repeat((ten_BP, ten_B), 500), rate=0.3)
print(f"five symbols: {share_right(wider, ten_BP, ten_B):.0%} right")
assert share_right(wider, ten_BP, ten_B) == 1

# %% [markdown]
# ## Check yourself
#
# 1. A network gives the right symbol the probability 1. What is the loss? And its slopes?
# 2. Why does nudging cost more the more weights there are, and backpropagation hardly?
# 3. Why can no single layer solve the puzzle with inverted pictures?
# 4. Training score 100 %, test score 40 %. What happened, and what helps?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. Zero, and zero: what it said minus what is true. It has nothing to learn from this picture.
# 2. Nudging needs two performances for each weight. Backpropagation needs one way forward and one
#    way back for all of them.
# 3. All votes turn around with the pixels. Only the bias stays, and it can favor just one symbol.
# 4. It has learned its pictures by heart. More different pictures, or noise on them, help.
#
# </details>
#
# ## What we left out
#
# - **Better steps.** Plain gradient descent goes straight down the slope. Momentum, Adam and Muon
#   remember earlier slopes; chapter 07 builds them.
# - **Other squashing functions.** Large networks use ones that are cheaper and don't flatten on both
#   sides. Chapter 06 compares some.
# - **Convolutions.** A symbol that is moved by one pixel is a new one to this network. Networks for
#   real pictures share their weights between places.
# - **Autograd itself.** PyTorch writes down each operation on the way forward and walks the list
#   back. The idea is what you built; the bookkeeping is theirs.
#
# ## Where this is in the package
#
# `tinychat/neural_net.py` holds `MLP`, `cross_entropy`, `train` and `finite_differences`. The
# chatbot doesn't use them: its network is built from PyTorch's parts, and its loop is chapter 07's.
# But the four steps are the same, and so is the loss.
#
# ## Sources
#
# - D. E. Rumelhart, G. E. Hinton, R. J. Williams:
#   [Learning representations by back-propagating errors](https://doi.org/10.1038/323533a0) (1986).
#   Backpropagation, and hidden neurons that find their own hints.
# - F. Rosenblatt:
#   [The perceptron](https://doi.org/10.1037/h0042519) (1958). The weighted vote that learns.
# - M. Minsky, S. Papert: *Perceptrons* (1969). What a single layer can't do.
# - Y. LeCun, L. Bottou, G. B. Orr, K.-R. Müller:
#   [Efficient BackProp](http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf) (1998). Why tanh, and
#   how large the first weights should be.
# - G. Cybenko:
#   [Approximation by superpositions of a sigmoidal function](https://doi.org/10.1007/BF02551274)
#   (1989). Even one hidden layer can come near to any function, if it is wide enough.
