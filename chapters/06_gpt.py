# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # GPT
#
# Stack attention and feed-forward layers into the whole language model.
#
# You have tokens (chapter 03), vectors and positions (04) and attention (05). Two small parts are
# missing, and a plan to put everything together. At the end of this chapter stands a complete GPT:
# the same code that the shipped checkpoints were trained with. Here it learns one page by heart,
# before your eyes, and goes from gibberish to words.

# %% tags=["export"]
import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.attention import Attention, LayerCache, RMSNorm, causal_mask
from tinychat.embeddings import rotary_tables
from tinychat.runtime import checkpoint
from tinychat.runtime.checkpoint import Checkpoint, CheckpointInfo
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.tokenizer import Tokenizer

# %% [markdown]
# ## The plan
#
# ```
# token numbers ─ look up ─▶ vectors ──┬───────────────┬──▶ ... ──▶ norm ─ compare with ─▶ scores of
#                                      │   attention   │            every row of the      the next
#                                      │  feed-forward │            same table            token
#                                      └── one block ──┘  × layers
# ```
#
# The line in the middle is the **residual stream**: one vector for each token, as wide as the
# embedding. A block doesn't replace the vector. It reads it, computes something and *adds* that to
# it.
#
# Think of a patient's file that goes from doctor to doctor. Each reads what is in it and puts in a
# page. Nobody rewrites it. So the first page still reaches the last doctor, and (this matters more)
# the blame for a wrong verdict finds its way straight back to everyone who wrote something: in
# training, the gradient flows along the additions without being weakened.
#
# ## The shape in one place
#
# A handful of numbers decides what a GPT is. They stand in one frozen dataclass. It refuses shapes
# that can't work, and it knows how many weights there will be; we come back to this formula.


# %% tags=["export"]
@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the same names as in the checkpoint's metadata."""

    width: int
    "size D of the residual stream"
    layers: int
    "number of blocks"
    heads: int
    "query heads a layer"
    kv_heads: int
    "key and value heads a layer; divides `heads`"
    hidden: int
    "inner size of the feed-forward layers"
    head_width: int = 64
    "size K of one head; even, because rotary positions turn pairs"
    vocab_size: int = 8192
    "number V of tokens"
    context: int = 1024
    "longest text in tokens"
    rope_theta: float = 10000.0
    "base of the rotary wavelengths"
    norm_eps: float = 1e-6
    "keeps RMSNorm from dividing by zero"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "hidden", "vocab_size", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(self.head_width, int) or self.head_width < 2 or self.head_width % 2:
            raise ConfigError(f"head_width is {self.head_width!r}; it must be even and positive.")
        if self.context > 2**20:
            raise ConfigError(f"context is {self.context:,}; {2**20:,} tokens are the most.")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} heads can't share {self.kv_heads} key heads; "
                "kv_heads must divide heads."
            )

    @property
    def parameters(self) -> int:
        """How many weights the model has; the tied embedding counts once."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        norms = 2 * self.width + 2 * self.head_width
        layer = attention + 3 * self.width * self.hidden + norms
        return self.vocab_size * self.width + self.layers * layer + self.width

    def flops_per_token(self, sequence: int) -> int:
        """Floating-point operations to train on one token: 6 a weight, plus attention's T²."""
        attention = 12 * self.layers * self.heads * self.head_width * sequence
        return 6 * self.parameters + attention


# %% [markdown]
# Four sizes have names. Climb them in order: `nano` for experiments, `mini` for a patient CPU, the
# others for a GPU. Further down you compute how patient.


# %% tags=["export"]
def nano() -> GPTConfig:
    """Seconds to minutes on a CPU: tests and live chapters."""
    return GPTConfig(width=128, layers=4, heads=2, kv_heads=1, hidden=384, context=512)


def mini() -> GPTConfig:
    """A few CPU hours: the checkpoint that everyone can rebuild."""
    return GPTConfig(width=256, layers=8, heads=4, kv_heads=2, hidden=704)


def small() -> GPTConfig:
    """Half an hour of one data-centre GPU."""
    return GPTConfig(width=512, layers=10, heads=8, kv_heads=4, hidden=1536)


