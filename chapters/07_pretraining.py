# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Pretraining
#
# Teach the network to predict the next token: loss, optimizers, schedule, and a loop that survives.
#
# Chapter 06 left you with a GPT that knows nothing. Every next token seems equally likely to it.
# Now it reads. For every token of a text it says what it expects, sees what really comes, and
# changes its weights a little. Nobody marks the text up; the next word is the answer. That is all
# of pretraining, and almost all of what a language model knows comes from it.
#
# **What you will build**
#
# 1. **a loss**: how surprised the model was, without running out of memory;
# 2. **optimizers**: from plain gradient descent to AdamW and Muon;
# 3. **a schedule** of learning rates that leaves the end open;
# 4. **a loop** that fits a budget of minutes and survives being killed;
# 5. your own small **base model**, in half a minute;
# 6. a **scaling law**, measured here: what more weights and more text buy, and what GPT-3 cost.
#
# **What you need:** chapters 01 (slopes), 03 (tokens) and 06 (the network). The code takes about two
# minutes; reading it, an hour and a half. It is the longest chapter; the loss and the loop are worth
# a day each.

# %% tags=["export"]
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinychat.data.batch import Batch
from tinychat.gpt import GPT, preset
from tinychat.runtime.device import has_compiler, has_fast_bf16
from tinychat.runtime.errors import ConfigError, DataError, TinychatError
from tinychat.runtime.metrics import MetricsWriter
from tinychat.runtime.state import load_state, save_state
from tinychat.tokenizer import Tokenizer

# %%
import os
import random
import shutil
import tempfile

import torch.nn.functional as F

from tinychat.book.picture import picture
from tinychat.data import tokenizer_model
from tinychat.data.mix import Mix, Phase
from tinychat.data.prepare import prepare
from tinychat.gpt import GPTConfig, load_model, save_model
from tinychat.language_models import add_row, documents, held_out_text
from tinychat.runtime import checkpoint
from tinychat.runtime.device import describe_hardware, set_threads
from tinychat.runtime.errors import CheckpointError
from tinychat.runtime.metrics import read_metrics

FAST = os.environ.get("TINYCHAT_FAST") == "1"
PRESET = os.environ.get("TINYCHAT_PRESET", "nano")
MINUTES = float(os.environ.get("TINYCHAT_MINUTES", "0.5"))
BOOK = Path("runs/book")
set_threads()

# %% [markdown]
# ## Text becomes batches
#
# The book's own text is small: stories, explanations, dialogues, and the basics (short
# conversations on simple things), which come with the package. You turn it into token numbers once,
# and keep them in files, one for each source (a *shard*). A part of the documents is set aside and
# never trained on; that part tells you later whether the model learned to read or learned by heart.

# %%
tokenizer = Tokenizer(tokenizer_model())
shards = prepare(None, BOOK / "shards", tokenizer)
for split, sources in shards.items():
    for name, shard in sources.items():
        print(f"{split:>10} {name:>13}: {shard.tokens:8,} tokens of {shard.documents:5,} documents")

# %% [markdown]
# Training wants windows of equal length, from all sources, in a random order that it can repeat.
# `Mix` decides which window is the i-th by arithmetic alone. It remembers nothing, and that will
# pay off when a run has to go on where it was killed.
#
# A batch holds the same text twice. The targets are the inputs moved by one place: at every place,
# the target is the token that comes next. So a window of T tokens gives T exercises at once.

# %%
SEQUENCE, BATCH = (64, 4) if FAST else (128, 8)
WEIGHTS = {"stories": 2.0, "explanations": 1.0, "dialogues": 1.0, "basics": 1.0}


def book_batches(split: str, batch: int, sequence: int) -> Callable[[int, int], Iterator[Batch]]:
    """Return what `pretrain` below asks for: a function that yields batches from any step on."""

    def batches_from(step: int, steps: int) -> Iterator[Batch]:
        total = batch * steps
        mix = Mix(shards[split], [Phase(1.0, WEIGHTS)], sequence=sequence, seed=0, total=total)
        return mix.batches(step, batch, steps - step)

    return batches_from


batch = next(book_batches("train", BATCH, SEQUENCE)(0, 100))
print("inputs: ", batch.inputs_BT.shape, tokenizer.decode(batch.inputs_BT[0, :12].tolist()))
print("targets:", batch.targets_BT.shape, tokenizer.decode(batch.targets_BT[0, :12].tolist()))

# %% tags=["test"]
assert (batch.inputs_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
# The fifth batch is the fifth batch, whether you read the four before it or not.
batches_from = book_batches("train", BATCH, SEQUENCE)
fifth = list(islice(batches_from(0, 100), 5))[-1]
assert (fifth.inputs_BT == next(batches_from(4, 100)).inputs_BT).all()

# %% [markdown]
# ## Loss is surprise
#
# The model gives a probability to every token. You look up the one that it gave to the token that
# really came. If that was near one, the model wasn't surprised. If it was tiny, it was. **Surprise**
# is minus the logarithm of this probability: nothing for a certainty, and it grows without end as
# the probability shrinks. With the natural logarithm its unit is the *nat*, with base two the *bit*.

# %%
for probability in (1.0, 0.5, 0.1, 0.001, 1 / tokenizer.vocab_size):
    nats = math.log(1 / probability)
    print(f"probability {probability:8.4%}: {nats:5.2f} nats = {nats / math.log(2):5.2f} bits")

# %% [markdown]
# The last line is the surprise of a model that knows nothing. Ours starts there: its first loss must
# be the logarithm of the size of the vocabulary. If it isn't, something is broken before training
# has begun. Check it each time you build a model.

# %%
torch.manual_seed(0)
model = GPT(preset(PRESET))
inputs_BT, targets_BT = torch.from_numpy(batch.inputs_BT), torch.from_numpy(batch.targets_BT)
with torch.no_grad():
    logits_BTV = model(inputs_BT)
first_loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()).item()
print(f"{model.config.parameters / 1e6:.1f} M weights")
print(f"loss {first_loss:.3f}, knowing nothing {math.log(tokenizer.vocab_size):.3f}")

# %% tags=["test"]
assert abs(first_loss - math.log(tokenizer.vocab_size)) < 0.05

# %% [markdown]
# ## The loss without the logits
#
# Look at the shape of those logits: one score for every token of the vocabulary, at every place of
# every row. They are the largest thing in a training step by far.

# %%
config = preset("mini")
places = 32 * 256
print(f"hidden vectors of a step: {places * config.width * 4 / 1e6:7.1f} MB")
print(f"its logits:               {places * config.vocab_size * 4 / 1e6:7.1f} MB")

# %% [markdown]
# And they have to be read and written several times: for the largest, for the sum, for the gradient.
# Memory is slow, so this takes longer than the arithmetic.
#
# Two ideas help. The first: **do a few hundred places at a time**, small enough to stay in the
# processor's cache. Nobody needs all logits at once, only their loss. The second: **take the
# gradient right away**. Chapter 01 showed how simple the slope of cross-entropy is: the
# probabilities, minus one at the right answer. Everything that it needs is at hand in the moment you
# have the loss. So you never store logits for the backward pass at all.
#
# `share_N` says how much of the whole loss each place is: one over the number of places that count,
# and zero where a mask says that a place doesn't.


