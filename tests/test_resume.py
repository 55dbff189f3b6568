"""A run that is stopped, killed or resumed in the wrong place ends as it should."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pretraining import PLAIN, TINY, batch_of, numbered, same, tiny

from tinychat.gpt import GPT
from tinychat.pretraining import make_optimizers, pack_state, pretrain, unpack_state
from tinychat.runtime.errors import ConfigError
from tinychat.runtime.metrics import read_metrics
from tinychat.runtime.state import load_state, save_state

VALIDATION = {
    "validation": {"held out": lambda: [batch_of(99)]},
    "token_bytes_V": torch.ones(TINY.vocab_size, dtype=torch.long),
}


def stop_after(count: int) -> dict:
    steps: list[int] = []
    return {
        "on_step": lambda progress: steps.append(progress.step),
        "should_stop": lambda: len(steps) == count,
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_and_resumed_equals_unbroken(tmp_path, accumulate):
    config = replace(PLAIN, steps=9, accumulate=accumulate)
    unbroken, started, resumed = tiny(), tiny(), tiny(seed=7)
    whole = pretrain(unbroken, numbered, config, tmp_path / "a", **VALIDATION)
    part = pretrain(started, numbered, config, tmp_path / "b", **stop_after(4))
    assert not part.finished and (part.step, part.steps) == (4, 9)
    rest = pretrain(resumed, numbered, config, tmp_path / "b", resume=True, **VALIDATION)
    assert same(unbroken, resumed)
    assert rest[:3] == whole[:3] == (9, 9, whole.tokens)
    assert (rest.loss, rest.bits_per_byte) == (whole.loss, whole.bits_per_byte)
    assert [row["step"] for row in read_metrics(tmp_path / "b" / "metrics.jsonl")] == [
        *range(1, 10)
    ]
    for column in ("loss", "lr", "norm", "tokens"):
        a, b = ([row[column] for row in read_metrics(tmp_path / x / "metrics.jsonl")] for x in "ab")
        assert a == b


def test_resuming_a_finished_run_changes_nothing_and_knows_its_loss(tmp_path):
    model = tiny()
    first = pretrain(model, numbered, PLAIN, tmp_path, **VALIDATION)
    again = tiny(seed=5)
    second = pretrain(again, numbered, PLAIN, tmp_path, resume=True, **VALIDATION)
    assert same(model, again) and second.finished
    assert (second.loss, second.bits_per_byte) == (first.loss, first.bits_per_byte)
    assert math.isfinite(second.loss)
    assert second.seconds >= first.seconds


def test_more_steps_make_the_run_longer(tmp_path):
    pretrain(tiny(), numbered, PLAIN, tmp_path)
    result = pretrain(tiny(), numbered, replace(PLAIN, steps=8), tmp_path, resume=True)
    assert (result.step, result.steps) == (8, 8)


def test_more_minutes_make_the_run_longer_and_none_keep_its_length(tmp_path):
    config = replace(PLAIN, steps=0)
    first = pretrain(tiny(), numbered, config, tmp_path, minutes=0.01)
    kept = pretrain(tiny(), numbered, config, tmp_path, resume=True)
    assert kept.steps == first.steps and kept.finished
    more = pretrain(tiny(), numbered, config, tmp_path, resume=True, minutes=0.01)
    assert more.finished and more.steps > first.steps
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, more.steps + 1)]


def test_stopped_before_the_budget_is_known_still_has_a_length(tmp_path):
    config = replace(PLAIN, steps=0)
    part = pretrain(tiny(), numbered, config, tmp_path, minutes=0.01, **stop_after(2))
    assert part.step == 2 < part.steps < 10_000
    rest = pretrain(tiny(), numbered, config, tmp_path, resume=True)
    assert rest.finished and rest.steps == part.steps


def test_resume_without_a_saved_state_begins(tmp_path):
    model, other = tiny(), tiny()
    pretrain(model, numbered, PLAIN, tmp_path / "a")
    pretrain(other, numbered, PLAIN, tmp_path / "b", resume=True)
    assert same(model, other)


def test_a_used_folder_is_refused_and_stays_as_it_was(tmp_path):
    pretrain(tiny(), numbered, PLAIN, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        pretrain(tiny(), numbered, PLAIN, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [{"width": 64}, {"layers": 3}, {"layers": 1}])
def test_the_state_of_another_model_is_refused(tmp_path, change):
    pretrain(tiny(), numbered, PLAIN, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tiny(config=replace(TINY, **change))
    with pytest.raises(ConfigError, match="another model shape"):
        pretrain(other, numbered, PLAIN, tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_states_saved_before_losses_were_in_them_still_resume(tmp_path):
    pretrain(tiny(), numbered, PLAIN, tmp_path, **stop_after(3))
    tensors, scalars = load_state(tmp_path)
    del scalars["loss"], scalars["bits_per_byte"]
    save_state(tmp_path, tensors, scalars)
    assert pretrain(tiny(), numbered, PLAIN, tmp_path, resume=True).finished


def test_pack_and_unpack_return_everything():
    model, other = tiny(), tiny(seed=3)
    optimizers = make_optimizers(model, PLAIN)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        optimizer.step()
    packed = {name: tensor.clone() for name, tensor in pack_state(model, optimizers).items()}
    unpack_state(packed, other, fresh := make_optimizers(other, PLAIN))
    again = pack_state(other, fresh)
    assert packed.keys() == again.keys() and len(packed) > 3 * len(list(model.parameters())) - 30
    assert all(torch.equal(packed[name], again[name]) for name in packed)


# ------------------------------------------------------------------------------ SIGKILL

STEPS = 150  # so many that no child is through before it is killed
KILLS = 4
# Importing torch takes seconds, so one process imports it and each attempt is a fork of that one.
PARENT = f"""
import os, random, signal, sys, time, torch
from dataclasses import replace
from test_pretraining import PLAIN, numbered, tiny
from tinychat.pretraining import pretrain

folder, out = sys.argv[1:]
config = replace(PLAIN, steps={STEPS}, save_minutes=1e-9)
chance = random.Random(0)
for attempt in range({KILLS} + 1):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        model = tiny()
        result = pretrain(
            model, numbered, config, folder, resume=True,
            on_step=lambda progress: os.write(writer, b"."),
        )
        torch.save((result.loss, model.state_dict()), out)
        os._exit(0)
    os.close(writer)
    if attempt < {KILLS}:
        for _ in range(chance.randint(0, 6)):
            os.read(reader, 1)
        time.sleep(chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
    else:
        while os.read(reader, 100):
            pass
    os.close(reader)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_at_random_moments_it_ends_like_an_unbroken_run(tmp_path):
    folder, out = tmp_path / "run", tmp_path / "end"
    answer = subprocess.run(
        [sys.executable, "-c", PARENT, str(folder), str(out)],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert list(map(int, answer.stdout.split())) == [-signal.SIGKILL] * KILLS + [0]

    config = replace(PLAIN, steps=STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unbroken: GPT = tiny()
    result = pretrain(unbroken, numbered, config, tmp_path / "unbroken")
    torch.set_num_threads(threads)
    loss, weights = torch.load(out, weights_only=True)
    assert loss == result.loss
    assert all(torch.equal(weights[name], w) for name, w in unbroken.state_dict().items())
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    expected = read_metrics(tmp_path / "unbroken" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