def medium() -> GPTConfig:
    """The size of GPT-2's smallest: hours on one GPU."""
    return GPTConfig(width=768, layers=18, heads=12, kv_heads=6, hidden=2048)


PRESETS: dict[str, Callable[[], GPTConfig]] = {
    "nano": nano,
    "mini": mini,
    "small": small,
    "medium": medium,
}


def preset(name: str) -> GPTConfig:
    """Return the preset of that name; ConfigError names the nearest one."""
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"There is no preset {name!r}; did you mean {nearest!r}? "
            f"The presets are {', '.join(PRESETS)}."
        )
    return PRESETS[name]()


# %%
import math
import tempfile
import time

from torch.utils.flop_counter import FlopCounterMode

from tinychat.data import tokenizer_model
from tinychat.data.corpus import stories

try:
    preset("smal")
except ConfigError as error:
    print(error)

# %% [markdown]
# ## Thinking: the feed-forward layer
#
# Attention moves information between tokens. It is an average, so it can't do much *with* it. That
# is the job of the second part: a small network that looks at one token at a time. It makes the
# vector wider, bends it with a nonlinear function, and makes it narrow again. In all but the smallest
# models most of the weights are here, and much of what the model knows.
#
# The classical form is `down(relu(up(x)))`. Ours is **SwiGLU** (Shazeer 2020). There are two wide
# vectors, and one of them decides how far each place of the other is let through, like a row of
# taps. The bend is SiLU: x times its own sigmoid, a smooth ReLU. By hand:

# %%
x = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
print("relu:", [round(v, 2) for v in x.relu().tolist()])
print("silu:", [round(v, 2) for v in (x * x.sigmoid()).tolist()])


# %% tags=["export"]
class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): one projection opens or shuts the gates of the other."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


# %% tags=["test"]
torch.manual_seed(0)
layer, x_BTD = FeedForward(8, 24), torch.randn(1, 5, 8)
opened = layer.gate(x_BTD)
by_hand = layer.down(opened * opened.sigmoid() * layer.up(x_BTD))
torch.testing.assert_close(layer(x_BTD), by_hand)
# Each token is on its own: changing one changes nobody else.
other = x_BTD.clone()
other[:, 2] += 1
assert (layer(other) != layer(x_BTD)).any(dim=-1).tolist() == [[False, False, True, False, False]]

# %% [markdown]
# ## One block
#
# First gather, then think; each adds to the stream. Both read a *normalised copy* (RMSNorm, chapter
# 05), while the stream itself goes on untouched. This is called **pre-norm**. The first transformer
# did it the other way round, adding first and normalising the sum. Then each layer rescales the
# stream, the gradient shrinks on its way back, and deep models only train with a careful warm-up
# (Xiong et al. 2020).


# %% tags=["export"]
class Block(nn.Module):
    """One layer: gather from other tokens, then think about each token on its own.

    Both halves read a normalised copy of the residual stream and add to the stream itself
    (pre-norm: Xiong et al. 2020).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(
            config.width, config.heads, config.kv_heads, config.head_width, config.norm_eps
        )
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        visible: Tensor | None,
        cache: LayerCache | None,
        start: int,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD), cos_TK, sin_TK, visible, cache, start
        )
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


# %% [markdown]
# ## A memory for chatting
#
# In chapter 05 each layer got a store for its keys and values. `KVCache` is one such store for every
# layer, together with the number of tokens stored. It can forget from the end (`truncate`), which is
# what "try that answer again" needs.
#
# It also knows who may see whom when the texts of a batch have different lengths. Texts are then
# filled up on the left with padding. Each token has a **segment** number, and a token sees only
# earlier tokens of its own segment. The same numbers let several short conversations be packed into
# one row without reading each other.


# %% tags=["export"]
class KVCache:
    """What the model keeps of the tokens it has read, so that it never reads them twice.

    `length` tokens are stored. `segments_BS` is kept only when the rows of a batch have padding.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch, config.kv_heads, capacity, config.head_width)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.layers)]
        self.segments_BS: Tensor | None = None
        self.batch = batch
        self.capacity = capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate {self.length} stored tokens to {length}")
        self.length = length
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[:, :length]

    def visible(self, length: int, segments_BT: Tensor | None, device: torch.device) -> Any:
        """Take in `length` new tokens; return who sees whom, or None for plain causal."""
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens; {self.length} + {length} don't fit"
            )
        if segments_BT is None and self.segments_BS is None:
            return None
        old = self.segments_BS
        if old is None:
            old = torch.ones(self.batch, self.length, dtype=torch.long, device=device)
        if segments_BT is None:
            segments_BT = torch.ones(self.batch, length, dtype=torch.long, device=device)
        self.segments_BS = torch.cat((old, segments_BT), dim=1)
        same_BTS = segments_BT[:, :, None] == self.segments_BS[:, None, :]
        causal_TS = causal_mask(length, self.length + length, device)
        return (same_BTS & causal_TS)[:, None]


