"""Settings: default, file, variable, flag; and one sentence for each mistake."""

import dataclasses
import json
import os
import re

import pytest
from test_cli import here, run, scripted, shipped, told  # noqa: F401 (fixtures)

from tinychat.cli.config import OPTIONS, SAMPLING, settings, shown
from tinychat.generation import Sampling


@pytest.fixture
def config(monkeypatch, tmp_path):
    """The file that settings are read from; no variable is set."""
    for option in OPTIONS.values():
        monkeypatch.delenv(option.variable, raising=False)
    path = tmp_path / "config.toml"
    monkeypatch.setenv("TINYCHAT_CONFIG", str(path))
    return path


def test_defaults_are_those_of_the_generation_chapter(config):
    config.touch()
    now = settings()
    # The chat writes drafts; everything that trains or measures has one reply a prompt.
    assert Sampling(**now.sampling) == Sampling(drafts=8) and Sampling().drafts == 1
    assert {field.name for field in dataclasses.fields(Sampling)} == set(SAMPLING)
    assert all(value.source == "default" for value in now.values.values())


def test_rising_priority(config, monkeypatch):
    config.write_text('temperature = 0.1\ntop_k = 1\ntop_p = 0.1\nsystem = "äh"\nsave = false\n')
    monkeypatch.setenv("TINYCHAT_TOP_K", "2")
    monkeypatch.setenv("TINYCHAT_TOP_P", "0.2")
    monkeypatch.setenv("TINYCHAT_MIN_P", "")  # set to nothing is not set
    now = settings({"top_p": 0.3, "temperature": None})
    got = {name: (now[name], now.values[name].source) for name in now.values}
    assert got["temperature"] == (0.1, str(config))
    assert got["top_k"] == (2, "TINYCHAT_TOP_K")
    assert got["top_p"] == (0.3, "--top-p")
    assert got["min_p"] == (0.0, "default")
    assert got["system"] == ("äh", str(config)) and got["save"] == (False, str(config))


def test_a_flag_can_take_a_seed_back(config):
    config.write_text("seed = 5\n")
    assert settings().sampling["seed"] == 5
    flag = OPTIONS["seed"].parse("random", "--seed")
    assert settings({"seed": flag}).sampling["seed"] is None


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_switches(config, monkeypatch, text):
    config.write_text("save = true\n")
    monkeypatch.setenv("TINYCHAT_SAVE", text)
    assert settings()["save"] is False


def test_a_whole_number_will_do_for_a_fraction(config):
    config.write_text("temperature = 1\n")
    assert settings()["temperature"] == 1.0 and type(settings()["temperature"]) is float


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("temprature = 1", "there is no setting 'temprature' (it is set to 1); did you mean "
         "temperature? known are ckpt,"),
        ("xyz = 'a'", "there is no setting 'xyz' (it is set to 'a'); known are ckpt,"),
        ("temperature = 'hot'", "temperature is 'hot'; it must be a number from 0 up."),
        ("temperature = true", "temperature is True; it must be a number from 0 up."),
        ("temperature = nan", "temperature is nan; it must be a number from 0 up."),
        ("top_k = 1.5", "top_k is 1.5; it must be a whole number from 0 up."),
        ("save = 1", "save is 1; it must be true or false."),
        ("render = 'pretty'", "render is 'pretty'; it must be auto, markdown or plain."),
        ("seed = 'x'", "seed is 'x'; it must be a whole number from 0 up, or random."),
        ("ckpt = ''", "ckpt is ''; it must be the name or file of a checkpoint."),
        ("temperature = hot", "is not TOML: invalid value (at line 1, column 15)"),
        ("[temperature]", "temperature is {}; it must be a number from 0 up."),
        ("\udcff = 1", "is not UTF-8 (byte 1); save it as UTF-8."),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(config, text, sentence):
    config.write_bytes(text.encode(errors="surrogateescape"))
    error = told(run("config"))
    assert sentence in error and "config.toml" in error


@pytest.mark.parametrize("words", [["chat"], ["ask", "hi"], ["compare", "hi"], ["config"]])
def test_the_file_counts_for_all_that_talk(config, words):
    config.write_text("xyz = 1")
    assert "there is no setting 'xyz'" in told(run(*words, stdin="hi\n"))


def test_mistakes_in_a_variable(config, monkeypatch):
    config.touch()
    monkeypatch.setenv("TINYCHAT_TOP_P", "7")
    sentence = "TINYCHAT_TOP_P is 7; it must be a number above 0 and at most 1."
    assert sentence in told(run("ask", "hi"))


def test_a_named_file_that_is_not_there(config):
    assert "which does not exist; create it or unset" in told(run("config"))
    assert run("config", "path").stdout == f"{config}\n"  # to see what to mend


def test_a_folder_instead_of_a_file(config):
    config.mkdir()
    assert re.search(
        r"config\.toml: (Is a directory|Permission denied); make it", told(run("config"))
    )


def test_config_shows_values_and_sources(config, monkeypatch):
    config.write_text("max_tokens = 7\n")
    monkeypatch.setenv("TINYCHAT_SEED", "3")
    out = run("config").stdout
    assert re.search(r"max_tokens +│ 7 +│ .*config\.toml", out)
    assert re.search(r"seed +│ 3 +│ TINYCHAT_SEED", out)
    assert re.search(r"top_p +│ 0\.95 +│ default", out)
    assert f"file: {config}\n" in out
    record = json.loads(run("config", "--json").stdout)
    assert record["file"] == str(config) and record["exists"] is True
    assert record["settings"]["seed"] == {"value": 3, "from": "TINYCHAT_SEED"}


def test_the_users_own_file(config, monkeypatch, tmp_path):
    monkeypatch.delenv("TINYCHAT_CONFIG")
    monkeypatch.setattr("platformdirs.user_config_dir", lambda _: str(tmp_path / "none"))
    assert "(not there yet)" in run("config").stdout
    assert run("config", "path").stdout == f"{tmp_path / 'none' / 'config.toml'}\n"


def test_settings_reach_the_model(config, scripted, monkeypatch):  # noqa: F811
    config.write_text('max_tokens = 5\nckpt = "sft"\n')
    monkeypatch.setenv("TINYCHAT_SEED", "11")
    answer = json.loads(run("ask", "hi", "--json", "--top-k", "4").stdout)
    assert answer["reply"] == "Hello"
    assert answer["sampling"]["seed"] == 11 and answer["sampling"]["top_k"] == 4
    assert os.path.basename(answer["checkpoint"]) == "sft.safetensors"
    shows = run("chat", stdin="/show\n").stderr
    assert re.search(r"max_tokens +5\b", shows) and re.search(r"seed +11\b", shows)


def test_a_bad_checkpoint_name_in_the_file(config, here):  # noqa: F811
    config.write_text('ckpt = "stf"\n')
    assert "No checkpoint 'stf': did you mean sft?" in told(run("ask", "hi"))


def test_values_for_people():
    assert [shown(value) for value in (0.5, 1.0, True, "x", 3)] == ["0.5", "1", "true", "x", "3"]
