"""Checkpoints: round trips, every way a file can be wrong, atomic writes, finding, pieces."""

import hashlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tinychat.runtime import checkpoint, files, search, tensorfile
from tinychat.runtime.errors import CheckpointError, TinychatError

CONFIG = {
    "vocab_size": 7,
    "width": 4,
    "layers": 1,
    "heads": 1,
    "kv_heads": 1,
    "head_width": 4,
    "hidden": 8,
    "context": 16,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
}
TOKENIZER = b"\x00any bytes \xff"
LINEAGE = {"parent": None, "data": [{"name": "corpus", "licence": "CC0"}], "tokens": 12}
METRICS = {"bits_per_byte": 1.25}


def tiny_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
    }


def save(path: Path, **changes) -> checkpoint.CheckpointInfo:
    given = {
        "stage": "sft",
        "config": CONFIG,
        "state": tiny_state(),
        "tokenizer": TOKENIZER,
        "lineage": LINEAGE,
        "metrics": METRICS,
    }
    return checkpoint.save(path, **{**given, **changes})


def refusal(path: Path, function=checkpoint.load) -> str:
    """The sentence with which `function` refuses `path`: one line, and it names the path."""
    with pytest.raises(CheckpointError) as caught:
        function(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and path.name in sentence and sentence.endswith(".")
    return sentence


def same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> bool:
    return (
        one.info == other.info
        and one.tokenizer == other.tokenizer
        and one.state.keys() == other.state.keys()
        and all(torch.equal(one.state[name], other.state[name]) for name in one.state)
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.safetensors"
    save(path)
    return path


# --- round trips ---------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sft.safetensors"
    info = save(path, chat_template="another-2", quantize="fp32")
    loaded = checkpoint.load(path)
    assert loaded.info == info == checkpoint.read_info(path)
    assert (info.stage, info.config, info.chat_template) == ("sft", CONFIG, "another-2")
    assert (info.lineage, info.metrics, info.dtype) == (LINEAGE, METRICS, "fp32")
    assert (info.parameters, info.bytes, info.format) == (7 * 4 + 4, path.stat().st_size, 1)
    assert info.tokenizer_sha256 == hashlib.sha256(TOKENIZER).hexdigest()
    assert loaded.tokenizer == TOKENIZER
    for name, weights in tiny_state().items():
        assert torch.equal(loaded.state[name], weights)
    assert os.listdir(path.parent) == ["sft.safetensors"]


def test_int8_is_off_by_at_most_half_a_step(tmp_path: Path) -> None:
    weights = torch.tensor(
        [[127.0, -63.4, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-45, 0.0, -3e-45, 0.0], [3e38] * 4]
    )
    vector = torch.tensor([0.1, -0.2])
    info = save(tmp_path / "a.safetensors", state={"w": weights, "norm.scale": vector})
    state = checkpoint.load(info.path).state
    assert list(state) != [] and state.keys() == {"w", "norm.scale"}
    assert state["w"][0].tolist() == [127.0, -63.0, 0.0, 0.0]  # 0.5 rounds to even
    assert state["w"][1].tolist() == [0.0] * 4
    assert torch.allclose(state["w"][3], weights[3])
    assert torch.equal(state["norm.scale"], vector)  # a vector may be called scale
    assert info.parameters == 18


def test_small_moves_of_int8_weights_survive_only_on_another_grid(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(path, state={"w": torch.randn(64, 256, generator=torch.Generator().manual_seed(0))})
    before = checkpoint.load(path).state["w"]
    step = before.abs().amax(1, keepdim=True) / 127
    moved = before + 0.2 * step

    def kept(levels: int) -> float:
        """The share of the move that is left in the file, on average."""
        save(path, state={"w": moved}, levels=levels)
        return float(((checkpoint.load(path).state["w"] - before) / (moved - before)).mean())

    assert kept(127) < 0.1
    assert kept(120) == pytest.approx(1, abs=0.1)


def test_int8_levels_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="levels = 128"):
        save(tmp_path / "w.safetensors", state={"w": torch.ones(2, 2)}, levels=128)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda columns: st.lists(
            st.lists(st.floats(-(2.0**127), 2.0**127, width=32),
                     min_size=columns, max_size=columns),
            min_size=1, max_size=4,
        )
    )
)  # fmt: skip
def test_int8_of_any_matrix(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    weights = torch.tensor(rows, dtype=torch.float32)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save(path, state={"w": weights})
    once = checkpoint.load(path).state["w"]
    scale = weights.abs().amax(1, keepdim=True).double() / 127
    assert bool(((once.double() - weights.double()).abs() <= scale * 0.5001 + 1.5e-43).all())
    save(path, state={"w": once})  # what was quantised stays (to the last bits of the scale)
    again = checkpoint.load(path).state["w"]
    assert torch.allclose(again, once, rtol=1e-6, atol=1e-42)


def test_bf16_keeps_matrices_to_eight_bits_and_vectors_exactly(tmp_path: Path) -> None:
    info = save(tmp_path / "a.safetensors", quantize="bf16")
    state, given = checkpoint.load(info.path).state, tiny_state()
    assert info.dtype == "bf16" and all(x.dtype == torch.float32 for x in state.values())
    assert torch.equal(state["embed.weight"], given["embed.weight"].bfloat16().float())
    assert torch.equal(state["norm.weight"], given["norm.weight"])


def test_any_dtype_layout_and_gradient_goes_in(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    state = {
        "t": base.T,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(2.5),
        "cube": torch.ones(2, 2, 2),
    }
    save(tmp_path / "a.safetensors", state=state, quantize="fp32")
    loaded = checkpoint.load(tmp_path / "a.safetensors").state
    assert torch.equal(loaded["t"], base.T.float())
    assert loaded["scalar"].shape == () and loaded["scalar"].item() == 2.5
    assert not loaded["grad"].requires_grad and loaded["cube"].shape == (2, 2, 2)


def test_the_safetensors_library_reads_it(sound: Path) -> None:
    tensors = load_file(sound)
    assert tensors.keys() == {
        "embed.weight", "embed.weight.scale", "norm.weight", "tokenizer.model"
    }  # fmt: skip
    weight = tensors["embed.weight"].float() * tensors["embed.weight.scale"]
    assert torch.equal(weight, checkpoint.load(sound).state["embed.weight"])
    assert bytes(tensors["tokenizer.model"].tolist()) == TOKENIZER


def test_loaded_weights_share_no_memory(sound: Path) -> None:
    loaded = checkpoint.load(sound)
    for weights in loaded.state.values():
        weights.zero_()
    assert checkpoint.load(sound).state["norm.weight"].abs().sum() > 0


def test_read_info_and_find_import_no_torch(sound: Path) -> None:
    code = (
        "import sys; from tinychat.runtime import checkpoint as c\n"
        f"print(c.read_info(c.find({str(sound)!r})).stage)\n"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'platformdirs') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["sft", "[]"]


# --- files that are not checkpoints --------------------------------------------------------------


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Exploit()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        *((pickle.dumps(Exploit(), protocol=number), "pickle") for number in (2, 3, 4, 5)),
        (pickle.dumps(Exploit(), protocol=0), "a text file"),
        (pickle.dumps({"a": list(range(99))}, protocol=4), "pickle"),
        (zipped(), "torch.save"),
        (b"GGUF\x03\0\0\0" + bytes(90), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>" * 9, "a text file"),
        ("Füchse träumen. ".encode() * 9, "a text file"),
        (b"a", "a text file"),
        (b"\x10\0\0", "truncated"),
        (bytes(100), "something else"),
        (b"\xff" * 100, "something else"),
        ((1 << 62).to_bytes(8, "little") + b"{" + bytes(99), "truncated"),
        ((2).to_bytes(8, "little") + b"{}", "without tinychat's checksums"),
        ((2).to_bytes(8, "little") + b"{]", "header is not readable"),
        ((90_000).to_bytes(8, "little") + b'{"a":' * 18_000, "header is not readable"),
    ],
)
def test_other_files_are_named(tmp_path: Path, monkeypatch, data: bytes, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    assert words in refusal(path)
    assert words in refusal(path, checkpoint.read_info)
    assert os.listdir(tmp_path) == ["odd.safetensors"]  # above all no "pwned"


def test_torch_save_and_foreign_safetensors(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "a.pt")
    assert "torch.save" in refusal(tmp_path / "a.pt")
    torch.save(tiny_state(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert "pickle" in refusal(tmp_path / "b.pt")
    save_file(tiny_state(), tmp_path / "c.safetensors")
    assert "without tinychat's checksums" in refusal(tmp_path / "c.safetensors")
    tensorfile.write(tmp_path / "d.safetensors", tiny_state(), {"other": "{}"})
    assert "no tinychat checkpoint" in refusal(tmp_path / "d.safetensors")


def test_missing_folder_and_special_files(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.safetensors")
    assert "is a folder" in refusal(tmp_path)
    assert "Cannot read" in refusal(tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError):
        checkpoint.load("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in refusal(tmp_path / "pipe")


# --- damage --------------------------------------------------------------------------------------


def test_every_truncation_is_found(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refusal(path)
    path.write_bytes(data + b"\0")
    assert "too long" in refusal(path)


def test_a_flipped_bit_in_any_byte_is_found(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    path = tmp_path / "flipped.safetensors"
    choose = random.Random(3)
    for place in range(len(data)):
        wrong = bytearray(data)
        wrong[place] ^= 1 << choose.randrange(8)
        path.write_bytes(wrong)
        refusal(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_other_damage_is_found(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes replaced by any others, or bytes put in or left out anywhere."""
    whole = sound.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    left_out = data.draw(st.integers(0, 40))
    wrong = whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + left_out :]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(wrong)
    if wrong == whole:
        assert checkpoint.load(path).tokenizer == TOKENIZER
    else:
        refusal(path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(data)
    refusal(path)


def resealed(path: Path, change) -> None:
    """Change a file's table and metadata and make its checksums right again, as an attacker can."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    record = json.loads(header["__metadata__"]["tinychat"])
    change(header, record, payload)
    header["__metadata__"] = {
        "tinychat": json.dumps(record),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "header_sha256": "0" * 64,
    }
    raw = json.dumps(header).encode()
    head = len(raw).to_bytes(8, "little")
    own = hashlib.sha256(head + raw).hexdigest().encode()
    path.write_bytes(head + raw.replace(b"0" * 64, own) + payload)


def test_resealing_alone_changes_nothing(tmp_path: Path, sound: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path)
    resealed(path, lambda header, record, payload: None)
    assert checkpoint.load(path).tokenizer == TOKENIZER


def _huge(header, record, payload):
    header["embed.weight"]["shape"] = [1 << 40, 1 << 40]


def _overlap(header, record, payload):
    header["norm.weight"]["data_offsets"] = header["embed.weight.scale"]["data_offsets"][:1] * 2
    header["norm.weight"]["data_offsets"][1] += 16


def _gap(header, record, payload):
    payload += bytes(4)
    header["tokenizer.model"]["data_offsets"] = [
        offset + 4 for offset in header["tokenizer.model"]["data_offsets"]
    ]


def _set(part: str, key: str, value):
    def change(header, record, payload):
        {"header": header, "record": record, "config": record["config"]}[part][key] = value

    return change


def _drop(part: str, key: str):
    def change(header, record, payload):
        {"header": header, "record": record, "config": record["config"]}[part].pop(key)

    return change


def _entry(name: str, key: str, value):
    def change(header, record, payload):
        header[name][key] = value

    return change


def _float(name: str, value: float):
    def change(header, record, payload):
        begin = header[name]["data_offsets"][0]
        payload[begin : begin + 4] = bytes(torch.tensor([value]).view(torch.uint8).tolist())

    return change


def _other_tokenizer(header, record, payload):
    payload[header["tokenizer.model"]["data_offsets"][0]] ^= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("record", "format", 2), "upgrade tinychat"),
        (_set("record", "format", 0), "its format is 0"),
        (_set("record", "format", True), "its format is True"),
        (_set("record", "stage", "alpha"), "its stage is 'alpha', not one of base, sft"),
        (_set("record", "stage", ["sft"]), "its stage is missing"),
        (_set("record", "dtype", "int4"), "its dtype is 'int4'"),
        (_set("record", "lineage", []), "its lineage is not a table"),
        (_drop("record", "config"), "its config is not a table"),
        (_drop("record", "chat_template"), "its chat_template is missing"),
        (_drop("config", "layers"), "its config lacks 'layers'"),
        (_set("config", "width", -4), "width = -4"),
        (_set("config", "width", 4.0), "width = 4.0"),
        (_set("config", "context", True), "context = True"),
        (_set("config", "rope_theta", float("nan")), "rope_theta = nan"),
        (_huge, "impossible type, shape or place"),
        (_overlap, "overlaps the one before"),
        (_gap, "leaves a gap"),
        (_entry("embed.weight", "dtype", "I4"), "impossible type"),
        (_entry("embed.weight", "shape", [-7, -4]), "impossible type"),
        (_entry("embed.weight", "shape", "74"), "impossible type"),
        (_entry("embed.weight", "data_offsets", [0]), "impossible type"),
        (_entry("embed.weight", "dtype", "U8"), "[7, 1], not I8"),
        (_entry("embed.weight", "shape", [28]), "'embed.weight' is I8 [28], not F32"),
        (_entry("embed.weight.scale", "shape", [7]), "scales of 'embed.weight' are missing"),
        (_set("header", "norm.weight", None), "impossible type"),
        (_drop("header", "tokenizer.model"), "too long"),
        (_other_tokenizer, "not the one that its metadata names"),
        (_float("norm.weight", float("nan")), "not finite"),
        (_float("norm.weight", float("-inf")), "not finite"),
        (_float("embed.weight.scale", float("inf")), "not finite"),
        (_float("embed.weight.scale", 3e38), "not finite"),
    ],
)
def test_a_wrong_file_with_right_checksums(tmp_path: Path, change, words: str) -> None:
    path = tmp_path / "wrong.safetensors"
    save(path)
    resealed(path, change)
    assert words in refusal(path)


def test_missing_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    record = {
        "format": 1, "stage": "base", "config": CONFIG, "chat_template": "", "dtype": "fp32",
        "tokenizer_sha256": "", "lineage": {}, "metrics": {},
    }  # fmt: skip
    tensorfile.write(path, {"a": torch.ones(1)}, {"tinychat": json.dumps(record)})
    assert "its tokenizer is missing" in refusal(path, checkpoint.read_info)
    only = {"tokenizer.model": torch.ones(1, dtype=torch.uint8)}
    tensorfile.write(path, only, {"tinychat": json.dumps(record)})
    assert "there are no weights" in refusal(path, checkpoint.read_info)
    tensorfile.write(path, only, {"tinychat": "[]"})
    assert "not readable" in refusal(path, checkpoint.read_info)


# --- what save refuses, and what it leaves -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "final"}, "its stage is 'final'"),
        ({"config": {**CONFIG, "layers": 0}}, "layers = 0"),
        ({"config": {}}, "its config lacks 'vocab_size'"),
        ({"state": {}}, "no weights"),
        ({"state": {"w": torch.tensor([[1.0, float("nan")]])}}, "not finite"),
        ({"state": {"w": torch.tensor([float("inf")])}}, "not finite"),
        ({"state": {"w": torch.tensor([1e300], dtype=torch.float64)}}, "not finite"),
        ({"state": {"w": torch.tensor([[3.4e38]])}, "quantize": "bf16"}, "not finite"),
        ({"state": {"w": torch.tensor([[3.4e38]])}, "quantize": "int8"}, "not finite"),
        ({"state": {"w": torch.ones(2, dtype=torch.int64)}}, "'w' is int64"),
        ({"state": {"w": torch.ones(0, 3)}}, "shape [0, 3]"),
        ({"state": {"tokenizer.model": torch.ones(2)}}, "is taken"),
        ({"state": {"w": torch.ones(1, 1), "w.scale": torch.ones(1)}}, "is taken"),
        ({"state": {"w.scale": torch.ones(1), "w": torch.ones(1, 1)}}, "is taken"),
        ({"tokenizer": b""}, "no bytes"),
        ({"metrics": {"loss": float("nan")}}, "do not fit JSON"),
        ({"lineage": {"path": object()}}, "do not fit JSON"),
        ({"lineage": {"text": "x" * (17 << 20)}}, "its metadata takes"),
        ({"quantize": "int4"}, "choose int8, bf16 or fp32"),
    ],
)
def test_save_refuses_and_the_old_file_stays(tmp_path: Path, changes: dict, words: str) -> None:
    path = tmp_path / "a.safetensors"
    save(path)
    before = path.read_bytes()
    assert words in refusal(path, lambda path: save(path, **changes))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_failing_disk_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, full)
            sentence = refusal(path, lambda path: save(path, stage="base"))
        assert "No space left on device" in sentence
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "fsync", interrupt)
        save(path, stage="base")
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path, save)
    (tmp_path / "file").write_text("x")
    assert "Cannot write" in refusal(tmp_path / "file" / "a.safetensors", save)
    assert "Cannot write" in refusal(tmp_path / ("x" * 300), save)


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    path = tmp_path / "a[1].safetensors"
    old, fresh = (tmp_path / f".{path.name}.{name}.tmp" for name in ("old", "fresh"))
    for file in (old, fresh):
        file.write_text("half")
    os.utime(old, (1, 1))
    save(path)
    assert not old.exists() and fresh.exists() and path.exists()


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and Unix modes")
def test_a_link_keeps_pointing_and_the_umask_holds(tmp_path: Path) -> None:
    target, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(target)
    save(link)
    assert link.is_symlink() and target.is_file()
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


KILLED = """
import sys, itertools, torch
from tinychat.runtime import checkpoint, state
config = {config!r}
for step in itertools.count(1):
    weights = {{"w": torch.full((64, 256), float(step)), "v": torch.full((9,), float(step))}}
    checkpoint.save(sys.argv[1] + "/a.safetensors", stage="base", config=config, state=weights,
                    tokenizer=b"t", lineage={{"step": step}}, metrics={{}}, quantize="fp32")
    state.save_state(sys.argv[1] + "/state", weights, {{"step": step}})
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_any_moment_a_whole_file_is_there(tmp_path: Path) -> None:
    from tinychat.runtime.state import load_state

    script = tmp_path / "saver.py"
    script.write_text(KILLED.format(config=CONFIG))
    root = Path(checkpoint.__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    choose = random.Random(3)
    for _ in range(3):
        saver = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
        )
        assert saver.stdout is not None
        saver.stdout.readline()  # the first save is done
        time.sleep(choose.uniform(0, 0.15))
        saver.kill()
        said = saver.stdout.read().split()
        saver.stdout.close()
        saver.wait()
        loaded = checkpoint.load(tmp_path / "a.safetensors")
        step = loaded.info.lineage["step"]
        assert all(bool((weights == step).all()) for weights in loaded.state.values())
        found = load_state(tmp_path / "state")
        assert found is not None
        tensors, scalars = found
        assert all(bool((values == scalars["step"]).all()) for values in tensors.values())
        assert scalars["step"] >= int(said[-1] if said else 1)  # what was reported is durable


# --- finding -------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    folders = {name: tmp_path / name for name in ("checkpoints", "user", "package")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(
        search,
        "search_folders",
        lambda: [Path("checkpoints"), folders["user"], folders["package"]],
    )
    return {"here": tmp_path, **folders}


def test_find_takes_the_nearest_place_first(places: dict[str, Path]) -> None:
    for name in ("package", "user", "checkpoints", "here"):
        (places[name] / "sft.safetensors").write_bytes(b"x")
        for asked in ("sft", "sft.safetensors", Path("sft")):
            assert checkpoint.find(asked).resolve() == places[name] / "sft.safetensors"
    absolute = places["user"] / "sft"
    assert checkpoint.find(absolute) == places["user"] / "sft.safetensors"
    (places["here"] / "odd.name").write_bytes(b"x")
    assert checkpoint.find("odd.name") == Path("odd.name")


def test_find_says_what_is_there(places: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="none is installed, make one"):
        checkpoint.find("rlhf")
    for name in ("base", "rlhf"):
        (places["user"] / f"{name}.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"did you mean rlhf\? There is base \(.*, rlhf"):
        checkpoint.find("rhlf.safetensors")
    with pytest.raises(CheckpointError, match=r"No checkpoint 'zebra': there is base"):
        checkpoint.find("zebra")
    with pytest.raises(CheckpointError, match="is a folder: name one in it: user/base, user/rlhf"):
        checkpoint.find("user")
    with pytest.raises(CheckpointError, match="is a folder: it holds no checkpoint"):
        checkpoint.find("package")


def test_find_takes_the_name_of_a_run(places: dict[str, Path]) -> None:
    def make(*files: str) -> None:
        for file in files:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_bytes(b"x")

    make("runs/n1/sft.safetensors", "runs/n1/state-00000007.safetensors")
    for asked in ("n1", "runs/n1", "runs/n1/", "n1/sft", "n1/sft.safetensors"):
        assert checkpoint.find(asked) == Path("runs/n1/sft.safetensors")
    make("runs/whole/base/base.safetensors")  # `train all`, while it is at its first stage
    assert checkpoint.find("whole") == Path("runs/whole/base/base.safetensors")
    make("runs/whole/reward-2/reward.safetensors")
    assert checkpoint.find("whole/reward-2") == Path("runs/whole/reward-2/reward.safetensors")
    with pytest.raises(CheckpointError, match="one in it: whole/base, whole/reward-2"):
        checkpoint.find("whole")
    Path("runs/begun").mkdir()
    with pytest.raises(CheckpointError, match="'begun' is a folder: it holds no checkpoint"):
        checkpoint.find("begun")
    make("runs/base/base.safetensors", "user/base.safetensors")  # a run without --run
    assert checkpoint.find("base") == places["user"] / "base.safetensors"
    assert checkpoint.find("runs/base") == Path("runs/base/base.safetensors")
    assert list(search.runs()) == ["runs/base", "n1", "whole/base", "whole/reward-2"]
    for name, file in search.runs().items():
        assert checkpoint.find(name) == file
    with pytest.raises(CheckpointError, match=r"did you mean n1\? There is .* n1 \(runs.n1\)"):
        checkpoint.find("n2")
    assert search.find_first("whole", "n1") is None, "nobody asked for these runs"
    assert search.find_first("rlhf", "base") == places["user"] / "base.safetensors"


def test_a_run_is_listed_by_a_name_that_means_it(places: dict[str, Path]) -> None:
    """Other things of its name come first; `runs/` and a trial file are no run."""
    for file in (
        "runs/checkpoints/base", "checkpoints/old",  # a folder that names are looked up in
        "runs/m/sft", "m",  # a file beside
        "runs/n1/sft", "n1/other",  # a folder beside
        "runs/n2/sft", "runs/n2/.trial",  # killed while it was being written
        "runs/loose",
    ):  # fmt: skip
        path = Path(f"{file}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    Path("n2").mkdir()  # empty: the run is meant
    odd = Path("runs/~nobody/sft.safetensors")  # a shell would take it for somebody's home
    odd.parent.mkdir()
    odd.write_bytes(b"x")
    assert list(search.runs()) == [
        "runs/checkpoints", "runs/m", "runs/n1", "n2", "runs/~nobody"
    ]  # fmt: skip
    for name, path in search.runs().items():
        assert checkpoint.find(name) == path
    with pytest.raises(CheckpointError):
        checkpoint.find("..")
    Path("runs/begun").mkdir()
    Path("runs/begun/run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="training isn't finished; --resume goes on with it"):
        checkpoint.find("begun")


def test_labels() -> None:
    one, two = Path("checkpoints/sft.safetensors"), Path("runs/n1/sft.safetensors")
    assert search.labels_of(["sft", "n1"], [one, two]) == ["sft", "n1"]
    assert search.labels_of([str(one), str(two)], [one, two]) == [str(one), str(two)]
    assert search.labels_of(["runs/n1/sft"], [two]) == ["sft"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400))
def test_find_survives_any_name(name: str) -> None:
    try:
        assert checkpoint.find(name).is_file()
    except CheckpointError:
        pass


def test_search_folders_end_in_the_package() -> None:
    folders = checkpoint.search_folders()
    assert folders[0] == Path("checkpoints")
    assert folders[1].name == "checkpoints" and "tinychat" in str(folders[1])
    assert folders[2] == Path(checkpoint.__file__).resolve().parents[1] / "checkpoints"


# --- pieces --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 250))
def test_pieces_make_the_file_again(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, piece_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    whole = folder / "a.safetensors"
    whole.write_bytes(data)
    manifest = checkpoint.split(whole, piece_bytes)
    pieces = json.loads(manifest.read_text())["pieces"]
    assert len(pieces) == max(1, -(-len(data) // piece_bytes))
    whole.unlink()
    assert checkpoint.join(manifest) == whole and whole.read_bytes() == data
    assert checkpoint.file_sha256(whole) == hashlib.sha256(data).hexdigest()
    assert checkpoint.join(manifest, folder / "b").read_bytes() == data


def test_wrong_pieces_are_refused(tmp_path: Path, sound: Path) -> None:
    manifest = checkpoint.split(sound, 400, tmp_path)
    whole = tmp_path / sound.name
    table = json.loads(manifest.read_text())
    second = tmp_path / table["pieces"][1]["file"]
    data = second.read_bytes()
    second.write_bytes(data[:-1] + b"~")
    assert "fetch this piece again" in refusal(second, lambda _: checkpoint.join(manifest))
    second.unlink()
    assert "fetch it again" in refusal(second, lambda _: checkpoint.join(manifest))
    second.write_bytes(data)
    manifest.write_text(json.dumps({**table, "sha256": "0" * 64}))
    assert "do not make the file" in refusal(manifest, checkpoint.join)
    for file in ("../escape", "", "a/b", "c:\\d", None):
        manifest.write_text(json.dumps({**table, "file": file}))
        assert "not a list of pieces" in refusal(manifest, checkpoint.join)
    for text in ("", "[]", "{}", '{"pieces": 3}', "[" * 100_000):
        manifest.write_text(text)
        assert "not a list of pieces" in refusal(manifest, checkpoint.join)
    assert "Cannot read" in refusal(tmp_path / "none.parts.json", checkpoint.join)
    assert "give 1 or more" in str(pytest.raises(CheckpointError, checkpoint.split, sound, 0).value)
    assert not whole.exists() and not list(tmp_path.glob(".*"))


def test_errors_are_one_family() -> None:
    assert issubclass(CheckpointError, TinychatError)


def test_a_file_of_real_size_loads_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mini.safetensors"
    info = save(path, state={f"w{i}": torch.ones(1024, 1024) for i in range(8)})
    assert info.bytes > 8e6
    took = []
    for _ in range(3):
        start = time.process_time()
        checkpoint.load(path)
        took.append(time.process_time() - start)
    assert min(took) < 1
