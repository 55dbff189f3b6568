"""Chapter 07: the loss, Muon, the schedule, the budget, and a loop that can learn by heart."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from fakes import ByteTokenizer, UniformGPT
from torch import nn

import tinychat.pretraining as pretraining
from tinychat.data.batch import Batch
from tinychat.gpt import GPT, PRESETS, GPTConfig, preset
from tinychat.pretraining import (
    Budget,
    ChunkedCrossEntropy,
    LossFunction,
    Muon,
    TrainConfig,
    bits_per_byte,
    bytes_of_tokens,
    cross_entropy_chunk,
    make_optimizers,
    orthogonalize,
    pretrain,
    schedule,
    train_preset,
    train_step,
)
from tinychat.runtime.errors import ConfigError, DataError, TinychatError
from tinychat.runtime.metrics import read_metrics
from tinychat.runtime.state import load_state

TINY = GPTConfig(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=64, vocab_size=97, context=64
)
PLAIN = TrainConfig(steps=6, batch=4, sequence=16, precision="fp32", compiled=False)


def tiny(seed: int = 0, config: GPTConfig = TINY) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def batch_of(number: int, rows: int = 4, length: int = 16, vocab: int = 97) -> Batch:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(7, vocab, (rows, length + 1), generator=draw)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length))


def numbered(start: int, total: int):
    return (batch_of(number) for number in range(start, total))


def same(a: GPT, b: GPT) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def close(a: GPT, b: GPT, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=atol, rtol=0)


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("chunk", [1, 16, 50, 64])
def test_chunked_cross_entropy_equals_pytorch(chunk):
    torch.manual_seed(0)
    h = torch.randn(50, 24, requires_grad=True)
    weight = torch.randn(80, 24, requires_grad=True)
    targets = torch.randint(80, (50,))
    mask = (torch.rand(50) < 0.6).float()
    ours = ChunkedCrossEntropy.apply(
        h, weight, targets, mask / mask.sum(), chunk, cross_entropy_chunk
    )
    theirs = F.cross_entropy(h @ weight.T, targets.where(mask > 0, -100), ignore_index=-100)
    torch.testing.assert_close(ours, theirs)
    # A factor on the loss must reach the gradients: accumulation divides by it.
    slopes = torch.autograd.grad(ours * 0.25, (h, weight))
    torch.testing.assert_close(slopes, torch.autograd.grad(theirs * 0.25, (h, weight)))


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model = tiny()
    loss = LossFunction(model, dtype=torch.float32, compiled=False)(
        replace(batch_of(0), mask_BT=torch.zeros(4, 16))
    )
    loss.backward()
    assert loss.item() == 0
    assert all(float(w.grad.abs().max()) == 0 for w in model.parameters())


def test_loss_function_equals_the_logits_loss_with_gradients():
    batch, model = batch_of(1), tiny()
    torch.nn.init.normal_(model.blocks[0].feed_forward.down.weight, std=0.1)
    LossFunction(model, dtype=torch.float32, compiled=False)(batch).backward()
    ours = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(batch.inputs_BT).flatten(0, 1), batch.targets_BT.flatten()).backward()
    torch.testing.assert_close(ours, {name: w.grad for name, w in model.named_parameters()})


def test_segments_reach_the_model():
    model = tiny()
    nn.init.normal_(model.blocks[0].attention.out.weight, std=0.5)
    loss_function = LossFunction(model, dtype=torch.float32, compiled=False)
    batch = batch_of(2)
    halves = (torch.arange(16) >= 8).long().expand(4, 16)
    parts = [
        Batch(batch.inputs_BT[:, p], batch.targets_BT[:, p], batch.mask_BT[:, p])
        for p in (slice(0, 8), slice(8, 16))
    ]
    packed = loss_function(replace(batch, segments_BT=halves)).item()
    assert packed == pytest.approx(sum(loss_function(p).item() for p in parts) / 2, abs=1e-5)
    assert packed != pytest.approx(loss_function(batch).item(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_at_the_start_is_that_of_knowing_nothing(dtype):
    model = tiny(config=preset("nano"))
    batch = batch_of(0, rows=4, length=128, vocab=8192)
    loss = LossFunction(model, dtype=dtype, compiled=False)(batch).item()
    assert loss == pytest.approx(math.log(8192), abs=0.05)


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(pretraining, "has_compiler", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    loss_function = LossFunction(tiny(), dtype=torch.float32)
    assert not loss_function.compiled and math.isfinite(loss_function(batch_of(0)).item())


def test_a_broken_compiler_is_reported_once_and_done_without(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("CppCompileError: omp.h not found\nand a page of noise")

    monkeypatch.setattr(pretraining, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    model = tiny()
    loss_function = LossFunction(model, dtype=torch.float32)
    plain = LossFunction(model, dtype=torch.float32, compiled=False)
    with caplog.at_level(logging.WARNING, "tinychat"):
        for number in range(3):
            assert loss_function(batch_of(number)).item() == plain(batch_of(number)).item()
    (record,) = caplog.records
    assert "torch.compile failed (CppCompileError: omp.h not found)" in record.getMessage()
    assert "noise" not in record.getMessage()


@pytest.mark.slow
@pytest.mark.skipif(not pretraining.has_compiler(), reason="no C++ compiler")
def test_compiled_and_eager_agree():
    losses, gradients = [], []
    for compiled in (True, False):
        model = tiny()
        loss_function = LossFunction(model, dtype=torch.float32, compiled=compiled)
        loss = loss_function(batch_of(0))
        loss.backward()
        assert loss_function.compiled is compiled
        losses.append(loss.detach())
        gradients.append(model.embed.weight.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_gpu_learns_what_a_cpu_does(tmp_path):
    ends = {}
    for place in ("cpu", "cuda"):
        model = tiny().to(place)
        config = replace(PLAIN, steps=3)
        ends[place] = pretrain(model, numbered, config, tmp_path / place).loss
    assert ends["cuda"] == pytest.approx(ends["cpu"], rel=1e-3)


def test_an_error_that_is_not_the_compilers_is_raised(monkeypatch, caplog):
    monkeypatch.setattr(pretraining, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    loss_function = LossFunction(tiny(), dtype=torch.float32)
    with pytest.raises(ConfigError, match="65 tokens long"):
        loss_function(batch_of(0, length=65))
    assert not caplog.records


# ------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("shape", [(1, 32, 80), (1, 80, 32), (3, 48, 48), (4, 24, 60)])
def test_orthogonalize_keeps_directions_and_levels_sizes(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    if shape[-1] == shape[-2]:  # a square random matrix has singular values next to zero
        matrices = matrices + 8 * torch.eye(shape[-1])
    found = orthogonalize(matrices).float()
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert 0.6 <= values.min() and values.max() <= 1.3
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    agreement = F.cosine_similarity(found.flatten(1), (u @ vt).flatten(1))
    assert agreement.min() > 0.97
    # Each matrix is treated on its own, and its size doesn't matter.
    torch.testing.assert_close(
        found[0], orthogonalize(100 * matrices[:1])[0].float(), atol=0.1, rtol=0
    )


def test_orthogonalize_leaves_zero_at_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 4)).float(), torch.zeros(2, 8, 4))


@pytest.mark.parametrize("shape", [(6, 10), (12, 3)])
def test_muon_by_hand(shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    expected, slopes = weight.detach().clone(), [torch.randn(shape) for _ in range(3)]
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    memory = torch.zeros(shape)
    for slope in slopes:
        weight.grad = slope.clone()
        optimizer.step()
        memory = 0.9 * memory + 0.1 * slope
        ahead = 0.1 * slope + 0.9 * memory
        scale = 2.0 if shape == (12, 3) else 1.0  # four times as tall as wide: root of 4
        expected -= 0.1 * scale * orthogonalize(ahead[None])[0].float()
        torch.testing.assert_close(weight.detach(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], memory)


def test_muon_skips_weights_without_gradients_and_batches_by_shape():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    before = [w.detach().clone() for w in weights]
    for weight in weights[:2]:
        weight.grad = torch.randn(4, 6)
    alone = nn.Parameter(before[1].clone())
    alone.grad = weights[1].grad.clone()
    Muon(weights, lr=0.1).step()
    Muon([alone], lr=0.1).step()
    assert torch.equal(weights[2], before[2])
    assert not torch.equal(weights[0], before[0])
    torch.testing.assert_close(weights[1].detach(), alone.detach(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_every_parameter_has_exactly_one_optimizer(name):
    with torch.device("meta"):
        model = GPT(preset(name))
    muon, adam = make_optimizers(model, replace(TrainConfig(), weight_decay=0.1))
    ids = [id(w) for o in (muon, adam) for g in o.param_groups for w in g["params"]]
    assert sorted(ids) == sorted(id(w) for w in model.parameters())
    assert all(w.ndim == 2 for g in muon.param_groups for w in g["params"])
    table, norms = adam.param_groups
    assert [id(w) for w in table["params"]] == [id(model.embed.weight)]
    assert (table["weight_decay"], norms["weight_decay"]) == (0.1, 0.0)
    assert all(w.ndim == 1 for w in norms["params"])
    assert muon.param_groups[0]["peak_lr"] == 0.02 and table["peak_lr"] == 3e-3


# ------------------------------------------------------------------------------ settings


def test_schedule_by_hand():
    factors = [schedule(step, 20, warmup=0.2, decay=0.5) for step in range(20)]
    expected = [0.25, 0.5, 0.75, *[1.0] * 8, *[n / 10 for n in range(9, 0, -1)]]
    assert factors == pytest.approx(expected)
    assert schedule(20, 20, 0.2, 0.5) == schedule(25, 20, 0.2, 0.5) == 0
    assert [schedule(step, 3, 0.0, 0.0) for step in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"accumulate": 0},
        {"sequence": -1},
        {"evaluate_every": 0},
        {"steps": -1},
        {"seed": -1},
        {"warmup": 1.5},
        {"decay": math.nan},
        {"matrix_lr": 0.0},
        {"vector_lr": math.nan},
        {"clip": -1.0},
        {"save_minutes": 0.0},
        {"precision": "fp64"},
    ],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_every_model_preset_has_train_settings():
    for name in PRESETS:
        assert train_preset(name).sequence <= preset(name).context
    with pytest.raises(ConfigError, match="mini"):
        train_preset("minni")


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_without_time_is_refused(minutes, tmp_path):
    with pytest.raises(ConfigError, match="give a number above 0"):
        Budget(minutes)
    with pytest.raises(ConfigError):
        pretrain(tiny(), numbered, replace(PLAIN, steps=0), tmp_path / "run", minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_budget_by_hand():
    budget = Budget(2.0)
    assert not budget.known and budget.steps > 10_000
    budget.times = [30.0, 1.0, 2.0, 2.0, 9.0, 2.0]
    budget.settle(done=6, spent=46.0)
    assert budget.known and budget.steps == 6 + (120 - 46) // 2
    budget.settle(done=6, spent=500.0)  # the time is over: one step, to end the schedule
    assert budget.steps == 7
    only_one = Budget(1.0)
    only_one.times = [5.0]
    only_one.settle(done=1, spent=10.0)
    assert only_one.steps == 11
    assert Budget(0.0, steps=12).steps == 12


# ------------------------------------------------------------------------------ bits per byte


def test_bits_per_byte_by_hand():
    tokenizer = ByteTokenizer()
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("abc"), tokenizer.end_id, 8, 9]])
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.tensor([[1, 1, 1, 1, 1, 0]]))
    token_bytes = bytes_of_tokens(tokenizer)
    assert token_bytes.tolist() == [0] * 7 + [1] * 256
    loss_function = LossFunction(UniformGPT(), dtype=torch.float32, compiled=False)
    # a, b, c and one byte more count: <|end|> is no text, the last target is masked.
    assert bits_per_byte(loss_function, [batch], token_bytes) == pytest.approx(math.log2(263))
    # Tokens of three bytes each: the same surprise spread over three times the text.
    bits = bits_per_byte(loss_function, [batch, batch], 3 * token_bytes)
    assert bits == pytest.approx(math.log2(263) / 3)


def test_bits_per_byte_weighs_batches_by_their_text():
    model = tiny()
    loss_function = LossFunction(model, dtype=torch.float32, compiled=False)
    token_bytes = torch.ones(97, dtype=torch.long)
    small, large = batch_of(0, rows=1), batch_of(1, rows=3)
    nats = loss_function(small).item() * 16 + loss_function(large).item() * 48
    found = bits_per_byte(loss_function, [small, large], token_bytes)
    assert found == pytest.approx(nats / math.log(2) / 64, rel=1e-5)
    assert all(w.grad is None for w in model.parameters())


# ------------------------------------------------------------------------------ steps


def step_on(model: GPT, batches: list[Batch], config: TrainConfig = PLAIN) -> tuple[float, float]:
    loss_function = LossFunction(model, dtype=torch.float32, compiled=False)
    return train_step(
        loss_function, make_optimizers(model, config), batches, factor=1.0, clip=config.clip
    )


def test_two_batches_of_four_are_one_of_eight(monkeypatch):
    # Muon multiplies in bfloat16, where the last bit of a sum may decide; compare without it.
    monkeypatch.setattr(pretraining, "orthogonalize", lambda x: x)
    a, b = batch_of(0), batch_of(1)
    both = Batch(*(torch.cat(pair) for pair in zip(*map(parts, (a, b)), strict=True)))
    halves, whole = tiny(), tiny()
    # AdamW divides by the gradient's size: where that is next to nothing, so is the precision.
    for group in (halves, whole):
        nn.init.normal_(group.blocks[0].attention.out.weight, std=0.1, generator=draw(3))
    loss_halves, norm_halves = step_on(halves, [a, b])
    loss_whole, norm_whole = step_on(whole, [both])
    assert loss_halves == pytest.approx(loss_whole, abs=1e-5)
    assert norm_halves == pytest.approx(norm_whole, abs=1e-5)
    close(halves, whole)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.inputs_BT, batch.targets_BT, batch.mask_BT


def test_the_gradient_is_clipped(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Muon, "step", lambda self: seen.append([w.grad for w in model.parameters()])
    )
    model = tiny()
    loss, norm = step_on(model, [batch_of(0)], replace(PLAIN, clip=1e-3))
    clipped = math.sqrt(sum(float(g.square().sum()) for g in seen[0]))
    assert norm > 1e-3 and clipped == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_stops_the_run_and_changes_nothing(where, tmp_path):
    model = tiny()
    if where == "loss":
        model.blocks[0].feed_forward.up.weight.data[0, 0] = math.nan
        model.blocks[0].feed_forward.down.weight.data.fill_(0.1)
    else:
        model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(TinychatError, match=r"--set matrix_lr=0\.01"):
        pretrain(model, numbered, PLAIN, tmp_path)
    torch.testing.assert_close(before, model.state_dict(), atol=0, rtol=0, equal_nan=True)
    assert load_state(tmp_path) is None


# ------------------------------------------------------------------------------ the loop


def test_one_batch_is_learned_by_heart(tmp_path):
    batch = batch_of(0)
    config = replace(PLAIN, steps=80, decay=0.5, vector_lr=0.02)
    reports = []
    result = pretrain(
        tiny(), lambda start, total: iter([batch] * (total - start)), config, tmp_path,
        on_step=reports.append,
    )  # fmt: skip
    assert reports[0].loss == pytest.approx(math.log(97), abs=0.1)
    assert result.loss < 0.05
    assert result.finished and result.step == result.steps == 80
    assert result.tokens == reports[-1].tokens == 80 * 4 * 16
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert rows[-1]["lr"] == pytest.approx(1 / 40)
    assert math.isnan(reports[0].seconds_left) and reports[-1].seconds_left == 0


def test_validation_at_intervals_and_at_the_end(tmp_path):
    config = replace(PLAIN, steps=5, evaluate_every=2)
    result = pretrain(
        tiny(), numbered, config, tmp_path,
        validation={"held out": lambda: [batch_of(99)]},
        token_bytes_V=torch.ones(97, dtype=torch.long),
    )  # fmt: skip
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [2, 4, 5]
    assert rows[-1]["bits_per_byte"] == result.bits_per_byte
    assert 4 < result.bits_per_byte["held out"] < 9


def test_accumulation_reads_micro_steps(tmp_path):
    asked = []

    def batches_from(start, total):
        asked.append((start, total))
        return numbered(start, total)

    config = replace(PLAIN, steps=3, accumulate=2)
    result = pretrain(tiny(), batches_from, config, tmp_path)
    assert asked == [(0, 6)] and result.tokens == 3 * 2 * 4 * 16


def test_minutes_become_steps_and_the_data_starts_over_with_the_total(tmp_path):
    asked = []

    def batches_from(start, total):
        asked.append((start, total))
        return numbered(start, total)

    reports = []
    result = pretrain(
        tiny(), batches_from, replace(PLAIN, steps=0), tmp_path / "run",
        minutes=1 / 60, on_step=reports.append,
    )  # fmt: skip
    assert result.finished and result.steps > 6
    assert asked == [(0, Budget.FAR), (6, result.steps)]
    assert [r.step for r in reports] == list(range(1, result.steps + 1))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["lr"] < 0.5, "the rate has fallen at the end of the budget"


def test_text_that_ends_early_is_an_error_in_words(tmp_path):
    with pytest.raises(DataError, match="ended at step 3 of 6"):
        pretrain(tiny(), lambda *_: islice(numbered(0, 99), 3), PLAIN, tmp_path)


# ------------------------------------------------------------------------------ many processes

WORKER = """
import json, sys, torch, torch.distributed as dist
from test_pretraining import PLAIN, batch_of, parts, tiny
from dataclasses import replace
from tinychat.data.batch import Batch
import tinychat.pretraining as pretraining