# %% tags=["export"]
def cross_entropy_chunk(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, share_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a few tokens, and its gradients by hand.

    `share_N` is each token's share of the total loss (1 / number of tokens, or 0 when masked).
    Returns the summed loss, the gradient for `h_ND`, and the gradient for `weight_VD`.

    The derivative of cross-entropy by the logits is `softmax(logits) - onehot(target)`, so the
    backward pass needs nothing that the forward pass has not just computed.
    """
    logits_NV = (h_ND @ weight_VD.T).float()
    norm_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    hit_N1 = logits_NV.gather(1, targets_N[:, None])
    loss = ((norm_N1 - hit_N1)[:, 0] * share_N).sum()
    target_NV = torch.arange(weight_VD.shape[0], device=h_ND.device) == targets_N[:, None]
    slope_NV = ((logits_NV - norm_N1).exp() - target_NV.float()) * share_N[:, None]
    slope_NV = slope_NV.to(h_ND.dtype)
    return loss, slope_NV @ weight_VD, slope_NV.T @ h_ND


# %% tags=["export"]
class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy against the tied embedding that never holds all logits at once.

    The scores of all tokens of a step are hundreds of megabytes, read and written several times
    over; those of a chunk stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        share_N: Tensor,
        chunk: int,
        function: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        weight = weight_VD.to(h_ND.dtype)
        loss = torch.zeros((), device=h_ND.device)
        h_grad_ND = torch.empty_like(h_ND)
        weight_grad_VD = torch.zeros_like(weight_VD)
        for start in range(0, len(h_ND), chunk):
            part = slice(start, start + chunk)
            part_loss, h_grad_ND[part], weight_grad = function(
                h_ND[part], weight, targets_N[part], share_N[part]
            )
            loss += part_loss
            weight_grad_VD += weight_grad
        ctx.save_for_backward(h_grad_ND, weight_grad_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        h_grad_ND, weight_grad_VD = ctx.saved_tensors
        return h_grad_ND * slope, weight_grad_VD * slope, None, None, None, None


# %% [markdown]
# Writing gradients by hand is a good way to be wrong. So compare with PyTorch's own function, in
# value and in both gradients. The chunk is chosen so that the last one is smaller, and some targets
# are masked.

# %%
torch.manual_seed(1)
h_ND = torch.randn(50, 16, requires_grad=True)
weight_VD = torch.randn(99, 16, requires_grad=True)
targets_N = torch.randint(99, (50,))
mask_N = (torch.rand(50) < 0.7).float()

ours = ChunkedCrossEntropy.apply(
    h_ND, weight_VD, targets_N, mask_N / mask_N.sum(), 16, cross_entropy_chunk
)
our_slopes = torch.autograd.grad(ours, (h_ND, weight_VD))
each_N = F.cross_entropy(h_ND @ weight_VD.T, targets_N, reduction="none")
theirs = (each_N * mask_N).sum() / mask_N.sum()
their_slopes = torch.autograd.grad(theirs, (h_ND, weight_VD))
print(f"loss: ours {ours.item():.6f}, PyTorch's {theirs.item():.6f}")
for name, a, b in zip(("hidden", "embedding"), our_slopes, their_slopes, strict=True):
    print(f"largest difference in the gradient of the {name}: {(a - b).abs().max():.1e}")

# %% tags=["test"]
torch.testing.assert_close(ours, theirs)
torch.testing.assert_close(our_slopes, their_slopes)

# %% [markdown]
# ## Fewer bits a number
#
# A number in `float32` takes 32 bits, in `bfloat16` half of that. It keeps the exponent, so that it
# reaches as far, and gives up digits: it knows about three of them.

# %%
for number in (3.14159265, 1e-30, 1e30, 256.0 + 1.0):
    short = torch.tensor(number, dtype=torch.bfloat16).item()
    print(f"{number:>14.8g} becomes {short:.8g}")

# %% [markdown]
# That is enough for multiplying matrices, where errors average out, and processors with the right
# instructions do it much faster. It is not enough for *adding up*: the last line shows a number that
# swallowed what was added to it. A weight that gets a tiny step each time would never move. So the
# rule is (Micikevicius et al. 2018, for its older cousin float16): products in few bits, sums and
# weights in many. PyTorch's `autocast` follows it.
#
# The class below puts the loss together: the model's hidden vectors under autocast, then the chunked
# cross-entropy with the embedding table (which is also the output layer, chapter 06). Where a C++
# compiler is at hand, `torch.compile` fuses small operations into large ones. Compilers on other
# people's machines are often broken, so the class can do without.


# %% tags=["export"]
class LossFunction:
    """The model's loss on a batch, compiled where a compiler is at hand.

    Returns the mean loss in nats over the unmasked targets, as a tensor to call `backward` on.
    `dtype` is the type of the matrix products (bfloat16 for speed, float32 for tests).
    """

    def __init__(
        self, model: GPT, *, dtype: torch.dtype = torch.bfloat16, compiled: bool = True
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.hidden: Callable[..., Tensor] = model.hidden
        self.chunk: Callable[..., tuple[Tensor, Tensor, Tensor]] = cross_entropy_chunk
        self.chunk_size = 512 if model.device.type == "cpu" else 8192
        self.compiled = compiled and has_compiler()
        if self.compiled:
            self.hidden = torch.compile(model.hidden, dynamic=False)
            self.chunk = torch.compile(cross_entropy_chunk, dynamic=False)

    def __call__(self, batch: Batch) -> Tensor:
        try:
            return self.loss(batch)
        except Exception as error:
            if not self.compiled:
                raise
            # A broken compiler shows when it is first used. If it wasn't the compiler, the same
            # error comes again, and this time it is raised.
            self.hidden, self.chunk, self.compiled = self.model.hidden, cross_entropy_chunk, False
            loss = self.loss(batch)
            logging.getLogger("tinychat").warning(
                "torch.compile failed (%s); going on without it, more slowly.",
                (str(error).strip() or type(error).__name__).splitlines()[0],
            )
            return loss

    def loss(self, batch: Batch) -> Tensor:
        """The loss as the object is set up now, compiled or not."""
        device = self.model.device
        # Arrays from the mix share their memory with the tensors; tensors pass through.
        inputs_BT = torch.as_tensor(batch.inputs_BT, device=device)
        targets_BT = torch.as_tensor(batch.targets_BT, device=device)
        mask_BT = torch.as_tensor(batch.mask_BT, device=device)
        segments_BT = batch.segments_BT
        if segments_BT is not None:
            segments_BT = torch.as_tensor(segments_BT, device=device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            h_BTD = self.hidden(inputs_BT, segments_BT=segments_BT)
        share_N = mask_BT.reshape(-1).float()
        return ChunkedCrossEntropy.apply(
            h_BTD.reshape(-1, h_BTD.shape[-1]).to(self.dtype),
            self.model.embed.weight,
            targets_BT.reshape(-1),
            share_N / share_N.sum().clamp(min=1),
            self.chunk_size,
            self.chunk,
        )


# %%
def seconds_a_step(dtype: torch.dtype) -> float:
    """The best time of a few losses with their gradients."""
    loss_function = LossFunction(model, dtype=dtype, compiled=False)
    times = []
    for _ in range(2 if FAST else 3):
        begin = time.perf_counter()
        loss_function(batch).backward()
        times.append(time.perf_counter() - begin)
        model.zero_grad()
    return min(times)


speeds = {"fp32": seconds_a_step(torch.float32), "bf16": seconds_a_step(torch.bfloat16)}
PRECISION = min(speeds, key=lambda name: speeds[name])
print("this processor's special instructions:", describe_hardware()["flags"])
for name, seconds in speeds.items():
    print(f"{name}: {BATCH * SEQUENCE / seconds:8,.0f} tokens a second")
print(f"the rest of this chapter uses {PRECISION}")

# %% [markdown]
# ## Downhill
#
# The gradient says for every weight in which direction the loss rises. **Gradient descent** goes the
# other way, by a small share of it: the *learning rate*.
#
# Its weakness shows in a long, narrow valley. Here is one with two weights. The loss is a hundred
# times steeper across than along. A rate that is safe across is far too small along; a rate that
# suits the long way throws you from wall to wall.


# %%
def valley(xy: Tensor) -> Tensor:
    return 0.5 * (xy[0] ** 2 + 100 * xy[1] ** 2)


def path(step: Callable[[Tensor, Tensor], None], count: int = 60) -> list[Tensor]:
    """Take `count` steps from the same start; return all places on the way."""
    xy = torch.tensor([3.0, 1.0], requires_grad=True)
    places = [xy.detach().clone()]
    for _ in range(count):
        (slope,) = torch.autograd.grad(valley(xy), xy)
        with torch.no_grad():
            step(xy, slope)
        places.append(xy.detach().clone())
    return places


paths = {}
for rate in (0.001, 0.01, 0.019, 0.021):
    paths[rate] = path(lambda xy, slope, rate=rate: xy.sub_(rate * slope))
    end = paths[rate][-1]
    print(f"gradient descent, rate {rate:5.3f}: the loss ends at {valley(end):9.2g}")

# %% [markdown]
# **Adam** keeps two running averages for each weight: of its gradient, and of its gradient squared.
# It divides the first by the root of the second. What is left is about the size of one, whether the
# gradient is measured in thousands or thousandths. So every weight takes steps of about the size of
# the learning rate. The two corrections make up for averages that start at zero. The W in **AdamW**
# (Loshchilov and Hutter 2019) is *weight decay*: each step also shrinks the weight itself a little.


# %%
class AdamWByHand:
    def __init__(
        self, rate: float, decay: float = 0.0, keep: float = 0.9, keep_square: float = 0.95
    ):
        self.rate, self.decay, self.keep, self.keep_square = rate, decay, keep, keep_square
        self.mean, self.square, self.count = torch.zeros(2), torch.zeros(2), 0

    def __call__(self, weight: Tensor, slope: Tensor) -> None:
        self.count += 1
        self.mean = self.keep * self.mean + (1 - self.keep) * slope
        self.square = self.keep_square * self.square + (1 - self.keep_square) * slope**2
        mean = self.mean / (1 - self.keep**self.count)
        square = self.square / (1 - self.keep_square**self.count)
        weight -= self.rate * self.decay * weight
        weight -= self.rate * mean / (square.sqrt() + 1e-8)


paths["Adam"] = path(AdamWByHand(rate=0.1))
end = paths["Adam"][-1]
print(f"Adam, the same rate for both weights: the loss ends at {valley(end):9.2g}")

# %% tags=["test"]
weights = torch.tensor([3.0, 1.0], requires_grad=True)
adam = torch.optim.AdamW([weights], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
for _ in range(60):
    adam.zero_grad()
    valley(weights).backward()
    adam.step()
torch.testing.assert_close(
    weights.detach(), path(AdamWByHand(rate=0.1, decay=0.2))[-1], atol=1e-5, rtol=1e-4
)
assert valley(paths[0.021][-1]) > valley(paths[0.021][0]), "too large a rate climbs out"


# %%
# alt: Three paths in a long valley: a low rate stops halfway, a high one zigzags, Adam walks down.
def draw_valley(plt):
    figure, axes = plt.subplots(3, 1, figsize=(7, 6), sharex=True, sharey=True)
    across, along = torch.linspace(-1.3, 1.3, 61), torch.linspace(-0.6, 3.3, 61)
    heights = 0.5 * (along**2 + 100 * across[:, None] ** 2)
    titles = {
        0.001: "gradient descent, rate 0.001",
        0.019: "gradient descent, rate 0.019",
        "Adam": "Adam, rate 0.1",
    }
    for number, (axis, (name, title)) in enumerate(zip(axes, titles.items(), strict=True)):
        axis.contour(
            along, across, heights, levels=[0.5, 2, 4.5, 15, 40, 80], colors="#808080", alpha=0.5
        )
        places = torch.stack(paths[name])
        axis.plot(places[:, 0], places[:, 1], "o-", markersize=3, linewidth=1, color=f"C{number}")
        axis.plot(0, 0, "*", color="#808080", markersize=12)
        axis.set_title(title, loc="left", fontsize=10)
    axes[1].set_ylabel("the steep weight")
    axes[2].set_xlabel("the flat weight")
    return figure


picture("07_valley", draw_valley)

# %% [markdown]
# ## Muon: all directions at once
#
# Adam treats a matrix as a bag of separate numbers. But a matrix does something as a whole: it turns
# and stretches. The **singular values** say by how much it stretches in each of its own directions.
# Look at those of a real gradient, of one matrix in the middle of a block, on the batch from above.

# %%
LossFunction(model, dtype=torch.float32, compiled=False)(batch).backward()
gradient = model.blocks[1].feed_forward.down.weight.grad.clone()
model.zero_grad()
before = torch.linalg.svdvals(gradient)
share = before.square().cumsum(0) / before.square().sum()
count = int((share < 0.9).sum()) + 1
print(f"{len(before)} directions; the strongest {count} hold 90 % of the gradient's size")

# %% [markdown]
# Some directions are loud, and the rest whisper. With plain steps, what whispers is learned last.
# But it may matter as much: what is rare in a text is quiet in its gradient. **Muon** (Jordan et al.
# 2024) makes all directions equally loud: it keeps them, and sets every singular value near one.
#
# The exact way is a singular value decomposition (chapter 04), $X = U S V^T$, and then $U V^T$: U and
# V only turn, so that $U^TU$ and $V^TV$ change nothing, and S holds the singular values. It is slow.
# The trick is a polynomial of odd powers,
#
# $$X \to aX + b(XX^T)X + c(XX^T)^2X.$$
#
# Put $U S V^T$ in. In $XX^TX$, every $V^TV$ and $U^TU$ in the middle cancels, and $U S^3 V^T$ is left:
# the directions stay as they are, only the singular values are cubed. So each value $s$ becomes
# $as + bs^3 + cs^5$. With the right three numbers, small values grow quickly and those near one stay
# about there. Five rounds do, and a round is only three products of matrices.


# %% tags=["export"]
def orthogonalize(gradients: Tensor, steps: int = 5) -> Tensor:
    """Move each matrix of `[N, rows, columns]` towards the nearest one with equal singular values.

    A Newton-Schulz iteration whose coefficients Keller Jordan (2024, Muon) tuned to be quick
    rather than exact: singular values end between about 0.7 and 1.2. Runs in bfloat16 where the
    machine computes that fast (elsewhere float32 takes a quarter of the time).
    """
    x = gradients.to(torch.bfloat16 if has_fast_bf16() else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        # x becomes 3.4445 x - 4.7750 (xx') x + 2.0315 (xx')² x; `baddbmm` multiplies and adds.
        square = x @ x.mT
        inner = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, inner, x, beta=3.4445)
    return x.mT if tall else x


# %%
after = torch.linalg.svdvals(orthogonalize(gradient[None])[0].float())
print("singular value     before    after")
for place in range(0, len(before), max(1, len(before) // 8)):
    bar = "█" * round(20 * float(after[place]))
    print(f"{place + 1:>10}.    {before[place] / before[0]:9.4f} {after[place]:8.2f} {bar}")

# %% tags=["test"]
torch.manual_seed(2)
wide = torch.randn(24, 40)
u, s, vt = torch.linalg.svd(wide, full_matrices=False)
found = orthogonalize(wide[None])[0].float()
values = torch.linalg.svdvals(found)
assert 0.6 < values.min() and values.max() < 1.3
# The directions are those of the exact answer: the angle between the two matrices is small.
assert F.cosine_similarity(found.flatten(), (u @ vt).flatten(), dim=0) > 0.95

# %% [markdown]
# The values needn't be exactly one; roughly equal is what matters. If some at the end of your table
# are smaller: they were so tiny that five rounds couldn't lift them, and there is little in them but
# noise.
#
# The optimizer adds momentum: it remembers a running average of past gradients and looks one step
# ahead with it (Nesterov's variant). All matrices of one shape go through the polynomial together,
# which keeps the processor busier than one after the other would.


# %% tags=["export"]
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the weight matrices inside the blocks (Jordan et al. 2024).

    A gradient matrix is mostly a few strong directions. Muon makes all directions equally
    strong, so that rare ones learn too. `lr` is the change in spectral norm a step; matrices
    taller than wide are scaled up by the root of the ratio.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(momentum, group["momentum"])
                by_shape.setdefault(weight.shape, []).append((weight, nesterov))
            for (rows, columns), pairs in by_shape.items():
                # Matrices of one shape go through the iteration together: one batched product.
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)


# %% [markdown]
# ## All settings in one place
#
# Muon is for matrices that turn vectors into vectors. The embedding is a table of rows, looked up
# one at a time, and the norms are lists of numbers; AdamW keeps those. The config holds what decides
# a run. A preset picks it, and a value without sense is refused before the first minute is spent.


# %% tags=["export"]
@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a pretraining run besides the model and the data."""

    steps: int = 0
    "optimizer steps in all; 0 lets the budget in minutes decide"
    batch: int = 32
    "sequences a micro-batch and process"
    sequence: int = 256
    "tokens a sequence"
    accumulate: int = 1
    "micro-batches an optimizer step"
    matrix_lr: float = 0.02
    "Muon's peak rate for the matrices in the blocks"
    vector_lr: float = 3e-3
    "AdamW's peak rate for embeddings and norms"
    weight_decay: float = 0.0
    "AdamW's decay of the embedding"
    warmup: float = 0.01
    "share of the steps in which the rates rise"
    decay: float = 0.3
    "share of the steps, at the end, in which the rates fall to zero"
    clip: float = 1.0
    "largest norm of the whole gradient"
    seed: int = 0
    "decides initial weights and the order of the data"
    precision: str = "auto"
    "bf16 or fp32 matrix products; auto takes bf16 where the machine computes it fast"
    compiled: bool = True
    "use torch.compile where a C++ compiler is installed"
    save_minutes: float = 3.0
    "time between saved states"
    evaluate_every: int = 250
    "steps between validations"

    def __post_init__(self) -> None:
        rules = (
            (("batch", "sequence", "accumulate", "evaluate_every"), 1, math.inf, "at least 1"),
            (("steps", "seed", "weight_decay"), 0, math.inf, "0 or more"),
            (("warmup", "decay"), 0, 1, "a share from 0 to 1"),
            (("matrix_lr", "vector_lr", "clip", "save_minutes"), 1e-12, math.inf, "above 0"),
        )
        for names, low, high, wanted in rules:
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}.")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"precision is {self.precision!r}; choose auto, bf16 or fp32.")

    @property
    def dtype(self) -> torch.dtype:
        short = has_fast_bf16() if self.precision == "auto" else self.precision == "bf16"
        return torch.bfloat16 if short else torch.float32


