"""`tinychat train all`: how it shares out the minutes, what it skips, what a kill costs."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tinychat.cli import stages, train_all
from tinychat.cli.app import app
from tinychat.cli.outcome import print_next
from tinychat.cli.plan import BY_NAME, STAGES, Plan, parse_shares
from tinychat.cli.runs import first_run, run_folder
from tinychat.data import tokenizer_model
from tinychat.gpt import GPT, GPTConfig, save_model
from tinychat.runtime.checkpoint import read_info
from tinychat.runtime.metrics import read_metrics
from tinychat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
NAMES = [stage.name for stage in STAGES]


def run(*words: str):
    return CliRunner().invoke(app, ["train", "all", *words], env={"COLUMNS": "300"})


def told(result) -> str:
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


# The plan


def test_the_minutes_are_shared_out_and_what_is_left_over_flows_on():
    plan = Plan(Path("runs/x"), "small", 30.0)
    given = {stage.name: plan.allot(stage) for stage in plan.stages}
    # 30 minutes less 0.3 for each of eight stages.
    assert sum(given.values()) == pytest.approx(30 - 8 * 0.3)
    assert given["base"] == pytest.approx(0.64 * 27.6)
    plan.used = {"shards": 1.0, "base": 18.0, "sft": 0.5}
    rest = 30 - 19.5 - 5 - 6 * 0.3 + 5
    assert sum(plan.allot(stage) for stage in plan.left) == pytest.approx(rest)
    shares = [0.05, 0.05, 0.07, 0.04, 0.07, 0.02]
    assert plan.allot(BY_NAME["reward"]) == pytest.approx(rest * 0.05 / sum(shares))
    # Too late already: a fifth of the share it had.
    plan.used["base"] = 40.0
    assert plan.allot(BY_NAME["ppo"]) == pytest.approx(0.2 * 30 * 0.07)
    # A short run keeps half of its minutes for training.
    short = Plan(Path("runs/x"), "nano", 2.0)
    assert sum(short.allot(stage) for stage in short.stages) == pytest.approx(1.0)


def test_a_stage_that_has_begun_keeps_its_minutes(tmp_path):
    plan = Plan(tmp_path, "nano", 10.0)
    plan.begin(BY_NAME["base"], 4.0)
    plan.minutes = 100.0
    again = Plan.read(tmp_path)
    assert again.allot(BY_NAME["base"]) == 4.0
    assert again.trained == {"base": 4.0} and again.minutes == 10.0
    again.finish("base", 5.0)
    assert [stage.name for stage in Plan.read(tmp_path).left] == NAMES[1:]


def test_shares_and_settings_of_ones_own():
    shares = parse_shares(["base=3", "judge=0", "sft=1", "report=0"])
    assert shares == {"base": 3.0, "judge": 0.0, "sft": 1.0, "report": 0.0}
    settings = ["reward.epochs=1", "judge.epochs=2", "reward-2.batch=8", "ppo.beta=0.1"]
    plan = Plan(Path("runs/x"), "nano", 10.0, shares=shares, settings=settings)
    assert [stage.name for stage in plan.stages] == [
        "base", "sft", "reward", "ppo", "reward-2", "ppo-2"
    ]  # fmt: skip
    assert plan.allot(BY_NAME["base"]) == pytest.approx(3 * plan.allot(BY_NAME["sft"]))
    # What is set for a kind holds for all its stages; a stage's own comes later and wins.
    assert plan.settings_of(BY_NAME["judge"]) == ["epochs=1", "epochs=2"]
    assert plan.settings_of(BY_NAME["reward-2"]) == ["epochs=1", "batch=8"]
    assert plan.settings_of(BY_NAME["ppo-2"]) == ["beta=0.1"]
    assert plan.settings_of(BY_NAME["base"]) == []


def test_a_run_that_was_killed_while_it_began(tmp_path):
    assert first_run(tmp_path / "nothing")
    record = tmp_path / "run.json"
    record.write_text("{}")
    assert not first_run(tmp_path)
    record.write_text('{"preset": "na')
    assert first_run(tmp_path) and not record.exists()
    # Where a state lies, nothing is thrown away.
    record.write_text('{"preset": "na')
    (tmp_path / "state-00000001.safetensors").touch()
    assert not first_run(tmp_path) and record.exists()


def test_a_stage_is_a_run_below_a_run(capsys):
    assert run_folder("mine/ppo-2", resume=False) == Path("runs/mine/ppo-2")
    print_next("mine/sft", "Next: something")
    assert not capsys.readouterr().out  # `train all` does the next thing itself
    print_next("sft", "Next: something")
    assert capsys.readouterr().out == "Next: something\n"


# The driver, with stages that only take notes


class Kill(BaseException):
    """As sudden as SIGKILL: nothing catches it."""


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[tuple[str, float]]:
    """What was called with how many minutes. A stage whose name is in `dying` is killed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    made: list[tuple[str, float]] = []

    def note(plan: Plan, stage, device: str) -> None:
        made.append((stage.name, plan.trained[stage.name]))
        if stage.name in dying:
            raise dying.pop(stage.name)

    def shards(plan: Plan) -> None:
        made.append(("shards", 0.0))

    for kind in list(stages.COMMANDS):
        monkeypatch.setitem(stages.COMMANDS, kind, note)
    monkeypatch.setattr(train_all, "tokenize", shards)
    monkeypatch.setattr(train_all, "trained_minutes", lambda plan, stage: 0.5)
    monkeypatch.setattr(train_all, "figures", lambda plan, stage: f"what {stage.name} made")
    dying.clear()
    return made


