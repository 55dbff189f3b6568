"""Training state, metrics and the machine."""

import json
import logging
import math
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.pretraining import TrainConfig
from tinychat.runtime import device
from tinychat.runtime.errors import CheckpointError, ConfigError, DataError
from tinychat.runtime.metrics import MetricsWriter, read_metrics
from tinychat.runtime.state import load_state, lock_run, save_state

# --- training state ------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def step_of(folder: Path) -> int:
    found = load_state(folder)
    assert found is not None
    return found[1]["step"]


def test_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(3, 5),
        "half": torch.randn(4).bfloat16(),
        "half16": torch.randn(4).half(),
        "double": torch.tensor(math.pi, dtype=torch.float64),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "step": torch.tensor(2**40),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 7),
        "t": torch.arange(6).reshape(2, 3).T,
        "rng": torch.get_rng_state(),
    }
    scalars = {
        "step": 7, "best": float("inf"), "third": 1 / 3, "big": 2**127, "text": "ü\ud800", "n": None
    }  # fmt: skip
    path = save_state(tmp_path / "new" / "run", tensors, scalars)
    assert path.name == "state-00000007.safetensors"
    found = load_state(path.parent)
    assert found is not None
    loaded, back = found
    assert back == scalars and loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert torch.equal(
            loaded[name].contiguous().reshape(-1).view(torch.uint8),
            value.contiguous().reshape(-1).view(torch.uint8),
        )


def test_random_numbers_go_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    save_state(tmp_path, {"rng": generator.get_state()}, {"step": 1})
    expected = torch.rand(4, generator=generator)
    found = load_state(tmp_path)
    assert found is not None
    other = torch.Generator()
    other.set_state(found[0]["rng"])
    assert torch.equal(torch.rand(4, generator=other), expected)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.floats(allow_nan=False) | st.integers() | st.text()))
def test_any_scalars(tmp_path_factory: pytest.TempPathFactory, scalars: dict) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_state"
    save_state(folder, {}, {**scalars, "step": 0})
    found = load_state(folder)
    assert found is not None and found[1] == {**scalars, "step": 0}


def test_the_newest_and_one_before_are_kept(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "none") is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert load_state(tmp_path) is None
    for step in (5, 10, 99_999_999, 100_000_000):
        save_state(tmp_path, {"w": torch.ones(2)}, {"step": step})
        assert step_of(tmp_path) == step
    assert names(tmp_path) == [
        "metrics.jsonl", "state-100000000.safetensors", "state-99999999.safetensors"
    ]  # fmt: skip
    save_state(tmp_path, {}, {"step": 12})  # a run that began again leaves no later steps
    assert step_of(tmp_path) == 12
    assert names(tmp_path) == ["metrics.jsonl", "state-00000012.safetensors"]


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "pickle", "folder"])
def test_a_damaged_newest_falls_back(tmp_path: Path, caplog, harm: str) -> None:
    save_state(tmp_path, {"w": torch.ones(4)}, {"step": 1})
    newest = save_state(tmp_path, {"w": torch.ones(4)}, {"step": 2})
    data = newest.read_bytes()
    newest.unlink()
    if harm == "folder":
        newest.mkdir()
    else:
        newest.write_bytes(
            {
                "cut": data[:-3],
                "flip": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
                "empty": b"",
                "pickle": b"\x80\x04.",
            }[harm]
        )
    with caplog.at_level(logging.WARNING, logger="tinychat"):
        assert step_of(tmp_path) == 1
    assert "Resuming from state-00000001.safetensors" in caplog.text
    if harm != "folder":
        save_state(tmp_path, {"w": torch.ones(4)}, {"step": 2})
        assert step_of(tmp_path) == 2


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"state-{step:08d}.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(CheckpointError, match="state-00000002"):
        load_state(tmp_path)