# %% [markdown]
# ## The whole model
#
# Read `hidden` from top to bottom; it is the plan from above. Three things are worth knowing.
#
# **Tied embeddings.** At the end, the last vector is compared, by dot product, with every row of a
# table. The token whose row fits best gets the highest score. Our model uses the very table from
# which the tokens were read (Press and Wolf 2017). A token that means something similar coming in and
# going out needs only one row, and in small models this saves a large part of all weights.
#
# **No position is added.** The rotary tables go into each attention layer instead.
#
# **The beginning is silence.** `reset_parameters` sets the matrices that write into the stream to
# zero. So at first, every block adds nothing, and training decides what is worth saying.


# %% tags=["export"]
class GPT(nn.Module):
    """A decoder-only transformer in the shape of Qwen3: tokens in, scores of the next token out.

    `segments_BT` holds a number for each token: tokens see only earlier tokens of their own
    segment. Packing gives each conversation its own number; left padding has a number of its own.
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # The table is given, so that nn.Embedding does not fill it twice.
        table_VD = torch.empty(config.vocab_size, config.width)
        self.embed = nn.Embedding(config.vocab_size, config.width, _weight=table_VD)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        with torch.device("cpu"):  # computed, not learned: real in an empty model too
            cos_TK, sin_TK = rotary_tables(config.context, config.head_width, config.rope_theta)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: small embeddings, so that every next token starts equally likely.

        The matrices that write into the residual stream start at zero: each block begins as
        "change nothing" and the gradient decides what it adds (Zhang et al. 2019, Fixup).
        """
        if self.embed.weight.is_meta:
            return  # an empty model: a checkpoint's weights will take these places
        # A token's score for itself starts at width x std, because rows are read and written by one
        # table; the second bound keeps wide models from guessing "the same token again".
        width = self.config.width
        nn.init.normal_(self.embed.weight, std=min(0.2 * width**-0.5, 4.6 / width))
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.q, block.attention.k, block.attention.v):
                nn.init.normal_(linear.weight, std=width**-0.5)
            for linear in (block.feed_forward.gate, block.feed_forward.up):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """Return an empty cache for `capacity` tokens a row (the whole context by default)."""
        capacity = min(capacity or self.config.context, self.config.context)
        return KVCache(self.config, batch, capacity, self.device, self.embed.weight.dtype)

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's normalised vectors, `[B, T, D]`.

        Raises ConfigError when the text, with what the cache holds, is longer than the context.
        """
        B, T = ids_BT.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.context:
            raise ConfigError(
                f"The text is {start + T} tokens long; this model reads {self.config.context}."
            )
        if cache is not None:
            visible = cache.visible(T, segments_BT, ids_BT.device)
        elif segments_BT is not None:
            same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
            visible = (same_BTS & causal_mask(T, T, ids_BT.device))[:, None]
        else:
            visible = None
        x_BTD = self.embed(ids_BT)
        cos_TK = self.cos_TK[start : start + T].to(x_BTD.dtype)
        sin_TK = self.sin_TK[start : start + T].to(x_BTD.dtype)
        for number, block in enumerate(self.blocks):
            layer = cache.layers[number] if cache is not None else None
            x_BTD = block(x_BTD, cos_TK, sin_TK, visible, layer, start)
        if cache is not None:
            cache.length += T
        return self.norm(x_BTD)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the scores of every possible next token, `[B, T, V]`, float32."""
        h_BTD = self.hidden(ids_BT, cache=cache, segments_BT=segments_BT)
        return F.linear(h_BTD, self.embed.weight).float()