dying: dict[str, BaseException] = {}


def names_of(calls: list[tuple[str, float]]) -> list[str]:
    return [name for name, _ in calls]


def test_all_stages_run_in_order_and_are_announced(calls):
    result = run("--preset", "nano", "--minutes", "8")
    assert result.exit_code == 0, result.output
    assert names_of(calls) == ["shards", *NAMES]
    plan, _, rest = result.stdout.partition("[1/8]")
    assert plan.startswith("nano: 1.8 M parameters, 8 minutes on ")
    assert all(name in plan and BY_NAME[name].result in plan for name in NAMES)
    assert [int(n) for n in re.findall(r"\[(\d)/8\] what", rest)] == list(range(1, 9))
    assert "all done" in rest and "tinychat chat --ckpt runs/nano/ppo-2/rlhf.safetensors" in rest
    # Half a minute a stage, as their checkpoints say, though the notes took no time.
    assert Plan.read(Path("runs/nano")).used == pytest.approx(
        {"tokenizer": 0, "shards": 0} | dict.fromkeys(NAMES, 0.5), abs=0.05
    )
    again = run("--preset", "nano", "--resume")
    assert again.exit_code == 0 and "runs/nano is finished already" in again.stdout
    assert len(calls) == 9


def test_a_killed_run_goes_on_where_it_was(calls):
    dying["reward"] = Kill()
    with pytest.raises(Kill):
        run("--preset", "nano", "--minutes", "8")
    assert names_of(calls) == ["shards", "base", "sft", "reward"]
    minutes = dict(calls)["reward"]
    calls.clear()
    # The same words as before, with --resume. A stage that had begun keeps its minutes.
    dying["ppo"] = KeyboardInterrupt()
    result = run("--preset", "nano", "--minutes", "8", "--resume")
    assert result.exit_code == 130
    assert "go on with: tinychat train all --run nano --resume" in result.stdout
    assert names_of(calls) == ["reward", "judge", "ppo"] and calls[0][1] == minutes
    assert re.search(r"  base +done  ", result.stdout)
    calls.clear()
    assert run("--run", "nano", "--resume").exit_code == 0
    assert names_of(calls) == NAMES[NAMES.index("ppo") :]


