"""Stack attention and feed-forward layers into the whole language model.

Generated from chapters/06_gpt.py: edit that file,
then run `python -m tinychat.book export`.
"""

import copy
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
    """Return the preset of that name; ConfigError names one that looks like it, and all."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? There are" if close else "there are"
        raise ConfigError(f"There is no preset {name!r}; {hint} {', '.join(PRESETS)}.")
    return PRESETS[name]()


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): one projection opens or shuts the gates of the other."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


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

    def copies(self, rows: int, capacity: int) -> "KVCache":
        """Return a cache with room for `capacity` tokens and `rows` times this one's single row."""
        many = copy.copy(self)
        many.batch, many.capacity, many.layers = rows, capacity, []
        for layer in self.layers:
            _, heads, _, width = layer.k.shape
            wide = LayerCache((rows, heads, capacity, width), layer.k.device, layer.k.dtype)
            wide.extend(0, *(part.expand(rows, -1, -1, -1) for part in layer.held(0, self.length)))
            many.layers.append(wide)
        if self.segments_BS is not None:
            many.segments_BS = self.segments_BS.expand(rows, -1)
        return many

    def follow(self, other: "KVCache", row: int, length: int) -> None:
        """Hold what a row of `other` holds, up to `length` tokens; both must begin alike."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            k, v = its.held(self.length, length)
            mine.extend(self.length, k[row : row + 1], v[row : row + 1])
        self.length = length

    def keep(self, rows_B: Tensor) -> None:
        """Drop all other rows: replies that are over need no more work."""
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows_B], layer.v[rows_B]
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[rows_B]
        self.batch = len(rows_B)

    def visible(
        self, length: int, segments_BT: Tensor | None, device: torch.device
    ) -> Tensor | None:
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

        Raises ConfigError when the text, with what the cache holds, is longer than the context, and
        ValueError when the cache has no room for it.
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


def save_model(
    path: str | Path,
    model: GPT,
    *,
    stage: str,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    quantize: Literal["int8", "bf16", "fp32"] = "int8",
    levels: int = 127,
) -> CheckpointInfo:
    """Write the model with its tokenizer and history as one self-describing file.

    `levels`: see `checkpoint.save`.
    """
    return checkpoint.save(
        path,
        stage=stage,
        config=asdict(model.config),
        state=model.state_dict(),
        tokenizer=tokenizer.model,
        lineage=dict(lineage),
        metrics=dict(metrics),
        quantize=quantize,
        levels=levels,
    )


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