# %% [markdown]
# ## Where the weights are
#
# Count the weights of each preset by part. With the formulas from `GPTConfig.parameters`:
#
# - the embedding: one row of `width` numbers for each token;
# - attention, in each layer: queries and the way out (`heads` each), keys and values (`kv_heads`
#   each), times the width of a head, times `width`;
# - feed-forward, in each layer: three matrices of `width` times `hidden`;
# - norms: next to nothing.
#
# The models are built on PyTorch's *meta* device: all the shapes, no memory.

# %%
print(f"{'':8} {'embedding':>12} {'attention':>12} {'feed-forward':>13} {'norms':>7} {'total':>12}")
for name in PRESETS:
    shape = preset(name)
    with torch.device("meta"):
        model = GPT(shape)
    counts = dict.fromkeys(("embed", "attention", "feed_forward", "norm"), 0)
    for weight_name, weight in model.named_parameters():
        part = "norm" if "norm" in weight_name else weight_name.split(".")[0]
        if part == "blocks":
            part = weight_name.split(".")[2]
        counts[part] += weight.numel()
    row = [counts["embed"], counts["attention"], counts["feed_forward"], counts["norm"]]
    print(f"{name:8} {row[0]:12,} {row[1]:12,} {row[2]:13,} {row[3]:7,} {sum(row):12,}")
    assert sum(row) == shape.parameters
    assert counts["embed"] == shape.vocab_size * shape.width
    assert counts["feed_forward"] == shape.layers * 3 * shape.width * shape.hidden

# %% [markdown]
# ## What a fresh model should know: nothing
#
# Before training, all next tokens should be equally likely: one in V. The loss is minus the logarithm
# of the probability that the right token got, so it must be ln V. That is your first test of any
# language model. Much more means that it begins with strong wrong opinions. Less means that it
# cheats and sees the answer.

# %%
torch.manual_seed(0)
model = GPT(nano())
ids_BT = torch.randint(model.config.vocab_size, (4, 65))
with torch.no_grad():
    logits_BTV = model(ids_BT[:, :-1])
loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
print(f"loss {loss:.3f}, ln {model.config.vocab_size} = {math.log(model.config.vocab_size):.3f}")

# %% tags=["test"]
assert abs(float(loss) - math.log(model.config.vocab_size)) < 0.05
# Silent blocks: what comes out is the normalised embedding.
with torch.no_grad():
    torch.testing.assert_close(model.hidden(ids_BT), model.norm(model.embed(ids_BT)))

# %% [markdown]
# ## Does it keep its promises?
#
# Three promises must hold for any weights, but zeros would hide mistakes. So give a copy random ones
# and check:
#
# 1. **Causality.** Change the later tokens: the earlier scores stay the same, to the last bit.
# 2. **Memory.** Read in pieces with a cache: the same scores.
# 3. **Segments.** Pack two texts into one row: the same scores as for each alone.

# %% tags=["test"]
torch.manual_seed(1)
tiny = GPTConfig(
    width=32, layers=2, heads=4, kv_heads=2, head_width=8, hidden=64, vocab_size=50, context=32
)
lively = GPT(tiny)
for weight in lively.parameters():
    if weight.dim() == 2:
        nn.init.normal_(weight, std=0.2)
