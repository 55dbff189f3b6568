"""One round of RLHF on a person's own votes, from the first duel to the second, in small."""

import json
from pathlib import Path

import pytest
import torch
from test_cli import run

from tinychat.cli.tally import tally
from tinychat.cli.votes import records
from tinychat.data import tokenizer_model
from tinychat.data.preferences import by_part, corpus_ranked
from tinychat.gpt import GPT, GPTConfig, save_model
from tinychat.reward_model import load_reward
from tinychat.runtime import search
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.tokenizer import Tokenizer

QUICK = ["--set", "sequence=128", "--set", "precision=fp32", "--set", "epochs=0.02"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a chat model far too small to say anything, and nothing else to be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    monkeypatch.setattr(search, "search_folders", lambda: [tmp_path])
    torch.manual_seed(0)
    shape = GPTConfig(
        width=16, layers=1, heads=1, kv_heads=1, head_width=16, hidden=16, context=512
    )
    rest = {"tokenizer": Tokenizer(tokenizer_model()), "lineage": {"tokens": 7}, "metrics": {}}
    save_model("sft.safetensors", GPT(shape), stage="sft", **rest)
    return tmp_path


def done(*words: str, keys: str = "") -> str:
    result = run(*words, stdin="".join(f"{key}\n" for key in keys))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_votes_reward_model_policy_and_votes_again(here):
    # 1. Ten votes on the chat model's own replies.
    words = ["duel", "sft", "--votes", "votes.jsonl", "--max-tokens", "8", "--seed", "1"]
    done(*words, keys="abtxabaabb")
    votes = list(records(Path("votes.jsonl")))
    assert len(votes) == 10 and {one["made"]["a"]["name"] for one in votes} == {"sft.safetensors"}
    assert {one["made"]["b"]["sha256"] for one in votes} == {file_sha256("sft.safetensors")}
    # 2. A reward model learns from them, beside the corpus.
    done("train", "reward", "--from", "sft", "--votes", "votes.jsonl", "--samples", "0", *QUICK)
    info = read_info("runs/reward/reward.safetensors")
    learned = info.lineage["data"]["votes"]
    # Eight have a winner; now and then the hash of a prompt holds one out.
    assert 6 <= learned["prompts"] <= 8 and learned["file"] == "votes.jsonl"
    load_reward("runs/reward/reward.safetensors")
    # 3. PPO raises its marks.
    done(
        "train", "ppo", "--from", "sft", "--reward", "runs/reward/reward.safetensors",
        "--set", "episodes=4", "--set", "max_tokens=16", "--set", "steps=1", "--set", "ptx=0",
    )  # fmt: skip
    # 4. The next round's votes: new against old, on questions of the test part.
    text = done(
        "duel", "runs/ppo/rlhf.safetensors", "sft", "--votes", "votes.jsonl",
        "--max-tokens", "8", "--seed", "1", keys="ab",
    )  # fmt: skip
    assert " of 2 votes" in text
    itself, pair = tally(Path("votes.jsonl")).scores
    assert itself.same and itself.votes == 10
    assert (pair.a, pair.b, pair.votes) == ("rlhf", "sft", 2)
    # And the policy can say why it talks so.
    text = run(
        "chat", "--ckpt", "runs/ppo/rlhf.safetensors", "--max-tokens", "6",
        stdin="hello\n/why runs/reward/reward.safetensors\n",
    )  # fmt: skip
    assert text.exit_code == 0 and "of good replies" in text.stderr
    assert "KL to the sft model" in text.stderr


def test_a_question_that_a_vote_teaches_is_no_longer_held_out(here):
    held = [group for side in ("validation", "test") for group in by_part(corpus_ranked())[side]]
    taken = held[::2]
    with open("votes.jsonl", "w", encoding="utf-8") as file:
        for group in taken:
            prompt = [{"role": m.role, "content": m.content} for m in group.prompt]
            vote = {"prompt": prompt, "a": "Yes.", "b": "No.", "winner": "a"}
            file.write(json.dumps(vote) + "\n")
    pairs = {}
    for name, more in (("plain", []), ("voted", ["--votes", "votes.jsonl"])):
        done("train", "reward", "--from", "sft", "--samples", "0", "--run", name, *more, *QUICK)
        pairs[name] = read_info(f"runs/{name}/reward.safetensors").metrics["by_source"]["corpus"][1]
    # About half of the questions, less those whose votes were held out in their turn.
    assert 0.4 * pairs["plain"] < pairs["voted"] < 0.7 * pairs["plain"]
