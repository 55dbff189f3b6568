"""Training speed of our loop beside two peers, in one run on one machine.

    python tests/benchmarks/training.py [--preset mini] [--sequence 256] [--batch 32] [--steps 8]

1. ours: `LossFunction` (torch.compile, written-out attention, chunked cross-entropy) + Muon
2. the same model run eagerly: autocast, torch's attention kernel and cross-entropy, AdamW
3. a GPT-2-style model of the same width and depth, run eagerly (LayerNorm, GELU, learned
   positions, as many heads as key heads), AdamW

The three take turns, so that a disturbance of the machine hits all of them. Prints tokens a
second (median over the turns), the ratios, and one JSON line.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinychat.data.batch import Batch
from tinychat.gpt import GPT, GPTConfig, preset
from tinychat.pretraining import LossFunction, TrainConfig, make_optimizers
from tinychat.runtime.device import describe_hardware, reuse_memory, set_threads


class GPT2Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        split = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """A plain GPT-2: what one would write first."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(
            *(GPT2Block(config.width, config.heads) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.width)

    def hidden(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        return self.norm(self.blocks(self.embed(ids) + self.positions(place)))


def stepper(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: int,
    sequence: int,
    vocab: int,
) -> Callable[[], float]:
    """Return a function that does one whole training step and returns its seconds."""

    def step() -> float:
        ids = torch.randint(0, vocab, (batch, sequence + 1))
        started = time.perf_counter()
        loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    # Eager bf16 norms warn that they can't fuse; that is the peer's own cost, not a fault here.
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    reuse_memory()
    set_threads()
    config = preset(options.preset)
    shape = (options.batch, options.sequence, config.vocab_size)

    ours = GPT(config)
    loss_function = LossFunction(ours)

    def our_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_function(Batch(inputs, targets, torch.ones_like(inputs)))

    def eager_loss(model: GPT | GPT2) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = F.linear(model.hidden(inputs), model.embed.weight)
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

        return loss

    def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 1e-3, fused=True)]

    same, peer = GPT(config), GPT2(config)
    peers = {
        "ours": stepper(our_loss, ours, make_optimizers(ours, TrainConfig()), *shape),
        "same model, eager": stepper(eager_loss(same), same, adamw(same), *shape),
        "GPT-2 style, eager": stepper(eager_loss(peer), peer, adamw(peer), *shape),
    }
    for step in peers.values():
        step(), step()
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.steps):
        for name, step in peers.items():
            seconds[name].append(step())
    tokens = options.batch * options.sequence
    rate = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    size = sum(weight.numel() for weight in peer.parameters())
    print(f"{options.preset}: {config.parameters:,} parameters; the GPT-2 style one has {size:,}")
    for name, value in rate.items():
        print(f"{name:22} {value:8,.0f} tokens/s   ours is {rate['ours'] / value:.2f} x")
    flops = config.flops_per_token(options.sequence) * rate["ours"]
    print(f"ours: {flops / 1e9:,.0f} GFLOP/s on {describe_hardware()['cpu']}")
    print(json.dumps({name: round(value) for name, value in rate.items()}))


if __name__ == "__main__":
    main()
