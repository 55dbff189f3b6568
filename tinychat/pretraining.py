"""Teach the network to predict the next token: loss, optimizers, schedule, and a loop that
survives.

Generated from chapters/07_pretraining.py: edit that file,
then run `python -m tinychat.book export`.
"""

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


def train_preset(name: str) -> TrainConfig:
    """Return the settings that suit a model preset; ConfigError for an unknown one."""
    preset(name)
    if name in ("nano", "mini"):
        return TrainConfig()
    if name == "small":  # for one GPU: 65,536 tokens a step
        return TrainConfig(batch=128, sequence=512, evaluate_every=100)
    return TrainConfig(batch=64, sequence=1024, accumulate=4, matrix_lr=0.015, evaluate_every=100)


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


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the factor on the learning rates at `step`: warm up, stay, fall (WSD).

    Hu et al. 2024 (MiniCPM): the long flat middle lets one run be stopped, or made longer, at any
    time, because only the fall at the end depends on where the end is.
    """
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return max(0.0, min(1.0, rise, fall))


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


def bytes_of_tokens(tokenizer: Tokenizer) -> Tensor:
    """Return how many bytes of text each token stands for, `[V]`; control tokens stand for 0."""
    return torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


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