ids_BT = torch.randint(50, (1, 20))
with torch.no_grad():
    logits_BTV = lively(ids_BT)

    changed_BT = ids_BT.clone()
    changed_BT[:, 12:] = 7
    assert torch.equal(lively(changed_BT)[:, :12], logits_BTV[:, :12])

    cache = lively.new_cache()
    pieces = [lively(piece_BT, cache=cache) for piece_BT in ids_BT.split([9, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits_BTV, atol=1e-5, rtol=1e-5)

    segments_BT = torch.tensor([[0] * 8 + [1] * 12])
    packed_BTV = lively(ids_BT, segments_BT=segments_BT)
    torch.testing.assert_close(packed_BTV[:, 8:], lively(ids_BT[:, 8:]), atol=1e-5, rtol=1e-5)
print("causal; the same with a cache; packed texts don't see each other")

# %% [markdown]
# There is a fourth check that a chapter can't do alone: an independent witness. Our model has the
# shape of Qwen3, so the tests load the same weights into the `transformers` library's Qwen3 and
# compare all scores.
#
# ## How much work is a token?
#
# Each weight of a matrix takes part in one multiplication and one addition for each token: two
# floating-point operations (FLOPs). The way back, in training, costs twice the way forward: once for
# the gradient of the weights and once for that of the inputs. That makes **six a weight and token**.
# Attention comes on top: its scores and its mixing cost 4 · K · T a token and head on the way
# forward, three times that in all.
#
# PyTorch can count what really happens. Compare.

# %%
T = 64
ids_BT = torch.randint(8192, (1, T))
with FlopCounterMode(display=False) as counter:
    model(ids_BT).sum().backward()
counted, formula = counter.get_total_flops() / T, model.config.flops_per_token(T)
print(f"a token of nano: counted {counted:,.0f}, formula {formula:,} FLOPs")

# How fast is this machine, here and now, with whatever else it does? (Chapter 07 is faster.)
ids_BT, seconds = torch.randint(8192, (8, T)), math.inf
for _repeat in range(3):
    begin = time.perf_counter()
    F.cross_entropy(model(ids_BT).flatten(0, 1), ids_BT.flatten()).backward()
    seconds = min(seconds, time.perf_counter() - begin)
speed = ids_BT.numel() * formula / seconds
print(f"this machine, with {torch.get_num_threads()} threads: {speed / 1e9:.0f} billion a second")
for name in PRESETS:
    work = preset(name).flops_per_token(256) * 300e6
    print(f"{name:>7}: 300 million tokens take {work:.1e} FLOPs, {work / speed / 3600:.1f} hours")

# %% tags=["test"]
assert abs(counted / formula - 1) < 0.01

# %% [markdown]
# ## Learn one page by heart
#
# Now let it learn. The best first experiment with any new network: give it *one* small batch again
# and again. It must be able to learn it by heart. If it can't, something is broken, and no amount of
# data will help.
#
# Before that, let it speak. `continue_text` always takes the best token; chapter 08 has better
# rules.

# %%
tokenizer = Tokenizer(tokenizer_model())
page = [tokenizer.encode(story.text)[:33] for story in stories()[:4]]
page_BT = torch.tensor(page)
torch.manual_seed(0)
model = GPT(nano())


@torch.no_grad()
def continue_text(model: GPT, ids: list[int], count: int) -> str:
    """Add the best next token `count` times."""
    cache, unread_BT = model.new_cache(), torch.tensor([ids])
    reply: list[int] = []
    for _ in range(count):
        reply.append(int(model(unread_BT, cache=cache)[0, -1].argmax()))
        unread_BT = torch.tensor([[reply[-1]]])
    return tokenizer.decode([*ids, *reply])


def throw_dice(model: GPT, ids: list[int], count: int) -> str:
    """Draw each next token by its probability."""
    ids, draw = list(ids), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(count):
            shares_V = model(torch.tensor([ids]))[0, -1].softmax(dim=-1)
            ids.append(int(torch.multinomial(shares_V, 1, generator=draw)))
    return tokenizer.decode(ids)


print("before:", repr(throw_dice(model, page[0][:6], 20)))

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
for step in range(200):
    logits_BTV = model(page_BT[:, :-1])
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), page_BT[:, 1:].flatten())
    if step % 10 == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")
    if loss.item() < 0.03:
        break
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("after: ", repr(continue_text(model, page[0][:6], 27)))

# %% tags=["test"]
assert loss.item() < 0.05
assert continue_text(model, page[0][:6], 27) == tokenizer.decode(page[0])

# %% [markdown]
# Word for word. This isn't understanding; a parrot does as much. With so many weights and so few
# words, learning by heart is the shortest way. To be right about sentences that it has *not* seen, a
# model needs so much text that it can't memorise it all. That is chapter 07.
#
# ## One file
#
# A trained model is worth nothing if you can't find out later what it was. So a checkpoint holds
# everything: weights, shape, tokenizer, where it came from. Saving needs nothing but the model.


