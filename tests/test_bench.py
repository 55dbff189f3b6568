"""`tinychat bench`: every figure is there, and each ratio is that of its two figures."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tinychat import pretraining
from tinychat.cli import bench
from tinychat.cli.app import app
from tinychat.data import tokenizer_model
from tinychat.gpt import GPT, GPTConfig, preset, save_model
from tinychat.pretraining import TrainConfig
from tinychat.tokenizer import Tokenizer

TINY = GPTConfig(width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=256)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model; training steps of one row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "train_preset", lambda name: TrainConfig(batch=1))
    torch.manual_seed(0)
    for stage in ("sft", "reward"):
        save_model(
            f"{stage}.safetensors", GPT(TINY), stage=stage,
            tokenizer=Tokenizer(tokenizer_model()), lineage={}, metrics={},
        )  # fmt: skip
    return tmp_path


def run(*words: str):
    return CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "200"})


def test_figures_and_ratios(here):
    result = run("sft.safetensors", "--device", "cpu", "--seconds", "0.05", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    talk, read, train = report["decoding"], report["reading"], report["training"]
    peak = report["peak_gflops"]
    for value in [*talk.values(), *read.values(), *peak.values()]:
        assert value > 0
    assert talk["ratio"] == pytest.approx(talk["with_cache"] / talk["without_cache"])
    assert read["tokens"] == TINY.context // 2
    assert read["of_peak"] == pytest.approx(read["gflops"] / peak["fp32"])
    assert train["ratio"] == pytest.approx(
        train["tokens_per_second"] / train["plain_tokens_per_second"]
    )
    work = preset("nano").flops_per_token(256)
    assert train["gflops"] == pytest.approx(train["tokens_per_second"] * work / 1e9)
    assert not train["compiled"] and report["hardware"]["torch"] == torch.__version__


def test_the_table_says_beside_what(here):
    result = run("sft.safetensors", "--device", "cpu", "--seconds", "0.05")
    assert result.exit_code == 0, result.output
    for part in ("decoding", "without a cache", "plain PyTorch", "product", "sft.safetensors"):
        assert part in result.stdout


def test_they_take_turns_and_the_median_counts():
    order, pauses = [], iter([0.05, 0.001, 0.001, 0.001, 0.001])

    def slow_at_first() -> None:
        order.append("a")
        time.sleep(next(pauses))

    took = bench.take_turns(
        {"a": slow_at_first, "b": lambda: order.append("b")}, 0.0, torch.device("cpu")
    )
    assert order == ["a", "b"] * bench.LEAST
    assert 0.001 <= took["a"] < 0.04 and took["b"] < took["a"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seconds", "0"], "--seconds is 0; give a number above 0"),
        (["--preset", "nanno"], "did you mean 'nano'?"),
        (["reward.safetensors"], "is a reward model"),
        (["gone"], "No checkpoint 'gone'"),
        (["--device", "tpu"], "Unknown device 'tpu'"),
    ],
    ids=" ".join,
)
def test_mistakes(here, words, sentence):
    result = run(*(words if words[0] in ("gone", "reward.safetensors") else ["sft", *words]))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert sentence in " ".join(result.output.replace("│", " ").split())