pretraining.orthogonalize = lambda x: x
rank, folder, timed = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "timed"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

def batches_from(start, total):
    for number in range(start, total):
        yield Batch(*(whole[2 * rank : 2 * rank + 2] for whole in parts(batch_of(number))))

model = tiny()
steps = []
config = replace(PLAIN, batch=2, steps=0 if timed else PLAIN.steps)
result = pretraining.pretrain(
    model, batches_from, config, folder, minutes=1 if timed else 0,
    on_step=lambda p: steps.append(p.step),
    # Only one process is asked to stop, as when a signal reaches one first.
    should_stop=lambda: timed and rank == 1 and len(steps) == 9,
)
torch.save(model.state_dict(), f"{folder}/weights{rank}")
print(json.dumps([result.step, result.steps, result.tokens, result.loss]))
dist.destroy_process_group()
"""


def two_processes(folder, mode: str) -> list[list[float]]:
    from pathlib import Path

    folder.mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder), mode],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    answers = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    return [json.loads(answer) for answer in answers]


@pytest.mark.slow
def test_two_processes_on_half_batches_equal_one_on_whole_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "orthogonalize", lambda x: x)
    one = tiny()
    result = pretrain(one, numbered, PLAIN, tmp_path / "one")
    first, second = two_processes(tmp_path / "two", "steps")
    assert first == second
    assert first[:3] == [6, 6, result.tokens] and first[3] == pytest.approx(result.loss, abs=1e-5)
    for rank in range(2):
        torch.testing.assert_close(
            torch.load(tmp_path / "two" / f"weights{rank}", weights_only=True),
            dict(one.state_dict()),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.slow
def test_two_processes_agree_on_the_budget_and_on_stopping(tmp_path):
    first, second = two_processes(tmp_path / "two", "timed")
    assert first == second and first[0] == 9