def test_until_and_what_may_be_changed_later(calls):
    result = run("--preset", "nano", "--minutes", "8", "--until", "sft", "--run", "mine")
    assert result.exit_code == 0 and names_of(calls) == ["shards", "base", "sft"]
    assert "runs/mine is done until sft. Go on with: tinychat train all --run mine" in result.stdout
    calls.clear()
    given = ["--run", "mine", "--resume", "--minutes", "20", "--share", "judge=0"]
    assert run(*given, "--set", "ppo.lr=1e-4", "--until", "ppo").exit_code == 0
    assert names_of(calls) == ["reward", "ppo"]
    plan = Plan.read(Path("runs/mine"))
    assert (plan.minutes, plan.settings, plan.shares) == (20.0, ["ppo.lr=1e-4"], {"judge": 0.0})
    calls.clear()
    assert run("--preset", "nano", "--minutes", "1", "--until", "shards").exit_code == 0
    assert names_of(calls) == ["shards"]


def test_resume_begins_where_there_is_nothing_yet(calls):
    result = run("--preset", "nano", "--minutes", "8", "--resume")
    assert result.exit_code == 0 and len(calls) == 9


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "How long? Give a budget"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--minutes", "1", "--preset", "nanno"], "did you mean 'nano'?"),
        (["--minutes", "1", "--share", "bas=1"], "names no stage. Did you mean base?"),
        (["--minutes", "1", "--share", "base=-1"], "give a number from 0"),
        (["--minutes", "1", "--share", "base"], "give a number from 0, as in --share base=0.1"),
        (["--minutes", "1", "--share", "reward=0"], "ppo builds on reward, whose share is 0"),
        (["--minutes", "1", "--share", "base=0"], "sft builds on base"),
        (["--minutes", "1", "--set", "epochs=1"], "--set epochs=1 names no stage"),
        (["--minutes", "1", "--set", "sftt.epochs=1"], "Did you mean sft?"),
        (["--minutes", "1", "--set", "sft.epoch=1"], "did you mean epochs?"),
        (["--minutes", "1", "--set", "base.batch=0"], "batch is 0; it must be at least 1"),
        (["--minutes", "1", "--until", "ppo-3"], "--until ppo-3 names no stage"),
        (["--minutes", "1", "--data", "nowhere"], "nowhere does not exist"),
        (["--minutes", "1", "--tokenizer", "gone.model"], "gone.model can't be read"),
        (["--minutes", "1", "--device", "tpu"], "Unknown device 'tpu'"),
        (["--minutes", "1", "--run", "a/b"], "names a stage; name the run"),
        (["--minutes", "1", "--run", ".."], "can't name a folder in runs"),
        (["--resume"], "There is no `train all` to resume in runs/mini"),
        (["--minutes", "1", "--run", "used"], "runs/used already holds a run"),
        (["--minutes", "1", "--run", "used", "--resume"], "runs/used already holds a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_begin_nothing(calls, words, sentence):
    Path("runs/used").mkdir(parents=True)
    Path("runs/used/run.json").write_text("{}")
    assert sentence in told(run(*words))
    assert not calls
    assert [path.name for path in Path("runs").iterdir()] == ["used"]


def test_it_is_one_process(calls, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in told(run("--minutes", "1"))


def test_another_size_is_another_run(calls):
    assert run("--preset", "nano", "--minutes", "1", "--until", "shards").exit_code == 0
    text = told(run("--run", "nano", "--resume", "--preset", "mini"))
    assert "was begun with --preset nano; leave --preset mini out" in text
    text = told(run("--run", "nano", "--resume", "--tokenizer", "new"))
    assert "was begun without --tokenizer; leave --tokenizer new out" in text


def test_a_stage_that_has_begun_takes_nothing_new(calls):
    given = ["--preset", "nano", "--minutes", "8", "--set", "base.batch=2", "--until", "sft"]
    assert run(*given).exit_code == 0
    for name in ("base", "sft", "reward"):
        Path("runs/nano", name).mkdir()
        Path("runs/nano", name, "run.json").write_text("{}")
    before = Path("runs/nano/plan.json").read_bytes()
    for setting in ("base.batch=4", "reward.batch=4"):
        text = told(run("--run", "nano", "--resume", "--set", setting))
        assert f"--set {setting} comes too late: runs/nano/{setting.partition('.')[0]} has" in text
    Path("texts").mkdir()
    text = told(run("--run", "nano", "--resume", "--data", "texts"))
    assert "was begun without --data" in text
    assert Path("runs/nano/plan.json").read_bytes() == before
    # The same words as before are fine, and so is what a stage to come will do.
    again = [*given[:-2], "--set", "ppo-2.lr=1e-4", "--until", "reward", "--resume"]
    assert run(*again).exit_code == 0
    assert Plan.read(Path("runs/nano")).settings == ["base.batch=2", "ppo-2.lr=1e-4"]


def test_a_data_folder_must_hold_what_all_stages_read(calls):
    Path("texts/pretrain").mkdir(parents=True)
    Path("texts/pretrain/children_classics.jsonl.zst").touch()
    given = ["--preset", "nano", "--minutes", "8", "--data", "texts"]
    assert "the data folder texts has no preference/" in told(run(*given))
    text = told(run(*given, "--tokenizer", "new", "--until", "base"))
    assert "the data folder texts has no pretrain/" in text
    report = [word for name in NAMES[2:-1] for word in ("--share", f"{name}=0")]
    assert "has no preference/ppo_prompts" in told(run(*given, *report))
    assert not calls and not Path("runs").exists()
    # What is read is enough.
    assert run(*given, "--until", "sft").exit_code == 0
    assert names_of(calls) == ["shards", "base", "sft"]


def test_two_processes_never_work_on_one_plan(calls, holding):
    assert run("--preset", "nano", "--minutes", "8", "--until", "base").exit_code == 0
    Path("runs/nano").rename("runs/other")  # this process keeps the folder that it worked in
    Path("runs/nano").mkdir()
    Path("runs/other/plan.json").rename("runs/nano/plan.json")
    with holding("runs/nano"):
        text = told(run("--run", "nano", "--resume"))
    assert "Another tinychat is training in runs/nano" in text
    assert names_of(calls) == ["shards", "base"]


# What the stages call


@pytest.fixture
def asked(tmp_path, monkeypatch) -> dict[str, dict]:
    """What each training command would be called with."""
    monkeypatch.chdir(tmp_path)
    found: dict[str, dict] = {}
    for name in ("base", "sft", "reward", "ppo", "evaluate"):
        command = getattr(stages, name)

        def take(command=command, **given) -> None:
            bound = inspect.signature(command).bind(**given)  # refuses what it doesn't know
            found[given.get("run", "report")] = bound.arguments

        monkeypatch.setattr(stages, name, take)
    return found


def test_every_stage_is_its_own_command(asked):
    plan = Plan(Path("runs/x"), "small", 25.0, data="here", settings=["judge.epochs=1"])
    torch.manual_seed(0)
    shape = GPTConfig(width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16)
    data = {"dialogues": {"tokens": 50_000}, "basics": {"tokens": 50_000}}
    lineage = {"tokens": 10_000_000, "minutes": 10.0, "data": data}
    save_model(
        plan.folder / "base/base.safetensors", GPT(shape), stage="base",
        tokenizer=Tokenizer(tokenizer_model()), lineage=lineage, metrics={},
    )  # fmt: skip
    for stage in plan.stages:
        plan.trained[stage.name] = plan.allot(stage)
        stages.COMMANDS[stage.kind](plan, stage, "cpu")
    assert list(asked) == [f"x/{name}" for name in NAMES[:-1]] + ["report"]
    base, sft, judge = asked["x/base"], asked["x/sft"], asked["x/judge"]
    assert base["minutes"] == pytest.approx(0.64 * (25 - 8 * 0.3)) and base["data"] == Path("here")
    assert base["settings"] == ["save_minutes=1"] and not base["resume"]  # long: compiled
    # Four readings of 50,000 tokens, and of as many of the basics, take 0.4 minutes at a million a
    # minute: they fit.
    assert sft["minutes"] is None and sft["start"] == "runs/x/base/base.safetensors"
    assert sft["settings"] == ["save_minutes=1", "compiled=false"]
    assert judge["judge"] and judge["settings"] == ["save_minutes=1", "seed=1", "epochs=1"]
    assert not asked["x/reward"]["judge"] and asked["x/reward"]["sampler"] is None
    assert asked["x/reward-2"]["sampler"] == [
        "runs/x/sft/sft.safetensors", "runs/x/ppo/rlhf.safetensors"
    ]  # fmt: skip
    for name, teacher in (("ppo", "reward"), ("ppo-2", "reward-2")):
        given = asked[f"x/{name}"]
        assert given["start"] == "runs/x/sft/sft.safetensors"
        assert given["reward"] == f"runs/x/{teacher}/reward.safetensors"
    report = asked["report"]
    assert [Path(name).parent.name for name in report["models"]] == ["ppo-2", "ppo", "sft", "base"]
    assert report["judge"] == "runs/x/judge/reward.safetensors" and report["prompts"] == 300
    # Fewer minutes than the readings need: then the minutes decide.
    plan.trained["sft"] = 0.3
    stages.finetune_sft(plan, BY_NAME["sft"], "cpu")
    assert asked["x/sft"]["minutes"] == 0.3


def test_a_stage_that_has_begun_is_resumed_as_it_was_begun(asked):
    plan = Plan(Path("runs/x"), "nano", 5.0, trained={"base": 2.0}, settings=["base.batch=3"])
    stages.pretrain_base(plan, BY_NAME["base"], "cpu")
    # A few minutes in all: small steps, nothing compiled; what the user sets comes last.
    assert asked["x/base"]["settings"] == [
        "save_minutes=1", "batch=8", "compiled=false", "batch=3"
    ]  # fmt: skip
    (plan.folder / "base").mkdir(parents=True)
    (plan.folder / "base/run.json").write_text("{}")
    stages.pretrain_base(plan, BY_NAME["base"], "cpu")
    given = asked["x/base"]
    assert given["resume"] and given["minutes"] is None and given["settings"] is None
    # What follows from the minutes of the whole run is kept too.
    (plan.folder / "reward").mkdir()
    (plan.folder / "reward/run.json").write_text("{}")
    plan.minutes = 20.0
    stages.fit_marks(plan, BY_NAME["reward"], "cpu")
    assert "samples" not in asked["x/reward"]


# The real thing


@pytest.mark.slow
def test_from_nothing_to_a_report_killed_again_and_again(tmp_path):
    """A minute of nano on the embedded corpus, killed without warning every half minute."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TINYCHAT_DATA"},
        "PYTHONPATH": str(ROOT),
        "TINYCHAT_CACHE": str(tmp_path / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    words = ["train", "all", "--preset", "nano", "--minutes", "1", "--resume", "--device", "cpu"]
    for kind in ("base", "sft", "reward", "ppo"):
        words += ["--set", f"{kind}.save_minutes=0.05"]
    kills, said, until = 0, "", time.monotonic() + 1500
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "tinychat", *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        try:
            said, warned = process.communicate(timeout=30 + 7 * (kills % 5))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            assert time.monotonic() < until, "no end in 25 minutes"
    assert process.returncode == 0, warned
    assert kills >= 2, "it was to be killed on the way"
    folder = tmp_path / "runs" / "nano"
    for stage in STAGES[:-1]:
        info = read_info(folder / stage.result)
        steps = [row["step"] for row in read_metrics(folder / stage.name / "metrics.jsonl")]
        assert steps == list(range(1, info.lineage["steps"] + 1)), stage.name
        assert not (folder / stage.name / ".trial.safetensors").exists()
    for name in ("base", "sft", "ppo", "ppo-2"):
        assert (folder / name / "samples.txt").read_text(encoding="utf-8").strip()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert len(report["models"]) == 4 and report["judge"] and len(report["pairs"]) == 3
    lineage = read_info(folder / "ppo-2/rlhf.safetensors").lineage
    assert lineage["reward"].endswith("reward-2/reward.safetensors")
    assert "ppo/rlhf" in read_info(folder / "reward-2/reward.safetensors").lineage["sampler"]
    assert "all done" in said and "tinychat chat --ckpt" in said
