"""Which prompts a model answers for `tinychat train reward`, and at which temperatures."""

import json

import pytest
from fakes import ByteTokenizer, ScriptedGPT

from tinychat.cli.reward_samples import in_turn, take_samples, unwritten
from tinychat.data import unseen
from tinychat.data.preferences import Ranked, Reply, for_judge, prompt_key, read_ranked, written
from tinychat.data.records import Dialogue, Message
from tinychat.data.split import split_of


def group(text: str) -> Ranked:
    return Ranked((Message("user", text),), (Reply("Yes.", 0),), "test", text)


def test_the_sources_take_turns():
    found = in_turn(map(group, "abc"), iter(()), map(group, "x"))
    assert [one.id for one in found] == ["a", "x", "b", "c"]


def test_the_last_prompt_of_a_conversation_and_its_reply():
    turns = [("user", "hi"), ("assistant", "Hello!"), ("user", "bye"), ("assistant", "Bye!")]
    talk = Dialogue("one", "t", tuple(Message(*turn) for turn in turns))
    (found,) = written([talk], "basics")
    assert found.prompt == talk.messages[:3] and found.id == "one"
    assert found.replies == (Reply("Bye!", 0),)


def test_public_prompts_of_one_half_that_ppo_may_ask(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / next(s.file for s in unseen.sources() if s.name == "ppo_prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = [[{"role": "user", "content": f"what is number {n}"}] for n in range(200)]
    answered = [*asked[0], {"role": "assistant", "content": "zero"}]
    lines = [json.dumps({"prompt": prompt}) for prompt in [*asked, answered]]
    path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    mine, judges = (list(unwritten(tmp_path, judge)) for judge in (False, True))
    assert mine and judges and not {one.id for one in mine} & {one.id for one in judges}
    keys = {one.id for one in mine + judges}
    assert keys == {f"what is number {n}" for n in range(200)} - {
        key for key in (f"what is number {n}" for n in range(200)) if split_of(key) != "train"
    }
    for one in mine:
        assert not one.replies and one.id == prompt_key(one.prompt) and not for_judge(one.prompt)
    assert list(unwritten(None, False)) == []


def test_every_model_answers_every_prompt(tmp_path):
    models = [ScriptedGPT(["Yes."]), ScriptedGPT(["No."])]
    asked = [group("hello"), Ranked((Message("user", "unwritten"),), (), "public", "unwritten")]
    path = tmp_path / "on_policy.jsonl"
    take_samples(models, ByteTokenizer(), asked, path, seed=0)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # "Yes." is the written reply, and one and the same text three times makes no pair.
    assert [one["id"] for one in found] == ["hello"]
    (kept,) = read_ranked(path, "on-policy", 0.5)
    assert [(reply.text, reply.rank) for reply in kept.replies] == [("Yes.", 0), ("No.", 1)]
    assert not list(tmp_path.glob("*.tmp"))