# %% tags=["export"]
def train_preset(name: str) -> TrainConfig:
    """Return the settings that suit a model preset; ConfigError for an unknown one."""
    preset(name)
    if name in ("nano", "mini"):
        return TrainConfig()
    if name == "small":  # for one GPU: 65,536 tokens a step
        return TrainConfig(batch=128, sequence=512, evaluate_every=100)
    return TrainConfig(batch=64, sequence=1024, accumulate=4, matrix_lr=0.015, evaluate_every=100)


# %% tags=["export"]
def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for every matrix in the blocks, AdamW for the embedding and the norms."""
    matrices = [w for w in model.blocks.parameters() if w.ndim == 2]
    inside = {id(w) for w in matrices}
    others = [w for w in model.parameters() if id(w) not in inside]
    groups = [
        {"params": [w for w in others if w.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [w for w in others if w.ndim != 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, config.matrix_lr),
        torch.optim.AdamW(groups, lr=config.vector_lr, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


# %%
settings = train_preset(PRESET)
for optimizer in make_optimizers(model, settings):
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    size = sum(weight.numel() for weight in weights)
    print(f"{type(optimizer).__name__:>6}: {len(weights):3} tensors, {size:10,} weights")

try:
    TrainConfig(batch=0)
except ConfigError as error:
    print(error)

# %% tags=["test"]
together = [
    w for o in make_optimizers(model, settings) for g in o.param_groups for w in g["params"]
]
assert sorted(map(id, together)) == sorted(map(id, model.parameters()))

# %% [markdown]
# ## Warm up, stay, fall
#
# The learning rate isn't the same all the time. At the *start* the averages of the optimizers rest
# on a handful of gradients, so you begin gently. At the *end* you want to settle: a walker who takes
# long strides never comes to rest at the bottom of the valley. In between, the rate stays flat.
#
# The popular alternative is a cosine, which falls all the way. It has to know the end from the
# start. The flat middle (Hu et al. 2024) doesn't: you can stop anywhere in it, add an hour, and only
# the fall moves.


# %% tags=["export"]
def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the factor on the learning rates at `step`: warm up, stay, fall (WSD).

    Hu et al. 2024 (MiniCPM): the long flat middle lets one run be stopped, or made longer, at any
    time, because only the fall at the end depends on where the end is.
    """
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return max(0.0, min(1.0, rise, fall))


# %%
for step in (*range(0, 100, 5), 99):
    factor = schedule(step, 100, warmup=0.1, decay=0.3)
    print(f"step {step:3} {'█' * round(40 * factor)} {factor:.2f}")

# %% tags=["test"]
assert schedule(0, 100, warmup=0.1, decay=0.3) == 0.1
assert schedule(50, 100, warmup=0.1, decay=0.3) == 1
assert schedule(85, 100, warmup=0.1, decay=0.3) == 0.5
assert 0 < schedule(99, 100, warmup=0.1, decay=0.3) < 0.05, "even the last step moves a little"