# %% tags=["export"]
def save_model(
    path: str | Path,
    model: GPT,
    *,
    stage: str,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    quantize: Literal["int8", "bf16", "fp32"] = "int8",
) -> CheckpointInfo:
    """Write the model with its tokenizer and history as one self-describing file."""
    return checkpoint.save(
        path,
        stage=stage,
        config=asdict(model.config),
        state=model.state_dict(),
        tokenizer=tokenizer.model,
        lineage=dict(lineage),
        metrics=dict(metrics),
        quantize=quantize,
    )


# %% [markdown]
# Loading is more careful. A file may be cut off, damaged, of another version, or somebody else's. The
# container is checked in `tinychat.runtime.checkpoint`; here the weights are compared, name by name
# and shape by shape, with what the file's own config promises, before anything is built.


# %% tags=["export"]
def load_model(path: str | Path) -> tuple[GPT, Tokenizer, CheckpointInfo]:
    """Read a base, sft or rlhf checkpoint; the model is in float32 and in evaluation mode.

    Raises CheckpointError in one sentence for whatever is wrong with the file.
    """
    loaded = checkpoint.load(path)
    if loaded.info.stage == "reward":
        raise CheckpointError(
            f"{path} is a reward model, which gives marks and can't write; "
            "name a base, sft or rlhf checkpoint."
        )
    model, tokenizer = build_model(loaded)
    return model, tokenizer, loaded.info


# %% tags=["export"]
def build_model(loaded: Checkpoint) -> tuple[GPT, Tokenizer]:
    """Make the model that a file's config asks for, and give it the file's weights.

    Names and shapes are compared with an empty model on the "meta" device, which takes no memory.
    Raises CheckpointError where the two don't fit.
    """
    path = loaded.info.path
    config = config_from(loaded.info)
    # The formula first: a config that asks for a billion layers must not be built, even empty.
    if config.parameters != loaded.info.parameters:
        raise CheckpointError(
            f"{path} holds {loaded.info.parameters:,} weights, but its own config asks for "
            f"{config.parameters:,}; get or train the checkpoint again."
        )
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in loaded.state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: the weight {name!r} has the shape {found.get(name, 'of nothing')}, but "
                f"the file's own config asks for {wanted.get(name, 'no such weight')}; "
                "get or train the checkpoint again."
            )
    model.load_state_dict(loaded.state, assign=True)
    tokenizer = Tokenizer(loaded.tokenizer)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} pieces and the model "
            f"{config.vocab_size}; get or train the checkpoint again."
        )
    return model.eval(), tokenizer


# %% tags=["export"]
def config_from(info: CheckpointInfo) -> GPTConfig:
    """Return the checkpoint's model shape; CheckpointError if it has unknown or missing names."""
    names = {field.name for field in fields(GPTConfig)}
    unknown = set(info.config) - names
    if unknown:
        raise CheckpointError(
            f"{info.path}: the config has the unknown name {min(unknown)!r}; "
            "the file is from another version of tinychat."
        )
    try:
        return GPTConfig(**info.config)
    except TypeError as error:
        raise CheckpointError(f"{info.path}: the config is incomplete ({error}).") from None
    except ConfigError as error:
        raise CheckpointError(f"{info.path} has a wrong config: {error}") from None


# %%
with tempfile.TemporaryDirectory() as folder:
    written = save_model(
        Path(folder) / "page",
        model,
        stage="base",
        tokenizer=tokenizer,
        lineage={"data": "four beginnings of stories"},
        metrics={"loss": loss.item()},
    )
    again, _, info = load_model(written.path)
    print(f"{info.path.name}: {info.bytes / 1e6:.1f} MB for {info.parameters / 1e6:.1f} M weights")
    print("as", info.dtype, "with", info.metrics)
print("reads back:", repr(continue_text(again, page[1][:6], 27)))

# %% tags=["test"]
assert again.config == model.config
assert continue_text(again, page[1][:6], 27) == continue_text(model, page[1][:6], 27)

