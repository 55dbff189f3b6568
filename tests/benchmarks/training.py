"""Training speed of our loop beside two peers, in one run on one machine.

    python tests/benchmarks/training.py [--preset mini] [--sequence 256] [--batch 32] [--steps 8]

1. ours: `LossFunction` (torch.compile, attention in blocks, chunked cross-entropy) + Muon,
   and memory that is reused
2. the same model run eagerly: autocast, torch's attention kernel and cross-entropy, AdamW
3. a GPT-2-style model of the same width and depth, run eagerly (LayerNorm, GELU, learned
   positions, as many heads as key heads), AdamW

Each has a process of its own, since memory settings belong to a process. They take turns, step by
step, so that a disturbance of the machine hits all of them. Prints tokens a second (median over
the turns), the ratios, and one JSON line.
"""

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

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


CONTENDERS = ("ours", "same model, eager", "GPT-2 style, eager")


def make_stepper(name: str, options: argparse.Namespace) -> Callable[[], float]:
    """One of the contenders, ready to run: ours with all that `tinychat train` does."""
    # Eager bf16 norms warn that they can't fuse; that is the peer's own cost, not a fault here.
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    set_threads()
    config = preset(options.preset)
    shape = (options.batch, options.sequence, config.vocab_size)
    if name == "ours":
        reuse_memory()
        ours = GPT(config)
        loss_function = LossFunction(ours)

        def our_loss(inputs: Tensor, targets: Tensor) -> Tensor:
            return loss_function(Batch(inputs, targets, torch.ones_like(inputs)))

        return stepper(our_loss, ours, make_optimizers(ours, TrainConfig()), *shape)
    model = GPT(config) if name == "same model, eager" else GPT2(config)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(model.hidden(inputs), model.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    adamw = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    return stepper(loss, model, [adamw], *shape)


def serve(name: str, options: argparse.Namespace, wire: Connection) -> None:
    """Run in a process of its own: a step for every message, answered with its seconds."""
    step = make_stepper(name, options)
    step(), step()  # the first ones compile and touch the memory
    wire.send("ready")
    while wire.recv():
        wire.send(step())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    config = preset(options.preset)
    context = multiprocessing.get_context("spawn")
    wires: dict[str, Connection] = {}
    for name in CONTENDERS:
        wires[name], other = context.Pipe()
        context.Process(target=serve, args=(name, options, other), daemon=True).start()
        assert wires[name].recv() == "ready"
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(options.steps):
        for name, wire in wires.items():
            wire.send(True)
            seconds[name].append(wire.recv())
    for wire in wires.values():
        wire.send(False)
    tokens = options.batch * options.sequence
    rate = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    size = sum(weight.numel() for weight in GPT2(config).parameters())
    print(f"{options.preset}: {config.parameters:,} parameters; the GPT-2 style one has {size:,}")
    for name, value in rate.items():
        print(f"{name:22} {value:8,.0f} tokens/s   ours is {rate['ours'] / value:.2f} x")
    flops = config.flops_per_token(options.sequence) * rate["ours"]
    print(f"ours: {flops / 1e9:,.0f} GFLOP/s on {describe_hardware()['cpu']}")
    print(json.dumps({name: round(value) for name, value in rate.items()}))


if __name__ == "__main__":
    main()