# %% [markdown]
# ## One step
#
# Now one step of training, in its five parts. Two things in it are for size. When a batch doesn't fit
# into memory, read it in pieces and let the gradients add up: *gradient accumulation*. When there
# are several processors, each reads a part of the batch and they average their gradients: *data
# parallelism*. Both change where the work is done, and not the result, as long as each piece counts
# equally many targets. (With chapter 09's masks they don't: then this is a mean of means.)
#
# **Clipping** is a safety belt. Once in a while a strange batch makes an enormous gradient. If the
# length of the whole gradient exceeds a bound, it is scaled back to it; its direction stays.


# %% tags=["export"]
def processes() -> tuple[int, int]:
    """Return this process's number, from 0, and how many train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes; one process alone changes nothing."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def largest(value: float, device: torch.device) -> float:
    """Return the largest value of all processes: for what they must decide alike."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


# %% tags=["export"]
def train_step(
    loss_function: LossFunction,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    factor: float,
    clip: float,
) -> tuple[float, float]:
    """Change the weights once, by the mean of the batches' mean losses, over all processes.

    `factor` scales the peak learning rates. Returns the loss and the norm of the gradient before
    clipping. Raises TinychatError, with all weights as they were, when either is not a number.
    """
    model = loss_function.model
    # 1. Gradients: each batch adds its share.
    total = torch.zeros((), device=model.device)
    for batch in batches:
        loss = loss_function(batch) / len(batches)
        loss.backward()
        total += loss.detach()
    # 2. The other processes' gradients.
    average([total, *(w.grad for w in model.parameters() if w.grad is not None)])
    # 3. Clip.
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if not math.isfinite(total.item()) or not math.isfinite(norm):
        rate = optimizers[0].param_groups[0]["peak_lr"]
        raise TinychatError(
            f"The loss became {total.item():g} and its gradient {norm:g}; resume with a lower "
            f"rate, for instance --set matrix_lr={rate / 2:g}."
        )
    # 4. Step, at this step's learning rates. 5. Forget the gradients.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total.item(), norm


# %% [markdown]
# The first test of any training loop: can it learn one batch by heart? If it can't, don't look any
# further. A tiny model will do.

# %%
TINY = GPTConfig(
    width=64, layers=1 if FAST else 2, heads=2, kv_heads=1, head_width=32, hidden=128, context=64
)
FEW = next(book_batches("train", 2, 32)(0, 10))
torch.manual_seed(0)
pupil = GPT(TINY)
plain = TrainConfig(precision="fp32", compiled=False)
loss_function = LossFunction(pupil, dtype=plain.dtype, compiled=False)
optimizers = make_optimizers(pupil, plain)
for step in range(61):
    loss, norm = train_step(loss_function, optimizers, [FEW], factor=1.0, clip=plain.clip)
    if step % 10 == 0:
        print(f"step {step:3}: loss {loss:7.4f}, length of the gradient {norm:6.3f}")

# %% tags=["test"]
assert loss < 0.05

# %% [markdown]
# ## A measure that travels
#
# Loss a token depends on how the tokenizer cuts the text. Longer tokens are fewer, and each is
# harder to guess. So two models with different tokenizers can't be compared by it. By **bits per
# byte** they can. You know them from chapter 02: add up the surprise in bits over a whole text, and
# divide by its length in bytes. Here is the same for batches of tokens.


# %% tags=["export"]
def bytes_of_tokens(tokenizer: Tokenizer) -> Tensor:
    """Return how many bytes of text each token stands for, `[V]`; control tokens stand for 0."""
    return torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


# %% tags=["export"]
@torch.no_grad()
def bits_per_byte(
    loss_function: LossFunction, batches: Iterable[Batch], token_bytes_V: Tensor
) -> float:
    """Return the bits that the model needs for each byte of text.

    A loss per token depends on how the tokenizer cuts; bits per byte can be compared between
    tokenizers. Targets that stand for no text (control tokens) don't count.
    """
    nats, size = 0.0, 0
    for batch in batches:
        bytes_BT = token_bytes_V[torch.as_tensor(batch.targets_BT)]
        counted_BT = (bytes_BT > 0) & torch.as_tensor(batch.mask_BT).bool()
        counted = replace(batch, mask_BT=counted_BT)
        nats += float(loss_function(counted)) * int(counted_BT.sum())
        size += int(bytes_BT[counted_BT].sum())
    return nats / math.log(2) / max(size, 1)


# %%
token_bytes_V = bytes_of_tokens(tokenizer)


def unseen() -> Iterable[Batch]:
    """The same windows of validation text each time."""
    count = 1 if FAST else 6
    return book_batches("validation", BATCH, SEQUENCE)(0, count)


untrained = bits_per_byte(
    LossFunction(model, dtype=torch.float32, compiled=False), unseen(), token_bytes_V
)
print(f"a byte has 8 bits; the untrained model needs {untrained:.2f} of them")

# %% [markdown]
# An untrained model does better than eight bits a byte, without knowing anything. The tokenizer did
# that: it was trained, and whoever writes in tokens has already packed the text.
#
# ## How long is a run?
#
# You rarely know how many steps you want. You know how long you can wait. So the loop takes minutes,
# times its first few steps, and works the rest out. The first step doesn't count, because compiling
# happens in it.


# %% tags=["export"]
class Progress(NamedTuple):
    """What the loop reports after every step."""

    step: int
    steps: int
    loss: float
    tokens: int
    tokens_per_second: float
    seconds_left: float
    bits_per_byte: dict[str, float]


class Result(NamedTuple):
    """How a run ended."""

    step: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    bits_per_byte: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


# %% tags=["export"]
class Budget:
    """How long a run is: so many steps or, when that is 0, as many as `minutes` allow.

    Minutes become steps by timing the first few; put those into `times`, then call `settle`.
    """

    TRIAL = 6
    FAR = 1_000_000
    "stands for the number of steps until it is known"

    def __init__(self, minutes: float, steps: int = 0):
        if not steps and not 0 < minutes < math.inf:
            raise ConfigError(f"The budget is {minutes:g} minutes; give a number above 0.")
        self.seconds = minutes * 60
        self.times: list[float] = []
        self.known = steps > 0
        self.steps = steps or self.FAR

    def settle(self, done: int, spent: float) -> None:
        """Fix the number of steps, after `done` steps in all and `spent` seconds of the budget."""
        # The first step compiles, so it tells nothing; the median ignores a disturbed one.
        typical = float(np.median(self.times[1:] or self.times))
        self.steps = done + max(1, round((self.seconds - spent) / typical))
        self.known = True


# %%
budget = Budget(minutes=1)
budget.times = [20.0, 0.4, 0.4, 3.0, 0.4]  # the first compiles, the fourth was disturbed
budget.settle(done=5, spent=24.2)
print(f"{budget.steps} steps in all")

# %% tags=["test"]
assert budget.steps == 5 + round((60 - 24.2) / 0.4)

# %% [markdown]
# ## A loop that survives
#
# Long runs get killed. The machine restarts, the battery dies, somebody needs the processor. So the
# loop saves its state every few minutes, and it saves *everything that the next step depends on*:
# the weights, what the optimizers remember, the number of the step. The data needs no saving, since
# `Mix` can begin at any step.
#
# The state is written under another name, and renamed when it is whole. Whatever moment a kill comes
# in, there is a whole state on the disk.


# %% tags=["export"]
def pack_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return weights and optimizer memory as one flat dictionary of tensors."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    tensors = {f"model/{name}": weight.detach() for name, weight in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for weight, memory in optimizer.state.items():
            for key, value in memory.items():
                tensors[f"optimizer{number}/{names[id(weight)]}/{key}"] = value
    return tensors