# %% [markdown]
# About one byte a weight: matrices are rounded to whole numbers from -127 to 127, each row with a
# scale of its own. The model still knows its page.
#
# ## What we left out
#
# - **The encoder.** The first transformer read one text with an encoder and wrote another with a
#   decoder. GPT keeps only the decoder: everything is one text, and reading is part of writing.
# - **Mixture of experts**: many feed-forward layers, of which each token uses a few.
# - **Dropout and weight decay** as brakes on learning by heart. Chapter 07 has the second.
# - **Other inits.** GPT-2 scaled them down with the depth instead of starting at zero.
#
# ## Where this is in the package
#
# Everything tagged `export` here is `tinychat/gpt.py`. Chapter 07 trains `GPT`, chapter 08 lets it
# write, and `tinychat chat` begins with `load_model`.
#
# ## Exercises
#
# **1. Untied.** How many weights would each preset have with a second table for the output? Print
# the share that tying saves. Which model gains most, and why?


# %% tags=["solution"]
def saved_by_tying(shape: GPTConfig) -> float:
    table = shape.vocab_size * shape.width
    return table / (shape.parameters + table)


savings = [saved_by_tying(preset(name)) for name in PRESETS]
for name, saving in zip(PRESETS, savings, strict=True):
    print(f"{name:>7}: {saving:.0%} fewer weights than untied")
# The table grows with the width, the layers with its square, so the smallest gains most.
assert savings == sorted(savings, reverse=True)

# %% [markdown]
# **2. Listen at every layer.** The stream can be read anywhere: put the vector after each block
# through the final norm and compare it with the table ("logit lens", nostalgebraist 2020). Write
# `loss_by_layer(model, ids_BT)` and print it for the model that knows its page. Where does it know
# what comes next?


# %% tags=["solution"]
@torch.no_grad()
def loss_by_layer(model: GPT, ids_BT: Tensor) -> list[float]:
    x_BTD, losses = model.embed(ids_BT[:, :-1]), []
    T = x_BTD.shape[1]
    for block in [None, *model.blocks]:
        if block is not None:
            x_BTD = block(x_BTD, model.cos_TK[:T], model.sin_TK[:T], None, None, 0)
        logits_BTV = F.linear(model.norm(x_BTD), model.embed.weight)
        target_BT = ids_BT[:, 1:].flatten()
        losses.append(float(F.cross_entropy(logits_BTV.flatten(0, 1), target_BT)))
    return losses


heard = loss_by_layer(model, page_BT)
print("after 0, 1, 2 ... blocks:", [round(value, 2) for value in heard])
assert heard[-1] < 0.05 < heard[0]
torch.testing.assert_close(heard[-1], loss.item(), atol=1e-3, rtol=0)

# %% [markdown]
# **3. A budget of weights.** You may have ten million weights at `width=256`, four heads, two key
# heads and `hidden=704`. Write `deepest(budget)`: the `GPTConfig` with the most layers that fits.
# Don't build models; use the formula.


# %% tags=["solution"]
def deepest(budget: int) -> GPTConfig:
    def of(layers: int) -> GPTConfig:
        return GPTConfig(width=256, layers=layers, heads=4, kv_heads=2, hidden=704)

    per_layer = of(2).parameters - of(1).parameters
    return of((budget - of(1).parameters) // per_layer + 1)


found = deepest(10_000_000)
print(f"{found.layers} layers, {found.parameters:,} weights")
more = asdict(found) | {"layers": found.layers + 1}
assert found.parameters <= 10_000_000 < GPTConfig(**more).parameters

# %% [markdown]
# ## Sources
#
# - A. Radford et al.: *Language Models are Unsupervised Multitask Learners* (2019). GPT-2.
# - Qwen Team: *Qwen3 Technical Report* (2025). The shape that ours follows.
# - R. Xiong et al.: *On Layer Normalization in the Transformer Architecture* (2020). Pre-norm.
# - N. Shazeer: *GLU Variants Improve Transformer* (2020). SwiGLU.
# - O. Press, L. Wolf: *Using the Output Embedding to Improve Language Models* (2017). Tying.
# - H. Zhang, Y. Dauphin, T. Ma: *Fixup Initialization* (2019). Starting as "change nothing".
# - J. Kaplan et al.: *Scaling Laws for Neural Language Models* (2020). Six FLOPs a weight and token.
