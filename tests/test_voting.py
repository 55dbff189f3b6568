"""`/vote` in a chat: the loop, the file of votes, and what the conversation goes on with."""

import itertools
import secrets
from pathlib import Path

import pytest
from fakes import ByteTokenizer, ScriptedGPT, TwoMinds
from test_commands import Ready, chat, said, turns

from tinychat.cli.filing import Keeper
from tinychat.cli.saved import Journal, read_chat
from tinychat.cli.trace import last_turn
from tinychat.cli.votes import records, votes_file
from tinychat.data.preferences import read_votes
from tinychat.data.records import Message
from tinychat.generation import Sampling
from tinychat.runtime.checkpoint import CheckpointInfo, file_sha256

WARM = Sampling(temperature=1.0, seed=1, max_tokens=40)


class Pressed:
    """Keys that a script presses; then the user leaves."""

    def __init__(self, *keys):
        self.keys, self.choices = list(keys), None

    def read(self, choices):
        self.choices = [one.key for one in choices]
        if not self.keys:
            raise EOFError
        return self.keys.pop(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A data folder of its own, a file that stands for the checkpoint, A always the first reply."""
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    Path("rlhf.safetensors").write_bytes(b"weights")
    seeds = itertools.cycle(range(8))  # any four of these make TwoMinds say both things
    monkeypatch.setattr(secrets, "randbelow", lambda most: 1 if most == 2 else next(seeds))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def joined(text: str) -> str:
    """Without all spaces: where a long name of a folder is wrapped tells nothing."""
    return "".join(text.split())


def voting(*lines, keys=(), model=None, sampling=WARM, interactive=True):
    talk = chat(model or TwoMinds(), *lines, sampling=sampling, interactive=interactive)
    talk.keys = Pressed(*keys)
    talk.run()
    return talk


@pytest.mark.parametrize(
    ("key", "winner", "moves"),
    [("a", "a", False), ("b", "b", True), ("t", "tie", False), ("x", "bad", False)],
)
def test_the_conversation_goes_on_with_the_better_one(here, capsys, key, winner, moves):
    talk = voting("hi", "/vote", keys=[key])
    out = said(capsys.readouterr().out)
    (one,) = records(votes_file())
    assert {one["a"], one["b"]} == set(TwoMinds.REPLIES) and one["winner"] == winner
    assert turns(talk.session) == ["hi", one["b"] if moves else one["a"]]
    where = "with the other reply" if moves else "with the reply it had"
    assert joined(f"(kept in {votes_file()}; the conversation goes on {where})") in joined(out)
    assert f"{one['a']} (two replies to: hi) A B {one['a']} {one['b']} " in out
    assert talk.keys.choices == ["a", "b", "t", "x", "s"]
    # The vote says who wrote what, and how.
    a, b = one["made"]["a"], one["made"]["b"]
    assert a["sha256"] == b["sha256"] == file_sha256("rlhf.safetensors")
    assert (a["name"], a["stage"], a["seed"], a["ended"]) == ("rlhf.safetensors", "rlhf", 1, "end")
    assert b["seed"] == 0 and one["sampling"]["temperature"] == 1.0
    assert one["prompt"] == [{"role": "user", "content": "hi"}]
    assert len(read_votes(votes_file())) == 1


def test_the_order_is_hidden(here, monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", lambda most: 0 if most == 2 else 3)
    for key, winner in (("a", "b"), ("b", "a")):
        talk = chat(TwoMinds(), "hi", "/vote", sampling=WARM)
        talk.keys = Pressed(key)
        talk.run()
        one = list(records(votes_file()))[-1]
        assert (one["winner"], one["left"]) == (winner, "b")
        assert turns(talk.session)[-1] == one[winner]


def test_the_chosen_reply_is_the_sessions_own(here, capsys):
    talk = voting("hi", "and", "/vote", "/stats", "more", keys=["b"])
    assert "no reply to measure" not in capsys.readouterr().out
    history = turns(talk.session)
    assert history[:3:2] == ["hi", "and"] and len(history) == 6
    # The tokens that the next turn was read with are those of the chosen reply.
    turn = last_turn(talk.session)
    tokens = ByteTokenizer()
    text = "".join(map(tokens.piece, turn.prompt))
    assert turn.as_written and text == (
        "<|bos|>" + "".join(
            f"<|{role}|>{content}<|end|>"
            for role, content in zip(["user", "assistant"] * 3, history[:5], strict=False)
        ) + "<|assistant|>"
    )  # fmt: skip
    assert talk.session.last.cached > len(tokens.encode(history[0]))


def test_the_whole_conversation_is_the_prompt(here):
    voting("/system Be kind.", "hi", "and", "/vote", keys=["a"])
    (one,) = records(votes_file())
    assert [turn["role"] for turn in one["prompt"]] == ["system", "user", "assistant", "user"]
    assert one["prompt"][0]["content"] == "Be kind." and one["prompt"][-1]["content"] == "and"


@pytest.mark.parametrize("keys", [["s"], []])
def test_no_vote_changes_nothing(here, capsys, keys):
    talk = voting("hi", "/vote", "/undo", keys=keys)
    assert "(no vote; the conversation stays as it was)" in said(capsys.readouterr().out)
    assert turns(talk.session) == [] and not votes_file().exists()


def test_the_saved_chat_follows(here):
    journal = Journal(here / "chats")
    talk = chat(TwoMinds(), "hi", "/vote", sampling=WARM)
    talk.keys, talk.journal = Pressed("b"), journal
    talk.on_turn = Keeper(talk)
    talk.run()
    path = journal.path
    journal.leave()
    assert [message.content for message in read_chat(path).messages] == turns(talk.session)
    (one,) = records(votes_file())
    assert turns(talk.session)[-1] == one["b"]


def test_a_reply_of_another_time_has_no_maker(here):
    talk = chat(TwoMinds(), "/vote", sampling=WARM)
    talk.session.messages = [Message("user", "hi"), Message("assistant", "Loaded.")]
    talk.keys = Pressed("a")
    talk.run()
    (one,) = records(votes_file())
    assert one["a"] == "Loaded." and one["made"]["a"] is None
    assert one["made"]["b"]["name"] == "rlhf.safetensors"


def test_interrupted_while_the_second_reply_is_written(here, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinychat.cli.voting.drawn", interrupted)
    talk = voting("hi", "/vote", "and", keys=["b"])
    assert "(stopped)" in capsys.readouterr().out
    assert turns(talk.session)[::2] == ["hi", "and"] and not votes_file().exists()


# Where there is nothing to vote on


def test_before_the_first_reply(here, capsys):
    voting("/vote")
    assert "There is no reply to vote on yet" in capsys.readouterr().out


def test_a_pipe_has_nobody_to_ask(here, capsys):
    talk = chat(TwoMinds(), "hi", "/vote", "and", sampling=WARM, interactive=False)
    talk.run()
    err = said(capsys.readouterr().err)
    assert "/vote needs a terminal to ask at; `tinychat duel` reads votes from a pipe too." in err
    assert turns(talk.session)[::2] == ["hi", "and"]


def test_temperature_0(here, capsys):
    voting("hi", "/vote", sampling=Sampling(temperature=0))
    assert "try /set temperature 0.8" in said(capsys.readouterr().out)


def test_a_model_that_says_one_thing_only(here, capsys):
    talk = voting("hi", "/vote", model=ScriptedGPT(["Yes."]))
    out = said(capsys.readouterr().out)
    assert "The model said nothing else in 4 tries" in out and "/set temperature 1.3" in out
    assert turns(talk.session) == ["hi", "Yes."] and not votes_file().exists()


def test_a_file_that_cannot_take_it(here, capsys):
    (here / "data").mkdir()
    votes_file().write_text("a diary\n")
    talk = voting("hi", "/vote", "and", keys=["b"])
    assert "is not a JSON object" in capsys.readouterr().out
    assert len(turns(talk.session)) == 4 and votes_file().read_text() == "a diary\n"


# Models that cannot chat


def test_a_reward_model_is_refused_in_the_chat(here, capsys, monkeypatch):
    info = CheckpointInfo(
        **{**vars(Ready.info), "path": here / "reward.safetensors", "stage": "reward"}
    )
    monkeypatch.setattr("tinychat.cli.loading.find", lambda name: info.path)
    monkeypatch.setattr("tinychat.cli.loading.read_info", lambda path: info)
    talk = voting("hi", "/model reward", "/compare reward rlhf", "and")
    out = said(capsys.readouterr().out)
    wanted = "reward.safetensors is a reward model: it scores replies and cannot chat; use"
    assert joined(out).count(joined(wanted)) == 2
    assert joined(f"{here / 'rlhf.safetensors'} instead.") in joined(out)
    assert turns(talk.session)[::2] == ["hi", "and"]
