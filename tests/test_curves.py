"""Curves of PPO runs: what is kept of a run's metrics, and where a price of KL would stop it."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tinychat.book import curves
from tinychat.book.__main__ import main
from tinychat.book.chapter import BookError
from tinychat.runtime.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / curves.FOLDER
WORDS = ["--title", "A run", "--about", "It went well."]


def step(number: int, **more: float) -> dict[str, float]:
    row = {name: 0.123456789 * number for name in curves.COLUMNS}
    return row | {"step": number, "value_loss": 1.0} | more


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "runs" / "ppo9" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for number in range(1, 11):
            writer.write(step(number, **({"judge": 0.5 / 3} if number % 5 == 0 else {})))
    return path


def test_the_command_keeps_what_the_page_needs(metrics, tmp_path, capsys):
    out = tmp_path / "made" / "ppo-9.json"
    assert main(["curve", str(metrics), *WORDS, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 10 steps\n"
    (run,) = curves.load(out.parent)
    assert run["columns"] == [*curves.COLUMNS, "judge"] and "value_loss" not in run["columns"]
    assert run["rows"][2][:3] == [3, 0.37, 0.37] and run["rows"][2][-1] is None
    assert curves.column(run, "judge")[4] == 0.167
    assert run["from"].startswith("ppo9/metrics.jsonl, sha256 ")
    assert out.read_text().count("\n    [") == 10, "a line a step"


def test_another_run_s_metrics_are_refused(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 2.0})
    out = tmp_path / "x.json"
    assert main(["curve", str(path), *WORDS, "--out", str(out)]) == 2
    assert "has no 'score': name the metrics.jsonl of a PPO run" in capsys.readouterr().err
    assert main(["curve", str(tmp_path / "none.jsonl"), *WORDS, "--out", str(out)]) == 2
    assert not out.exists()


def test_a_damaged_curve_is_named(tmp_path):
    with pytest.raises(BookError, match="holds no curve"):
        curves.load(tmp_path)
    (tmp_path / "ppo-1.json").write_text('{"title": "A run", "columns": ["step"], "rows": [[1]]}')
    with pytest.raises(BookError, match=r"ppo-1\.json is no curve"):
        curves.load(tmp_path)


def test_a_mean_takes_what_was_measured_nearby():
    assert curves.smooth([1, 2, 3, 4, 10]) == [2, 2.5, 4, 4.75, 17 / 3]
    assert curves.smooth([None, 6, None, 0, None]) == [None, 3, None, 3, None]


def test_a_higher_price_stops_earlier():
    """The mark rises by 1 a nat, then by a half, then falls by a half; a nat is ten steps."""
    marks = [n / 10 for n in range(11)] + [1 + n / 20 for n in range(1, 11)]
    marks += [1.5 - n / 20 for n in range(1, 11)]
    names = ["step", "score", "kl"]
    rows = [[n + 1, mark, n / 10] for n, mark in enumerate(marks)]
    run = {"title": "by hand", "about": "", "columns": names, "rows": rows}
    assert [curves.best(run, beta) for beta in (0, 0.75, 1.2)] == [20, 10, 0]


def node(expression: str, given: object) -> object:
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node.js here")
    script = ROOT / "chapters/assets/widgets/ppo.js"
    source = (
        f"const w = require({json.dumps(str(script))});"
        'const x = JSON.parse(require("fs").readFileSync(0, "utf8"));'
        f"process.stdout.write(JSON.stringify({expression}));"
    )
    answer = subprocess.run(
        [program, "-e", source], input=json.dumps(given), capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_the_widget_stops_where_the_package_and_numpy_do(path):
    run = next(one for one in curves.load(SHIPPED) if one == json.loads(path.read_text()))
    prices = [round(0.01 * n, 2) for n in range(51)]
    stops = [curves.best(run, beta) for beta in prices]
    assert node(f"x[1].map(beta => w.best(x[0], {curves.REACH}, beta))", [run, prices]) == stops
    width = 2 * curves.REACH + 1
    counts = np.convolve(np.ones(len(run["rows"])), np.ones(width), "same")
    marks, kls = (
        np.convolve(curves.column(run, name), np.ones(width), "same") / counts
        for name in ("score", "kl")
    )
    assert stops == [int((marks - beta * kls).argmax()) for beta in prices]
    assert node(f"w.smooth(x, {curves.REACH})", curves.column(run, "score")) == pytest.approx(marks)
    far = [float(kls[stop]) for stop in stops]
    assert far == sorted(far, reverse=True), "a higher price never leads further away"


def test_the_shipped_curves_are_of_real_runs():
    runs = curves.load(SHIPPED)
    assert len(runs) >= 2
    for run in runs:
        steps = curves.column(run, "step")
        assert steps == list(range(1, len(steps) + 1)) and "sha256" in run["from"]
        # Before the first update the policy is the reference.
        assert curves.column(run, "kl")[0] == 0
        assert max(curves.column(run, "kl")) > 1 and max(curves.column(run, "beta")) > 0
    made = curves.playground(ROOT)
    header, *rows = made["rows"]
    assert [row[0] for row in rows] == [run["title"] for run in runs for _ in range(curves.SHOWN)]
    assert all(len(row) == len(header) for row in rows)
    assert [row[1] for row in rows][curves.SHOWN - 1] == str(len(runs[0]["rows"]))
