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

# %% tags=["export"]
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinychat.data.batch import Batch
from tinychat.gpt import GPT, preset
from tinychat.runtime.device import has_compiler
from tinychat.runtime.errors import ConfigError, TinychatError
from tinychat.runtime.metrics import MetricsWriter
from tinychat.runtime.state import load_state, save_state
from tinychat.tokenizer import Tokenizer


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

    8,192 tokens times 8,192 scores in float32 are 268 MB, read and written several times over;
    a chunk of 1,024 tokens stays in the processor's cache.
    """

    @staticmethod
    def forward(  # type: ignore[override]
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
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        h_grad_ND, weight_grad_VD = ctx.saved_tensors
        return h_grad_ND * slope, weight_grad_VD * slope, None, None, None, None


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


# %% tags=["export"]
def orthogonalize(gradients: Tensor, steps: int = 5) -> Tensor:
    """Move each matrix of `[N, rows, columns]` towards the nearest one with equal singular values.

    A Newton-Schulz iteration whose coefficients Keller Jordan (2024, Muon) tuned to be quick
    rather than exact: singular values end between about 0.7 and 1.2. Runs in bfloat16.
    """
    x = gradients.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


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
    precision: str = "bf16"
    "bf16 or fp32 matrix products"
    compiled: bool = True
    "use torch.compile where a C++ compiler is installed"
    save_minutes: float = 3.0
    "time between saved states"
    evaluate_every: int = 250
    "steps between validations"

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1.")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision is {self.precision!r}; choose bf16 or fp32.")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


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
def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the factor on the learning rates at `step`: warm up, stay, fall (WSD).

    Hu et al. 2024 (MiniCPM): the long flat middle lets one run be stopped, or made longer, at any
    time, because only the fall at the end depends on where the end is.
    """
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return max(0.0, min(1.0, rise, fall))


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
    """Put back what `pack_state` returned; ConfigError when it is of another model."""
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        saved = tensors.get(f"model/{name}")
        if saved is None or saved.shape != weight.shape:
            raise ConfigError(
                f"The saved run has another model shape (at {name!r}); "
                "resume with the same preset, or start a new run with another --run name."
            )
        weight.data.copy_(saved)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind != "model":
            name, _, field = rest.rpartition("/")
            optimizer = optimizers[int(kind.removeprefix("optimizer"))]
            # AdamW keeps its step counts on the CPU; everything else lives beside its weight.
            device = "cpu" if value.ndim == 0 else parameters[name].device
            optimizer.state[parameters[name]][field] = value.clone().to(device)


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
    """Turns minutes into a number of steps, by timing the first few steps of the run."""

    def __init__(self, minutes: float, trial: int = 6):
        if not minutes > 0:
            raise ConfigError(f"The budget is {minutes} minutes; give more than 0.")
        self.seconds = minutes * 60
        self.trial = trial
        self.times: list[float] = []

    def steps(self, done: int, seconds: float, spent: float) -> int | None:
        """Take in the last step's `seconds`; return the total once it is known, else None."""
        self.times.append(seconds)
        if len(self.times) < self.trial:
            return None
        # The first step compiles, so it tells nothing; the median ignores a disturbed one.
        typical = float(np.median(self.times[1:]))
        return done + max(1, round((self.seconds - spent) / typical))


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
    again with `resume=True` goes on from its last saved state, to the same numbers; resuming with
    more `minutes` makes the run longer.
    """
    folder = Path(folder)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    started = time.monotonic()
    torch.manual_seed(config.seed)
    optimizers = make_optimizers(model, config)
    loss_function = LossFunction(model, dtype=config.dtype, compiled=config.compiled)
    step, steps, tokens, seconds_before = 0, config.steps, 0, 0.0

    # 1. Take up the saved state, or begin.
    saved = load_state(folder) if resume else None
    if saved is not None:
        tensors, scalars = saved
        unpack_state(tensors, model, optimizers)
        step, tokens, seconds_before = scalars["step"], scalars["tokens"], scalars["seconds"]
        steps = config.steps or (0 if minutes else scalars["steps"])
    elif not resume and load_state(folder) is not None:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    first_step = step
    budget = Budget(minutes) if not steps else None
    # Until the budget is known, any total will do that is far away: the schedule is still rising
    # (a new run) or flat (a resumed one).
    steps = steps or 1_000_000
    writer = MetricsWriter(folder / "metrics.jsonl", resume_step=step) if rank == 0 else None
    last_save, loss, bits = time.monotonic(), math.nan, {}
    stream: Iterator[Batch] | None = None

    def save() -> None:
        if rank == 0 and budget is None:
            spent = seconds_before + time.monotonic() - started
            scalars = {"step": step, "steps": steps, "tokens": tokens, "seconds": spent}
            state = pack_state(model, optimizers)
            save_state(folder, state, scalars | {"config": asdict(config)})

    while step < steps:
        step_started = time.monotonic()
        # 2. The learning rates of this step.
        factor = schedule(step, steps, config.warmup, config.decay)
        if budget is not None:
            factor = min(1.0, (step + 1) / 100) if saved is None else 1.0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        # 3. Gradients of the mean loss over all micro-batches and processes.
        if stream is None:
            stream = batches_from(step * config.accumulate, steps * config.accumulate)
        total = torch.zeros((), device=model.device)
        for _ in range(config.accumulate):
            batch = next(stream)
            part = loss_function(batch)
            (part / config.accumulate).backward()
            total += part.detach() / config.accumulate
        if world > 1:
            for weight in model.parameters():
                dist.all_reduce(weight.grad, op=dist.ReduceOp.AVG)
            dist.all_reduce(total, op=dist.ReduceOp.AVG)
        # 4. Clip, step, forget.
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        loss = total.item()
        if not math.isfinite(loss):
            raise TinychatError(
                f"The loss became {loss} at step {step}; resume with a lower rate, for instance "
                f"--set matrix_lr={config.matrix_lr / 2:g}."
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += config.batch * config.sequence * config.accumulate * world
        seconds = time.monotonic() - step_started
        # 5. How many steps fit the budget.
        if budget is not None:
            known = budget.steps(step, seconds, time.monotonic() - started)
            if known is not None:
                steps, budget, stream = known, None, None
        # 6. Validate, report, save.
        if validation and (step % config.evaluate_every == 0 or step == steps):
            assert token_bytes_V is not None
            bits = {
                name: bits_per_byte(loss_function, make(), token_bytes_V)
                for name, make in validation.items()
            }
        rate = config.batch * config.sequence * config.accumulate * world / seconds
        # The first steps of a process compile, so they tell nothing about the time left.
        settled = budget is None and step - first_step > 3
        left = (steps - step) * seconds if settled else math.nan
        on_step(Progress(step, steps, loss, tokens, rate, left, bits))
        if writer is not None:
            row = {"step": step, "loss": loss, "tokens": tokens, "lr": factor, "norm": norm.item()}
            row |= {"tokens_per_second": rate, "seconds": seconds}
            if validation and (step % config.evaluate_every == 0 or step == steps):
                row["bits_per_byte"] = bits
            writer.write(row)
        if time.monotonic() - last_save > config.save_minutes * 60:
            save()
            last_save = time.monotonic()
        if should_stop():
            break
    budget = None
    save()
    if writer is not None:
        writer.close()
    spent = seconds_before + time.monotonic() - started
    return Result(step, steps, tokens, spent, loss, bits)