def test_a_checkpoint_is_not_a_state(tmp_path: Path) -> None:
    from tinychat.runtime import tensorfile

    tensorfile.write(tmp_path / "state-00000001.safetensors", {}, {"tinychat": "{}"})
    with pytest.raises(CheckpointError, match="no training state"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "scalars", "words"),
    [
        ({}, {}, "step is None"),
        ({}, {"step": 1.5}, "step is 1.5"),
        ({}, {"step": -1}, "step is -1"),
        ({}, {"step": True}, "step is True"),
        ({}, {"step": 3, "w": torch.ones(1)}, "do not fit JSON"),
        ({"__metadata__": torch.ones(1)}, {"step": 3}, "has no name"),
        ({"z": torch.ones(1, dtype=torch.complex64)}, {"step": 3}, "'z' is complex64"),
    ],
)
def test_wrong_states_are_refused(tmp_path: Path, tensors, scalars, words: str) -> None:
    save_state(tmp_path, {}, {"step": 2})
    with pytest.raises(CheckpointError, match=words):
        save_state(tmp_path, tensors, scalars)
    assert names(tmp_path) == ["state-00000002.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path, holding) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with holding(folder), pytest.raises(ConfigError, match="Another tinychat is training in .*run"):
        lock_run(folder)
    lock_run(folder)  # that one was killed
    lock_run(folder)  # the stages of `train all` are one process
    with pytest.raises(AssertionError, match="Another tinychat"), holding(folder):
        pass
    assert names(folder) == []


def test_state_in_a_bad_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Cannot write"):
        save_state(tmp_path / "file", {}, {"step": 1})
    with pytest.raises(CheckpointError, match="Cannot read training states"):
        load_state(tmp_path / "file")


def test_leftovers_of_a_killed_save_go(tmp_path: Path) -> None:
    (tmp_path / ".state-00000001.safetensors.abc.tmp").write_bytes(b"half")
    assert load_state(tmp_path) is None
    save_state(tmp_path, {}, {"step": 2})
    assert names(tmp_path) == ["state-00000002.safetensors"]


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 2.5}, text="grüße")
        writer.write(step=2, loss=torch.tensor(float("nan")), rate=torch.tensor(0.5), path=path)
        rows = read_metrics(path)  # readable while it is being written
    assert rows == [
        {"step": 1, "loss": 2.5, "text": "grüße"},
        {"step": 2, "loss": None, "rate": 0.5, "path": str(path)},
    ]
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with MetricsWriter(path) as writer:
        writer.write(step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_resuming_drops_the_steps_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(preset="nano")
        for step in range(5):
            writer.write(step=step)
    with MetricsWriter(path, resume_step=2) as writer:
        writer.write(step=3)
    assert [row.get("step") for row in read_metrics(path)] == [None, 0, 1, 2, 3]


def test_wrong_metrics_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="Cannot read metrics"):
        read_metrics(path)
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    with pytest.raises(DataError, match="Line 2 of"):
        read_metrics(path)
    with pytest.raises(DataError, match="Cannot write metrics"):
        MetricsWriter(path / "below")
    with pytest.raises(DataError, match="Cannot write metrics"):
        MetricsWriter(tmp_path)


# --- the machine ---------------------------------------------------------------------------------


def test_devices() -> None:
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_device().type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:x", "", "cuda:-1"):
        with pytest.raises(ConfigError, match="Unknown device"):
            device.pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="choose cpu"):
            device.pick_device("cuda")


def test_each_process_of_torchrun_takes_its_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.pick_device() == torch.device("cuda", 1)
    assert device.pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"choose cuda:0 to cuda:1\."):
        device.pick_device("cuda:7")


def test_threads(monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert device.set_threads() == torch.get_num_threads() == device.available_cores() >= 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert device.set_threads() == torch.get_num_threads() == 1
        with pytest.raises(ConfigError, match="threads = 0"):
            device.set_threads(0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("flags", "fast"),
    [(["avx2", "avx512f"], False), (["avx512_bf16"], True), (["amx_bf16"], True), ([], False)],
)
def test_fast_bf16_needs_the_instructions(monkeypatch, flags, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "_cpu", lambda: ("a processor", flags))
    device.has_fast_bf16.cache_clear()
    try:
        assert device.has_fast_bf16() is fast
        expected = torch.bfloat16 if fast else torch.float32
        assert TrainConfig().dtype == expected
        assert TrainConfig(precision="bf16").dtype == torch.bfloat16
    finally:
        device.has_fast_bf16.cache_clear()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("reuse", [True, False])
def test_reuse_memory_keeps_freed_pages(reuse: bool) -> None:
    program = f"""
import resource
from pathlib import Path
from tinychat.runtime.device import reuse_memory
assert not {reuse} or reuse_memory()
import torch

def resident():  # MB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20

torch.ones(1)
before = resident()
torch.ones(100 * 2**18)  # float32, freed at once
freed = resident()
torch.ones(50 * 2**18)
print(freed - before, resident() - freed)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads take memory, too
    )
    assert result.returncode == 0, result.stderr
    kept, more = map(float, result.stdout.split())
    # Either what was freed stays here and is taken again as it is, or the kernel has it back.
    assert (kept > 90 if reuse else kept < 10) and more < 10


def test_hardware_fits_json() -> None:
    hardware = device.describe_hardware()
    assert json.loads(json.dumps(hardware)) == hardware
    assert hardware["cores"] >= 1 and hardware["cpu"] and hardware["torch"] == torch.__version__


def test_has_compiler(monkeypatch, tmp_path) -> None:
    compiler = tmp_path / ("cl.exe" if os.name == "nt" else "g++")
    compiler.touch(0o755)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    try:
        for path, expected in (("", False), (str(tmp_path), headers.is_file())):
            monkeypatch.setenv("PATH", path)
            monkeypatch.delenv("CXX", raising=False)
            device.has_compiler.cache_clear()
            assert device.has_compiler() is expected
        monkeypatch.setenv("CXX", "no-such-compiler -O2")
        device.has_compiler.cache_clear()
        assert not device.has_compiler()
        monkeypatch.setenv("CXX", "'g++")  # an open quote
        device.has_compiler.cache_clear()
        assert not device.has_compiler()
    finally:
        device.has_compiler.cache_clear()


def test_importing_the_runtime_is_light() -> None:
    code = (
        "import sys, tinychat.runtime\n"
        "from tinychat.runtime import checkpoint, device, errors, metrics, state\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'typer', 'safetensors') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