def unpack_state(
    tensors: Mapping[str, Tensor], model: GPT, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Put back what `pack_state` returned; ConfigError, and no change, for another model's."""
    parameters = dict(model.named_parameters())
    saved = {key.removeprefix("model/"): tensors[key] for key in tensors if key[:6] == "model/"}
    shapes = [{name: w.shape for name, w in part.items()} for part in (parameters, saved)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise ConfigError(
                f"The saved run has another model shape (at {name!r}); "
                "resume with the same preset, or start a new run with another --run name."
            )
    for name, weight in parameters.items():
        weight.data.copy_(saved[name])
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind != "model":
            name, _, field = rest.rpartition("/")
            optimizer = optimizers[int(kind.removeprefix("optimizer"))]
            # AdamW keeps its step counts on the CPU; everything else lives beside its weight.
            device = "cpu" if value.ndim == 0 else parameters[name].device
            optimizer.state[parameters[name]][field] = value.clone().to(device)


# %% tags=["export"]
def pretrain(
    model: GPT,
    batches_from: Callable[[int, int], Iterator[Batch]],
    config: TrainConfig,
    folder: str | Path,
    *,
    minutes: float = 0.0,
    validation: Mapping[str, Callable[[], Iterable[Batch]]] | None = None,
    token_bytes_V: Tensor | None = None,
    resume: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train `model` in place on next-token prediction, and keep the run's state in `folder`.

    `batches_from(micro_step, micro_steps)` yields this process's batches from that micro-step on;
    `micro_steps` is the total, so that the data can change towards the end. The total number of
    steps is `config.steps`, or what fits into `minutes`. A run killed at any moment and called
    again with `resume=True` goes on from its last saved state, with fixed steps to the same
    numbers; resuming with more `minutes` makes the run longer. Raises ConfigError when `folder`
    holds another run.
    """
    if validation and token_bytes_V is None:
        raise ValueError(
            "validation is in bits per byte: give token_bytes_V, the bytes of each token"
        )
    folder = Path(folder)
    rank, world = processes()
    started = time.monotonic()
    torch.manual_seed(config.seed)
    optimizers = make_optimizers(model, config)
    loss_function = LossFunction(model, dtype=config.dtype, compiled=config.compiled)

    # 1. Take up the saved state, or begin.
    saved = load_state(folder)
    if saved is not None and not resume:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    step, tokens, seconds_before, loss = 0, 0, 0.0, math.nan
    bits: dict[str, float] = {}
    budget_steps = config.steps
    if saved is not None:
        tensors, scalars = saved
        unpack_state(tensors, model, optimizers)
        step, tokens, seconds_before = scalars["step"], scalars["tokens"], scalars["seconds"]
        loss, bits = scalars.get("loss", loss), scalars.get("bits_per_byte", bits)
        if not config.steps and not minutes:
            budget_steps = scalars["steps"]
    budget = Budget(minutes, budget_steps)
    first_step, last_save = step, time.monotonic()
    recent: deque[float] = deque(maxlen=50)

    def stream() -> Iterator[Batch]:
        return batches_from(step * config.accumulate, budget.steps * config.accumulate)

    def spent() -> float:
        return time.monotonic() - started

    def save() -> None:
        if rank == 0:
            scalars: dict[str, Any] = {"step": step, "steps": budget.steps, "tokens": tokens}
            scalars |= {"seconds": seconds_before + spent(), "config": asdict(config)}
            scalars |= {"loss": loss, "bits_per_byte": bits}
            save_state(folder, pack_state(model, optimizers), scalars)

    log = MetricsWriter(folder / "metrics.jsonl", resume_step=step) if rank == 0 else nullcontext()
    with log as writer:
        batches, stopped = stream(), False
        while step < budget.steps and not stopped:
            step_started = time.monotonic()
            # 2. One step. Before the end is known, a new run rises and a resumed one is flat.
            factor = 1.0 if saved is not None else min(1.0, (step + 1) / 100)
            if budget.known:
                factor = schedule(step, budget.steps, config.warmup, config.decay)
            micro_batches = list(islice(batches, config.accumulate))
            if len(micro_batches) < config.accumulate:
                raise DataError(f"The text ended at step {step} of {budget.steps}; add more.")
            loss, norm = train_step(
                loss_function, optimizers, micro_batches, factor=factor, clip=config.clip
            )
            step += 1
            read = config.batch * config.sequence * config.accumulate * world
            tokens += read
            seconds = time.monotonic() - step_started
            # 3. Measure and report.
            row: dict[str, Any] = {"step": step, "loss": loss, "tokens": tokens}
            row |= {"lr": factor, "norm": norm}
            row |= {"tokens_per_second": read / seconds, "seconds": seconds}
            if validation and (step % config.evaluate_every == 0 or step == budget.steps):
                assert token_bytes_V is not None
                bits = row["bits_per_byte"] = {
                    name: bits_per_byte(loss_function, make(), token_bytes_V)
                    for name, make in validation.items()
                }
            if writer is not None:
                writer.write(row)
            # The first steps of a process compile, so they tell nothing about the time left.
            recent.append(seconds)
            settled = budget.known and step - first_step > 3
            left = (budget.steps - step) * float(np.median(recent)) if settled else math.nan
            on_step(Progress(step, budget.steps, loss, tokens, read / seconds, left, bits))
            # 4. Stop when asked to, know the budget, save.
            stopped = largest(should_stop(), model.device) > 0
            if not budget.known:
                budget.times.append(largest(seconds, model.device))
                if stopped or len(budget.times) == budget.TRIAL:
                    budget.settle(step, largest(spent(), model.device))
                    batches = stream()
            if budget.known and time.monotonic() - last_save > config.save_minutes * 60:
                save()
                last_save = time.monotonic()
    save()
    return Result(step, budget.steps, tokens, seconds_before + spent(), loss, bits)


# %% [markdown]
# Try it. The cell trains the tiny model for a dozen steps in one go. Then it trains a twin, which
# is stopped after five steps; a third model with other random weights takes the twin's state up and
# goes on. If anything was forgotten, the numbers will differ.

# %%
short = TrainConfig(steps=12, batch=2, sequence=32, precision="fp32", compiled=False)
feed = book_batches("train", short.batch, short.sequence)


def fresh(seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(TINY)


with tempfile.TemporaryDirectory() as place:
    unbroken = fresh(0)
    whole = pretrain(unbroken, feed, short, Path(place) / "unbroken")

    taken: list[int] = []
    part = pretrain(
        fresh(0), feed, short, Path(place) / "broken",
        on_step=lambda progress: taken.append(progress.step),
        should_stop=lambda: len(taken) == 5,
    )  # fmt: skip
    print(f"stopped at step {part.step} of {part.steps}, loss {part.loss:.4f}")

    third = fresh(seed=123)
    rest = pretrain(third, feed, short, Path(place) / "broken", resume=True)
    rows = read_metrics(Path(place) / "broken" / "metrics.jsonl")

print(f"resumed to step {rest.step}, loss {rest.loss!r}")
print(f"without a break,    loss {whole.loss!r}")
print("steps in the log:", [row["step"] for row in rows])

# %% tags=["test"]
assert rest.loss == whole.loss
for a, b in zip(unbroken.parameters(), third.parameters(), strict=True):
    assert torch.equal(a, b), "equal to the last bit"
assert [row["step"] for row in rows] == list(range(1, 13))

# %% [markdown]
# ## Your own base model
#
# Now for real. The cell trains the preset `nano` for half a minute. You can give it more: set
# `TINYCHAT_MINUTES=30` before you start Python, or `TINYCHAT_PRESET=mini` for a larger model, and
# run the same cells again. First listen to what it says untrained.


# %%
@torch.inference_mode()
def go_on(model: GPT, text: str, count: int = 24) -> str:
    """Continue a text, one draw at a time; chapter 08 does this properly."""
    draw = torch.Generator().manual_seed(len(text))
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    for _ in range(count):
        scores_V = model(torch.tensor([ids]))[0, -1] / 0.7
        ids.append(int(torch.multinomial(scores_V.softmax(-1), 1, generator=draw)))
    return tokenizer.decode(ids)


OPENINGS = ("Once there was a little", "The sun is", "Hello, how are")
for opening in OPENINGS:
    print(repr(go_on(model, opening)))

# %%
run = BOOK / "pretraining"
shutil.rmtree(run, ignore_errors=True)  # this cell begins anew each time it runs
live = replace(
    train_preset(PRESET),
    steps=5 if FAST else 0,
    batch=BATCH,
    sequence=SEQUENCE,
    precision=PRECISION,
    compiled=MINUTES >= 5,  # compiling takes a minute itself
    evaluate_every=100,
)


def say(progress: Progress) -> None:
    # While the budget isn't known yet, neither is the time left.
    if progress.step % 25 == 0 or progress.step == progress.steps:
        left = "?" if math.isnan(progress.seconds_left) else f"{progress.seconds_left:.0f} s"
        print(
            f"step {progress.step:4}  loss {progress.loss:.3f}  "
            f"{progress.tokens_per_second:6,.0f} tokens/s  left {left}"
        )


result = pretrain(
    model,
    book_batches("train", live.batch, live.sequence),
    live,
    run,
    minutes=MINUTES,
    validation={"unseen text": unseen},
    token_bytes_V=token_bytes_V,
    on_step=say,
)
model.eval()
print(f"{result.tokens:,} tokens in {result.seconds:.0f} seconds")
print(f"bits per byte on unseen text: {untrained:.3f} → {result.bits_per_byte['unseen text']:.3f}")

# %% tags=["test"]
assert result.finished
assert result.bits_per_byte["unseen text"] < untrained

# %% [markdown]
# And after. Don't expect sense: look for words that exist, and for pairs of words that could stand
# together. Then look at the number of tokens that it has read: a shelf of children's books, no more.

# %%
for opening in OPENINGS:
    print(repr(go_on(model, opening)))


# %%
# alt: Two curves over the steps of the run: the loss falls, the rate rises, stays, falls to zero.
def draw_run(plt):
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    above.plot(steps, [row["loss"] for row in rows])
    above.set_ylabel("loss in nats a token")
    below.plot(steps, [row["lr"] for row in rows], color="C1")
    below.set_ylabel("share of the peak rate")
    below.set_xlabel("step")
    return figure


picture("07_run", draw_run)

# %% [markdown]
# Save it. The file holds the weights, the tokenizer and where it all came from, and the next
# chapters go on from it.

# %%
info = save_model(
    BOOK / "base.safetensors",
    model,
    stage="base",
    tokenizer=tokenizer,
    lineage={
        "data": {name: {"licence": "CC0-1.0"} for name in WEIGHTS},
        "tokens": result.tokens,
        "steps": result.steps,
        "preset": PRESET,
        "hardware": describe_hardware(),
    },
    metrics={
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "curve": [[row["tokens"], row["loss"]] for row in read_metrics(run / "metrics.jsonl")],
    },
)
print(f"{info.path}: {info.bytes / 1e6:.1f} MB")

# %% tags=["test"]
again, _, _ = load_model(BOOK / "base.safetensors")
with torch.no_grad():
    told = F.cross_entropy(again(inputs_BT).flatten(0, 1), targets_BT.flatten())
    kept = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())
assert abs(told - kept) < 0.1, "eight bits a weight lose next to nothing"

# %% [markdown]
# ## A row for the table
#
# Chapter 02 began a table: all language models of this book on one text that none of them learned
# from, in bits per byte. There the counting models and the LSTM have their rows. Now add yours, and
# the shipped model's, if there is one. The tokens are different, and the measure doesn't mind.


# %%
def held_out_batches(length: int) -> Iterator[Batch]:
    """The held-out documents, each for itself and after `<|bos|>`, in pieces of `length` tokens."""
    for text in held_out_text()[: 2 if FAST else None]:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text.decode())]])
        for start in range(0, ids.shape[1] - 1, length):
            piece = ids[:, start : start + length + 1]
            yield Batch(piece[:, :-1], piece[:, 1:], torch.ones_like(piece[:, 1:]))


rivals = {f"GPT of chapter 07, {PRESET}": model}
try:
    shipped_model, its_tokenizer, _ = load_model(checkpoint.find("base"))
    if its_tokenizer.sha256 == tokenizer.sha256:
        rivals["base, as shipped"] = shipped_model
except CheckpointError:
    print("there is no shipped base model here")
scores = {}
for name, rival in rivals.items():
    rival_loss = LossFunction(rival, dtype=torch.float32, compiled=False)
    pieces = held_out_batches(rival.config.context)
    scores[name] = bits_per_byte(rival_loss, pieces, token_bytes_V)
    print(f"{name:>24} {scores[name]:6.3f} bits per byte")
if not FAST:  # which reads only a part of the text
    for name, bits in scores.items():
        bits_table = add_row(name, bits)
    print("\nthe table:")
    for name, bits in bits_table.items():
        print(f"{name:>24} {bits:6.3f} bits per byte")

# %% tags=["test"]
# The tokens of a text stand for all its bytes, and for no more: so the comparison is fair.
counted = sum(int(token_bytes_V[piece.targets_BT].sum()) for piece in held_out_batches(512))
assert counted == sum(map(len, held_out_text()[: 2 if FAST else None]))
# A model that knows nothing needs log2(V) bits for each token.
tokens_in_all = sum(piece.targets_BT.numel() for piece in held_out_batches(512))
know_nothing = tokens_in_all * math.log2(tokenizer.vocab_size) / counted
assert all(bits < know_nothing for bits in scores.values())

# %% [markdown]
# If your own row is worse than an n-gram's, don't be surprised: half a minute on a CPU is not much,
# and counting is quick. Give it an hour, and look again.
#
# ## Bigger and longer is better
#
# Your model is small, and it read little. What would help more: more weights, or more text? Don't
# guess. Train many small models and look.
#
# To make it quick, these models read **bytes**, as those of chapter 02 did. A table of 256 rows
# leaves even a tiny model some weights for the language. No text is read twice, each run has its own
# schedule down to zero, and all are judged on the same unseen text.

# %%
SIZES = ((8, 1), (16, 1), (32, 1)) if FAST else ((8, 1), (16, 1), (32, 2), (64, 2))
LENGTHS = (1_024, 2_048, 4_096) if FAST else (16_384, 32_768, 65_536, 131_072)
LONGER = 2 * LENGTHS[-1]  # for all but the largest, whose runs take the longest
ROWS, ROW = 8, 64


def byte_rows(texts: list[bytes]) -> Batch:
    """All texts as rows of bytes, one behind another."""
    stream = torch.tensor(list(b"\n\n".join(texts)))
    count = (len(stream) - 1) // ROW
    inputs, targets = (stream[shift : shift + count * ROW].view(count, ROW) for shift in (0, 1))
    return Batch(inputs, targets, torch.ones_like(inputs))


def some_rows(rows: Batch, which: Tensor) -> Batch:
    return Batch(rows.inputs_BT[which], rows.targets_BT[which], rows.mask_BT[which])


shuffled = documents("train")
random.Random(0).shuffle(shuffled)
reading, judging = byte_rows(shuffled), byte_rows(documents("validation"))
if FAST:
    judging = some_rows(judging, torch.arange(64))


def size(width: int, layers: int) -> GPTConfig:
    return GPTConfig(
        width=width, layers=layers, heads=max(1, width // 16), kv_heads=1, head_width=16,
        hidden=2 * width, vocab_size=256, context=ROW,
    )  # fmt: skip


def measure(config: GPTConfig, tokens: int, seed: int = 0) -> float:
    """Train a fresh model on so many bytes; return its loss on unseen text, in nats a byte."""
    torch.manual_seed(seed)
    scaled = GPT(config)
    settings = TrainConfig(precision="fp32", compiled=False, vector_lr=1e-2)
    loss_function = LossFunction(scaled, dtype=torch.float32, compiled=False)
    optimizers = make_optimizers(scaled, settings)
    steps = tokens // (ROWS * ROW)
    order = torch.randperm(steps * ROWS)
    for step, which in enumerate(order.view(steps, ROWS)):
        factor = schedule(step, steps, warmup=0.05, decay=0.3)
        rows = some_rows(reading, which)
        train_step(loss_function, optimizers, [rows], factor=factor, clip=settings.clip)
    with torch.no_grad():
        return float(loss_function(judging))


begin = time.perf_counter()
runs: dict[tuple[int, int], float] = {}  # (weights, bytes read): loss
print("   weights" + "".join(f"{n:10,}" for n in (*LENGTHS, LONGER)) + "  bytes read")
for width, layers in SIZES:
    config = size(width, layers)
    for length in LENGTHS if (width, layers) == SIZES[-1] else (*LENGTHS, LONGER):
        runs[config.parameters, length] = measure(config, length)
    losses = [loss for (weights_in, _), loss in runs.items() if weights_in == config.parameters]
    print(f"{config.parameters:10,}" + "".join(f"{loss:10.3f}" for loss in losses))
sizes = sorted({weights_in for weights_in, _ in runs})
print(f"{len(runs)} runs in {time.perf_counter() - begin:.0f} s")

# %% [markdown]
# Go along a line: more text. Go down a column: more weights. Both help, and neither is free: twice the
# text is twice the arithmetic, and so is twice the weights. Which is the better buy? For an answer
# you need more than a table.
#
# How much of a difference is luck? The same run with other seeds tells.

# %%
again = [measure(size(*SIZES[1]), LENGTHS[1], seed) for seed in range(1 if FAST else 3)]
print("same run, other seeds:", "  ".join(f"{loss:.3f}" for loss in again))

# %% [markdown]
# Keep that spread in mind when you compare two neighbours in the table.

# %% tags=["test"]
smallest, largest_size = sizes[0], sizes[-1]
for weights_in in sizes:
    assert runs[weights_in, LENGTHS[-1]] < runs[weights_in, LENGTHS[0]], "more text helps"
assert runs[largest_size, LENGTHS[-1]] < runs[smallest, LENGTHS[-1]], "more weights help"

# %% [markdown]
# ## A law
#
# Kaplan et al. (2020) found that such tables follow **power laws**: each doubling takes away the
# same *share* of what can still be taken away. Hoffmann et al. (2022) wrote it as a sum of three
# parts, for N weights and D tokens:
#
# $$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$
#
# $E$ is what no model can know: the surprise in the text itself. The second part is the price of
# being small, the third that of having read little.
#
# Five unknown numbers, and a trick to find them: if you knew the two exponents, the rest would be a
# plain least-squares problem. So try a grid of exponents, solve for the rest, keep the best.


# %%
class Law(NamedTuple):
    """Loss in nats from weights and tokens (Hoffmann et al. 2022, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        return self.E + self.A / N**self.alpha + self.B / D**self.beta


def fit_law(points: Mapping[tuple[int, int], float]) -> Law:
    """The law with the smallest relative errors; none of its parts may be negative."""
    grid = torch.linspace(0.05, 1.5, 59, dtype=torch.float64)
    alphas, betas = (exponent.flatten() for exponent in torch.meshgrid(grid, grid, indexing="ij"))
    N_P, D_P = torch.tensor(list(points), dtype=torch.float64).T
    loss_P = torch.tensor(list(points.values()), dtype=torch.float64)
    # Small numbers for the solver: N and D in units of their mean.
    N_mean, D_mean = float(N_P.log().mean().exp()), float(D_P.log().mean().exp())
    parts_GP3 = torch.stack(
        [
            torch.ones(len(alphas), len(loss_P), dtype=torch.float64),
            (N_P / N_mean) ** -alphas[:, None],
            (D_P / D_mean) ** -betas[:, None],
        ],
        dim=-1,
    )
    relative_GP3 = parts_GP3 / loss_P[:, None]
    wanted_GP1 = torch.ones(len(alphas), len(loss_P), 1, dtype=torch.float64)
    found_G3 = torch.linalg.lstsq(relative_GP3, wanted_GP1).solution[..., 0]
    error_G = (torch.einsum("gpk,gk->gp", relative_GP3, found_G3) - 1).square().sum(-1)
    error_G[(found_G3 < 0).any(-1)] = math.inf
    best = int(error_G.argmin())
    alpha, beta = float(alphas[best]), float(betas[best])
    E, A, B = found_G3[best].tolist()
    return Law(E, A * N_mean**alpha, B * D_mean**beta, alpha, beta)


# %% tags=["test"]
# A law that you know must come out again.
known_law = Law(E=1.0, A=20.0, B=300.0, alpha=0.4, beta=0.6)
found_law = fit_law({(N, D): known_law.loss(N, D) for N in sizes for D in LENGTHS})
assert abs(found_law.alpha - 0.4) < 1e-6 and abs(found_law.beta - 0.6) < 1e-6
assert abs(found_law.E - 1) < 1e-6 and abs(found_law.A / 20 - 1) < 1e-6

# %% [markdown]
# A law is worth something if it foretells what it hasn't seen. So hide the largest run with the most
# text, fit the others, and predict it. Then leave out each of the others in turn, to see how firmly
# the numbers stand.

# %%
hidden_run = (sizes[-1], LENGTHS[-1])
known_runs = {place: loss for place, loss in runs.items() if place != hidden_run}
law = fit_law(known_runs)
print(f"E {law.E:.2f}, alpha {law.alpha:.2f}, beta {law.beta:.2f}")
others = [fit_law({p: loss for p, loss in known_runs.items() if p != left}) for left in known_runs]
for name in ("E", "alpha", "beta"):
    values = [getattr(other, name) for other in others]
    print(f"with one run left out, {name} lies between {min(values):.2f} and {max(values):.2f}")
error = max(abs(law.loss(*place) / loss - 1) for place, loss in known_runs.items())
print(f"it misses the runs that it was fitted to by at most {error:.1%}")
foretold = law.loss(*hidden_run)
print(f"the hidden run: {foretold:.3f} foretold, {runs[hidden_run]:.3f} measured", end=" ")
print(f"({foretold / runs[hidden_run] - 1:+.1%})")

# %% tags=["test"]
assert FAST or error < 0.1
assert FAST or abs(foretold / runs[hidden_run] - 1) < 0.08


# %%
# alt: Loss against text read, a line a size: all fall; loss against compute: the best fall together.
def draw_scaling(plt):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for number, weights_in in enumerate(sizes):
        lengths = [length for some, length in runs if some == weights_in]
        losses = [runs[weights_in, length] for length in lengths]
        compute = [6 * weights_in * length for length in lengths]
        look = {"color": f"C{number}", "label": f"{weights_in:,} weights"}
        left.plot(lengths, losses, "o", **look)
        dense = torch.logspace(math.log10(lengths[0]), math.log10(lengths[-1]), 30).tolist()
        left.plot(dense, [law.loss(weights_in, D) for D in dense], ":", color=f"C{number}")
        right.plot(compute, losses, "o-", linewidth=1, **look)
    left.set(xlabel="bytes read (dotted: the law)", ylabel="nats a byte, unseen text")
    right.set(xlabel="operations, 6ND")
    for axis in (left, right):
        axis.set_xscale("log")
    left.set_xticks([*LENGTHS, LONGER], [f"{length // 1024} K" for length in (*LENGTHS, LONGER)])
    left.minorticks_off()
    left.legend(fontsize=8)
    return figure


picture("07_scaling", draw_scaling)

# %% [markdown]
# Be careful with these numbers. Each of these models has read a thin book at most. Some runs are so
# short that they measure how fast a model *starts* to learn, and the exponents lean on a few of them:
# that is what the ranges above say. About $E$ they say next to nothing, since no run comes near it.
# Real fits use hundreds of runs over a far wider range of compute. The shape is the point. It held
# over many powers of ten, and it is the reason why anybody dared to pay for the largest models.
#
# ## What does it cost?
#
# For each token, each weight takes part in one multiplication and one addition on the way forward,
# and in twice as many on the way back. That makes six operations a weight and token. Train N weights
# on D tokens, and the compute is
#
# $$C \approx 6ND.$$
#
# Look at the right half of the picture, where each run stands above its compute. The larger the model,
# the further to the right its line begins. For a given compute one of the lines is lowest: a smaller
# model is nearly full, a larger one has not read enough. Hoffmann et al. (2022) found that N and D
# should grow together, and the best balance near twenty tokens a weight. The cell works out what that
# means for the presets, at the speed that you just measured, and on one data-centre GPU.

# %%
GPU_SPEED = 4e14  # operations a second: an H100 that reaches two fifths of its peak in bf16
speed = result.tokens / result.seconds * model.config.flops_per_token(live.sequence)
print(f"this run: {6 * model.config.parameters * result.tokens:.1e} operations by the formula,")
print(f"{speed / 1e9:.0f} billion a second, attention and validation included\n")
print("preset      weights   20 tokens each  operations   here           GPU")
for name in ("nano", "mini", "small", "medium"):
    N = preset(name).parameters
    D = 20 * N
    C = 6 * N * D
    print(
        f"{name:>6} {N / 1e6:8.1f} M {D / 1e6:12,.0f} M {C:11.1e} "
        f"{C / speed / 3600:10,.1f} h {C / GPU_SPEED / 60:9.2f} min"
    )

# %% [markdown]
# Small models for use are trained on far more tokens than that: the balance minimises the cost of
# *training*, and a smaller model that has read more is cheaper each time it answers.
#
# ## The bill for GPT-3
#
# The same formula works for the model behind the first ChatGPT's ancestors. Brown et al. (2020) name
# its weights and its tokens. Patterson et al. (2021) measured how fast each of its GPUs really
# computed, and how much power it drew. Prices are not published, so ours are assumptions: put in your
# own. Every one has its name in the cell.

# %%
WEIGHTS_OF_GPT3, TOKENS_OF_GPT3 = 175e9, 300e9  # Brown et al. 2020, tables 2.1 and D.1
V100_SPEED = 24.6e12  # operations a second, measured in training (Patterson et al. 2021, table 4)
V100_WATTS = 330  # the GPU with its share of the server, measured (the same table)
V100_COUNT = 10_000  # as many as were used (the same table)
OVERHEAD = 1.10  # cooling and losses of the data centre (the same table)
V100_PRICE = 1.50  # dollars an hour: assumed, for a large customer in 2020
H100_WATTS, H100_PRICE = 1_000, 2.50  # with its share of the server; both assumed
HOUSEHOLD = 3_500  # kWh of electricity a year, assumed: a family's flat in Europe
LAPTOP_WATTS = 30  # assumed, for your run above

compute = 6 * WEIGHTS_OF_GPT3 * TOKENS_OF_GPT3
print(f"GPT-3: 6 x {WEIGHTS_OF_GPT3:.3g} x {TOKENS_OF_GPT3:.3g} = {compute:.2e} operations")
bills = {}
for name, each, watts, price in (
    ("V100, as then", V100_SPEED, V100_WATTS, V100_PRICE),
    ("H100", GPU_SPEED, H100_WATTS, H100_PRICE),
):
    hours = compute / each / 3600
    energy = hours * watts / 1000 * OVERHEAD  # kWh
    bills[name] = (hours, energy, hours * price)
    print(f"{name:>13}: {hours:12,.0f} GPU hours, {hours / V100_COUNT / 24:5.1f} days on", end=" ")
    print(f"{V100_COUNT:,}, {energy / 1000:6,.0f} MWh", end=" ")
    print(f"({energy / HOUSEHOLD:4,.0f} households a year), {hours * price / 1e6:4.1f} M dollars")
own_energy = result.seconds / 3600 * LAPTOP_WATTS
print(f"your run: {own_energy:.2f} Wh; GPT-3's then {bills['V100, as then'][1] * 1000:.1e} Wh")
print(f"GPT-3 read {TOKENS_OF_GPT3 / WEIGHTS_OF_GPT3:.1f} tokens a weight")

# %% tags=["test"]
# Published values: 3.14e23 operations (Brown et al.), 14.8 days and 1,287 MWh (Patterson et al.).
hours, energy, _ = bills["V100, as then"]
assert abs(compute / 3.14e23 - 1) < 0.01
assert abs(hours / V100_COUNT / 24 / 14.8 - 1) < 0.02
assert abs(energy / 1_287_000 - 1) < 0.02

# %% [markdown]
# Our formula comes out within a few per cent of what was reported. That is the final run alone.
# Experiments before it, failed runs, and above all the years of answering afterwards come on top.
#
# Was it money well spent? Put a law fitted to large models in place of yours (the values are Besiroglu
# and others' 2024, who mended the fit of Hoffmann and others), and ask it for the best N and D for
# the same compute.


# %%
def best_split(law: Law, compute: float) -> tuple[float, float]:
    """The N and D with 6ND = compute and the lowest loss: where the slope along N is zero."""
    both = law.alpha + law.beta
    balance = (law.alpha * law.A / (law.beta * law.B)) ** (1 / both)
    N = balance * (compute / 6) ** (law.beta / both)
    return N, compute / 6 / N


LARGE = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
N, D = best_split(LARGE, compute)
print(f"best for GPT-3's compute: {N / 1e9:.0f} G weights, {D / 1e12:.2f} T tokens,", end=" ")
print(f"{D / N:.0f} tokens a weight")
as_it_was, as_it_could = LARGE.loss(WEIGHTS_OF_GPT3, TOKENS_OF_GPT3), LARGE.loss(N, D)
print(f"loss by this law: {as_it_was:.3f} as it was, {as_it_could:.3f} at its best")

# %% tags=["test"]
# No neighbour with the same compute is better.
for factor in (0.8, 0.98, 1.02, 1.25):
    assert LARGE.loss(N * factor, D / factor) > LARGE.loss(N, D)
assert 10 < D / N < 30
assert 2.5 < WEIGHTS_OF_GPT3 / N < 4 and 2.5 < D / TOKENS_OF_GPT3 < 4  # "a third", "three times"

# %% [markdown]
# A model of a third of the size that had read three times as much would have been better, for the
# same bill. It is also cheaper to use, every single time. After Hoffmann and others had shown this,
# models were built smaller and read more.
#
# ## The real run
#
# Where a trained base model is at hand, it brings its own history, loss and settings. The cell reads
# them from the file and works out the learning rate from the settings, with the `schedule` that you
# built.

# %%
try:
    shipped = checkpoint.read_info(checkpoint.find("base"))
except CheckpointError:
    shipped = None
    print("there is no shipped base model here")
else:
    print(f"{shipped.path.name}: {shipped.parameters / 1e6:.1f} M weights")
    lineage = shipped.lineage
    print(f"{lineage.get('tokens', 0) / 1e6:.1f} M tokens, {lineage.get('minutes', '?')} minutes,")
    print(f"{lineage.get('tokens', 0) / shipped.parameters:.1f} tokens a weight")
    for name, value in shipped.metrics.get("bits_per_byte", {}).items():
        print(f"  {value:.3f} bits per byte on unseen {name}")

# %%
curve = shipped.metrics.get("curve", []) if shipped else []
kept_settings = shipped.lineage.get("settings") if shipped else None
if long_enough := len(curve) > 20 and kept_settings is not None:
    total = curve[-1][0]
    falls_from = (1 - kept_settings["decay"]) * total
    # The largest rise above what the loss had already reached: was the run finished before?
    lowest, lowest_at, rise, resumed_at = math.inf, 0, 0.0, 0
    for tokens, loss in curve:
        if loss < lowest:
            lowest, lowest_at = loss, tokens
        elif loss - lowest > rise:
            rise, resumed_at = loss - lowest, lowest_at
    if rise > 0.1:
        print(f"after {resumed_at / 1e6:.1f} M tokens the loss rose by {rise:.2f}:", end=" ")
        print("the rate was turned up again there")
    else:
        resumed_at = 0
    before = next(loss for tokens, loss in curve if tokens >= falls_from)
    print(f"the rate falls from {falls_from / 1e6:.1f} M tokens on:", end=" ")
    print(f"the loss goes from {before:.2f} to {curve[-1][1]:.2f}")


# %%
# alt: The shipped model's loss over its run; below, the rate: a short rise, a long flat, a fall.
def draw_real_run(plt):
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    above.plot([tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve], ".-")
    above.set_ylabel("loss in nats a token")
    # The settings speak of the last stretch; how the rate went before it, the file doesn't say.
    stretch = [tokens for tokens, _ in curve if tokens >= resumed_at]
    warmup, fall = kept_settings["warmup"], kept_settings["decay"]
    rates = [schedule(round(1000 * tokens / total), 1000, warmup, fall) for tokens in stretch]
    below.plot([tokens / 1e6 for tokens in stretch], rates, color="C1")
    below.set(ylabel="share of the peak rate", xlabel="million tokens read", ylim=(0, 1.1))
    for axis in (above, below):
        axis.axvspan(falls_from / 1e6, total / 1e6, color="#808080", alpha=0.15)
    return figure


if long_enough:
    picture("07_real_run", draw_real_run)

# %% [markdown]
# **Warm-up, stable, decay**, in a run that lasted longer than yours. At first the loss falls off a
# cliff: which tokens are common, which pairs. Then it flattens, while the rate stays. In the grey
# part the rate falls. In the flat part long strides shake the weights about the valley; shorter
# strides let them settle, and what was learned earlier *becomes visible*.
#
# If there is a dent in the middle, you see that twice. A run that was finished, its rate at zero, was
# made longer: the rate goes up again, and at once the weights are shaken out of what they had settled
# in. The second fall brings it back, and more (Wen et al. 2024 describe it, with a picture of a river
# in its valley).
#
# One caution. While the rate falls, our recipe also changes the *texts*: near the end it reads more
# of what the chatbot shall resemble, and some of that is easier to predict. So this curve flatters the
# fall. Only a loss on the same unseen text would be fair; the lab notes have some.
#
# ## Exercises
#
# **1. Another end.** Write `cosine(step, steps, warmup)`: a linear rise, then half a cosine wave down
# to zero. Half-way between the end of the rise and the end of the run, what share of the peak is
# left, compared with our schedule?


# %% tags=["solution"]
def cosine(step: int, steps: int, warmup: float) -> float:
    rise = (step + 1) / max(1.0, warmup * steps)
    past = max(0.0, (step - warmup * steps) / (steps - warmup * steps))
    return min(1.0, rise) * (1 + math.cos(math.pi * past)) / 2


print(f"cosine {cosine(55, 100, 0.1):.2f}, ours {schedule(55, 100, 0.1, 0.3):.2f}")
assert cosine(0, 100, 0.1) == 0.1
assert abs(cosine(55, 100, 0.1) - 0.5) < 1e-9
assert cosine(100, 100, 0.1) < 1e-9

# %% [markdown]
# **2. What does memory cost?** How many bytes does training keep for each weight: the weight, its
# gradient, and what the optimizer remembers? Write `bytes_to_train(optimizer)`, which measures it
# after a step. Which of the two optimizers is the cheaper one, and why?


# %% tags=["solution"]
def bytes_to_train(optimizer: torch.optim.Optimizer) -> float:
    kept, count = 0, 0
    for group in optimizer.param_groups:
        for weight in group["params"]:
            memory = [value for value in optimizer.state[weight].values() if value.ndim > 0]
            kept += 4 * weight.numel() + 4 * weight.numel()  # itself and its gradient
            kept += sum(value.numel() * value.element_size() for value in memory)
            count += weight.numel()
    return kept / count


for optimizer in optimizers:
    print(f"{type(optimizer).__name__:>6}: {bytes_to_train(optimizer):.0f} bytes a weight")
# Muon remembers one average where AdamW remembers two.
assert [round(bytes_to_train(optimizer)) for optimizer in optimizers] == [12, 16]

# %% [markdown]
# **3. Accumulate.** Show that one step on two micro-batches of two rows changes the weights exactly as
# one step on the four rows together. Why only *almost* exactly?

# %% tags=["solution"]
four = next(book_batches("train", 4, 32)(0, 10))
halves = [
    Batch(four.inputs_BT[part], four.targets_BT[part], four.mask_BT[part])
    for part in (slice(0, 2), slice(2, 4))
]
ends, told = [], []
for pieces in ([four], halves):
    twin = fresh(0)
    twin_loss = LossFunction(twin, dtype=torch.float32, compiled=False)
    told.append(train_step(twin_loss, make_optimizers(twin, plain), pieces, factor=1.0, clip=1.0))
    ends.append(twin.blocks[0].feed_forward.down.weight.detach())
print(f"largest difference: {(ends[0] - ends[1]).abs().max():.1e}")
# Sums in another order round differently, and Muon may work in bfloat16, which knows few digits.
torch.testing.assert_close(ends[0], ends[1], atol=1e-3, rtol=0)
# Muon would forgive a gradient of twice the size; loss and norm tell.
torch.testing.assert_close(told[0], told[1], atol=0, rtol=1e-4)

# %% [markdown]
# **4. The wrong size.** You have the compute for the best model of `LARGE` at GPT-3's bill, but you
# take a model that is four times too large, or four times too small, at the same compute. What does
# each cost in loss? And which would you rather run for a year?

# %% tags=["solution"]
N, D = best_split(LARGE, compute)
costs = {factor: LARGE.loss(N * factor, D / factor) - LARGE.loss(N, D) for factor in (0.25, 1, 4)}
for factor, cost in costs.items():
    print(f"{factor:4} times the best size: {cost:+.4f} nats a token")
assert costs[1] == 0 < min(costs[0.25], costs[4]) < 0.1
# The valley is flat: four times off costs little. The small one answers at a quarter of the price.

# %% [markdown]
# ## Check yourself
#
# 1. A fresh model's first loss is 12 nats with a vocabulary of 8,192. What do you do?
# 2. Why may the matrix products be in bfloat16, but not the weights that are added to?
# 3. What does Adam divide by, and what does Muon do in its place?
# 4. Why does a flat schedule with a fall at the end suit a run whose end you don't know?
# 5. You get ten times the compute. By Hoffmann and others, how much larger should the model be?
#
# <details markdown="1"><summary>Answers</summary>
#
# 1. Look for a bug: it must be near the logarithm of 8,192, which is about 9. Something makes it
#    surer, and wrong, before it has read a word.
# 2. Errors in products average out. A small step that is added to a large weight falls off its last
#    digit, each time.
# 3. By the root of a running average of squared gradients, number by number. Muon sets all singular
#    values of a matrix's step near one.
# 4. The flat part doesn't depend on the end. You choose when to fall.
# 5. About three times, with about three times the tokens: both grow with the root of the compute.
#
# </details>
#
# ## What we left out
#
# - **Sharding the model.** With many GPUs, weights and optimizers can be split between them. Ours
#   fit on one, so every process keeps a whole copy (data parallelism).
# - **Choosing the data** is half of the art: deduplication, quality filters, the order of subjects.
#   `tinychat/data/recipe.py` holds our mix with its reasons.
# - **Tuning the rates** by runs at small size, and carrying them over to large ones.
# - **Eight and four bits** in training, on hardware that has them.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/pretraining.py`. `tinychat train base` calls
# `pretrain` with more text and a progress bar (and on several GPUs at once, when `torchrun` starts it);
# chapter 10 calls it with conversations.
#
# ## Sources
#
# - I. Loshchilov, F. Hutter: [Decoupled weight decay regularization](https://arxiv.org/abs/1711.05101)
#   (2019). AdamW.
# - D. P. Kingma, J. Ba: [Adam](https://arxiv.org/abs/1412.6980) (2015).
# - K. Jordan et al.: [Muon: an optimizer for hidden layers](https://kellerjordan.github.io/posts/muon/)
#   (2024).
# - S. Hu et al.: [MiniCPM](https://arxiv.org/abs/2404.06395) (2024). Warm-up, stable, decay.
# - K. Wen et al.: [Understanding warmup-stable-decay learning rates](https://arxiv.org/abs/2410.05192)
#   (2024). Why the fall helps, and how to go on after it.
# - J. Kaplan et al.: [Scaling laws for neural language models](https://arxiv.org/abs/2001.08361)
#   (2020). C ≈ 6ND, power laws.
# - J. Hoffmann et al.: [Training compute-optimal large language models](https://arxiv.org/abs/2203.15556)
#   (2022). The law with three parts, and tokens a weight.
# - T. Besiroglu, E. Erdil, M. Barnett, J. You: [Chinchilla scaling: a replication
#   attempt](https://arxiv.org/abs/2404.10102) (2024). The values that we use.
# - T. B. Brown et al.: [Language models are few-shot learners](https://arxiv.org/abs/2005.14165)
#   (2020). GPT-3's size and tokens.
# - D. Patterson et al.: [Carbon emissions and large neural network training](https://arxiv.org/abs/2104.10350)
#   (2021). What its training took.
# - P. Micikevicius et al.: [Mixed precision training](https://arxiv.org/abs/1710.03740) (2018). Few
#   bits for products, many for sums.
