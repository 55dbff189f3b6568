"""Report card and model cards: every shown number is the files' own, what is missing is said."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fakes import stirred
from typer.testing import CliRunner

from tinychat.book import cards, report
from tinychat.book.chapter import BookError
from tinychat.cli.app import app
from tinychat.cli.card import all_texts, card
from tinychat.data import tokenizer_model
from tinychat.gpt import GPTConfig, save_model
from tinychat.reward_model import RewardModel, save_reward
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = GPTConfig(
    width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=160
)  # fmt: skip
HARDWARE = {"cpu": "Test CPU", "cores": 1, "memory_gb": 8.2, "gpus": [], "torch": "2"}
REWARD = {
    "accuracy": 0.6757,
    "baseline": 0.6395,
    "pairs": 441,
    "by_flaw": {"rude": [0.625, 24, 0.5417]},
    "length_correlation": -0.23,
}
SIDE = {"score": -0.447, "kl": 0.0, "entropy": 3.0, "length": 28.1, "ended": 0.94}


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """A folder with all four stages and a judge, tiny."""
    folder = tmp_path_factory.mktemp("four")
    common = {"tokenizer": Tokenizer(tokenizer_model())}
    data = {
        "books": {"licence": "CC-BY-4.0", "attribution": "A | B", "tokens": 1234, "passes": 2.5},
        "unread": {"licence": "MIT", "tokens": 9, "passes": 0},
    }
    lineage = {"tokens": 5000, "steps": 7, "minutes": 90, "hardware": HARDWARE, "data": data}
    base = folder / "base.safetensors"
    bits = {"bits_per_byte": {"books": 1.25, "news": 0.75}, "storage_cost_percent": -0.05}
    save_model(base, stirred(SHAPE, 0), stage="base", lineage=lineage, metrics=bits, **common)
    lineage |= {"parent_sha256": file_sha256(base), "ancestors": [{}], "settings": {"seed": 42}}
    sft = folder / "sft.safetensors"
    save_model(sft, stirred(SHAPE, 0), stage="sft", lineage=lineage, metrics={}, **common)
    for name, half in (("reward", "reward"), ("judge", "judge")):
        save_reward(
            folder / f"{name}.safetensors",
            RewardModel(stirred(SHAPE, 2)),
            lineage={**lineage, "half": half},
            metrics=REWARD,
            **common,
        )
    marks = {"reward_sha256": file_sha256(folder / "reward.safetensors")}
    metrics = {"held_out_prompts": 96, "before": SIDE, "after": SIDE | {"score": 0.289, "kl": 2.29}}
    save_model(
        folder / "rlhf.safetensors",
        stirred(SHAPE, 1),
        stage="rlhf",
        lineage=lineage | marks | {"parent_sha256": "f" * 64},
        metrics=metrics,
        **common,
    )
    return folder


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_shipped_models_have_cards():
    folder = ROOT / "checkpoints"
    page = cards.model_cards(folder)
    for stage in cards.STAGES:
        path, card = folder / f"{stage}.safetensors", section(page, stage)
        assert "Chapter" in card
        if not path.exists():
            assert "Not shipped yet" in card and cards.WORDS[stage].make in card
            continue
        info = read_info(path)
        assert f"`{file_sha256(path)}`" in card and f"| {info.parameters:,}, stored" in card
        assert "**Meant for.**" in card and "**Limits.**" in card
        for name, entry in info.lineage["data"].items():
            if entry.get("passes") != 0:
                assert re.search(rf"\| {name} \|.*\| {re.escape(entry['licence'])} \|", card)
    assert "[base](#base) with sha256" in section(page, "sft"), "its parent is the shipped one"


def test_a_card_tells_what_the_file_tells(four):
    page = cards.model_cards(four)
    base = section(page, "base")
    assert "5,000 tokens, 7 steps, 1 h 30 min" in base and "1 core of Test CPU, 8 GB" in base
    assert "| books | 1,234 tokens, read 2.50 times | CC-BY-4.0 | A \\| B |" in base
    assert "unread" not in base, "never read"
    assert "costs −0.05 % in bits per byte" in base and "| seed | not recorded |" in base
    assert "all that the models before it read" not in base
    assert "all that the models before it read" in section(page, "sft")
    rlhf = section(page, "rlhf")
    assert "| seed | 42 |" in rlhf and "| began with | a file with sha256 `ffffffff" in rlhf
    assert "| marked by | [reward](#reward) with sha256" in rlhf
    assert "Not shipped yet" not in page


def test_a_card_of_a_file_that_records_nothing(tmp_path):
    lineage = {"data": {"mine": {}, "ours": {"licence": "CC0-1.0"}}}
    tokenizer = Tokenizer(tokenizer_model())
    model = stirred(SHAPE, 0)
    path = tmp_path / "base.safetensors"
    save_model(path, model, stage="base", tokenizer=tokenizer, lineage=lineage, metrics={})
    page = card(tmp_path)
    assert "int8 | not recorded | not recorded | not recorded |" in page
    assert "| mine |  | not recorded | the user |" in page
    assert "| ours |  | CC0-1.0 | tinychat corpus |" in page


def test_a_base_that_went_on_has_read_what_all_its_runs_read(tmp_path):
    first = {"tokens": 1_000_000, "minutes": 2.25}
    lineage = {"tokens": 500_000, "minutes": 1.5, "ancestors": [first]}
    common = {"tokenizer": Tokenizer(tokenizer_model()), "metrics": {}}
    for stage in ("base", "sft"):
        path = tmp_path / f"{stage}.safetensors"
        save_model(path, stirred(SHAPE, 0), stage=stage, lineage=lineage, **common)
    page = card(tmp_path)
    assert "int8 | 1,500,000 | 3.8 |" in page and "int8 | 500,000 | 1.5 |" in page
    del first["tokens"]
    save_model(
        tmp_path / "base.safetensors", stirred(SHAPE, 0), stage="base", lineage=lineage, **common
    )
    assert "int8 | not recorded | 3.8 |" in card(tmp_path)


def test_weights_owe_what_the_models_before_them_read():
    base = {"data": {"books": {"licence": "CC-BY-4.0"}, "unread": {"passes": 0}}}
    sft = {"data": {"talk": {"licence": "CC0-1.0"}}, "ancestors": [base]}
    rlhf = {"data": {}, "ancestors": [sft, {"data": {"pairs": {"licence": "MIT"}}}]}
    assert list(all_texts(rlhf)) == ["pairs", "books", "talk"]
    assert list(all_texts(sft)) == ["books", "talk"]


def test_the_report_says_what_is_missing(tmp_path):
    for name in ("base", "sft"):
        shutil.copy(ROOT / "checkpoints" / f"{name}.safetensors", tmp_path)
    page = report.report_card(tmp_path)
    assert "| [reward](model_card.md#reward) | not shipped yet |" in page
    for title, file in (("The reward model", "reward"), ("Before and after PPO", "rlhf")):
        assert f"There is no `{file}.safetensors`" in section(page, title)
    assert "No evaluation is stored" in section(page, "Side by side")
    bits = read_info(tmp_path / "base.safetensors").metrics["bits_per_byte"]
    shown = re.findall(r"^\| ([\w ]+) \| ([\d.]+) ", section(page, "Unseen text"), re.M)
    assert {name: value for name, value in shown} == {n: f"{x:.3f}" for n, x in bits.items()}
    values = [float(value) for _, value in shown]
    assert values == sorted(values)


def test_all_stages_appear_by_themselves(four):
    page = report.report_card(four)
    assert "not shipped" not in page
    assert "| news | 0.750" in page and page.index("| news |") < page.index("| books |")
    reward = section(page, "The reward model")
    assert "It puts 67.6% of the held-out pairs in the order that we did; its words" in reward
    assert "correlate by -0.23" in reward and "| rude | 24 | 62.5% | 54.2% |" in reward
    ppo = section(page, "Before and after PPO")
    assert "On 96 prompts" in ppo and "| mark of the reward model | -0.45 | 0.29 |" in ppo


def test_the_evaluation_is_the_one_that_the_terminal_shows(four, tmp_path, monkeypatch):
    """`tinychat eval --out` writes the report that the page shows, number for number."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(four, folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    words = ["--prompts", "6", "--max-tokens", "5", "--out", f"checkpoints/{report.EVALUATION}"]
    models = ["checkpoints/rlhf", "checkpoints/sft", "--judge", "checkpoints/judge"]
    words += ["--reward", "checkpoints/reward", "--best-of", "2"]
    told = CliRunner().invoke(app, ["eval", *models, *words], env={"COLUMNS": "300"})
    assert told.exit_code == 0, told.output
    shown = section(report.report_card(folder), "Side by side")
    assert "6 unseen prompts" in shown and "Measured on other files" not in shown
    made = json.loads((folder / report.EVALUATION).read_text())
    (pair,) = made["pairs"]
    numbers = re.findall(r"-?[\d.]+%? \[-?[\d.]+%?, -?[\d.]+%?\]", shown)
    assert len(numbers) >= 10 and all(number in told.stdout for number in numbers)
    counts = [str(pair[key]) for key in ("wins", "ties", "losses")]
    assert f"| rlhf against sft | {' | '.join(counts)} |" in shown
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \|", shown, re.M)
    assert rows == [(str(row["n"]), f"{row['kl']:.2f}") for row in made["best_of"]["curve"]]
    # Another file under the same name: the page must not praise it with old numbers.
    shutil.copy(folder / "sft.safetensors", folder / "rlhf.safetensors")
    warned = section(report.report_card(folder), "Side by side")
    assert "another version of rlhf than the one" in warned
    (folder / report.EVALUATION).write_text('{"models": 3}')
    with pytest.raises(BookError, match="is no report"):
        report.report_card(folder)
