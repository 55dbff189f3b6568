"""The checkpoints in checkpoints/: what a fresh clone talks to."""

from pathlib import Path

import pytest

from tinychat.cli.card import card
from tinychat.data import corpus, tokenizer_model
from tinychat.data.facts import Facts
from tinychat.data.records import Message
from tinychat.data.split import split_of
from tinychat.dialogue import render, render_prompt
from tinychat.evaluation import answer_all
from tinychat.generation import Sampling, stream
from tinychat.gpt import load_model
from tinychat.pretraining import LossFunction, bits_per_byte, bytes_of_tokens
from tinychat.reward_model import load_reward
from tinychat.runtime.checkpoint import read_info
from tinychat.sft import PackedConversations, SFTConfig

FOLDER = Path(__file__).parents[1] / "checkpoints"
FILES = sorted(FOLDER.glob("*.safetensors"))
CHAT = [path for path in FILES if path.stem in ("sft", "rlhf")]
MB = 1_000_000


def test_a_fresh_clone_has_every_stage():
    assert {path.stem for path in FILES} == {"base", "sft", "reward", "rlhf"}


def test_ppo_left_the_replies_alike_in_form():
    """Within 15 % of the model it began with, at most 10 nats away, with ends of their own."""
    metrics = read_info(FOLDER / "rlhf.safetensors").metrics
    before, after = metrics["before"], metrics["after"]
    for name in ("length", "distinct_2"):
        assert after[name] == pytest.approx(before[name], rel=0.15)
    assert after["kl"] < 10 and after["ended"] >= 0.97
    assert after["score"] > before["score"]
    assert after["right"] > before["right"] - 0.01  # facts are not the price of it


def test_sizes_stay_within_the_limits():
    sizes = [path.stat().st_size for path in FILES]
    assert max(sizes) <= 45 * MB
    assert sum(sizes) <= 150 * MB


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_metadata_tell_the_whole_story(path):
    info = read_info(path)
    assert info.stage == path.stem
    assert info.lineage["tokens"] > 0
    assert info.lineage["hardware"]["cpu"]
    assert all(entry["licence"] for entry in info.lineage["data"].values())
    if info.stage == "reward":  # it says nothing; its marks may move
        assert info.metrics["storage_moves_marks_by"] < 0.15
    else:
        assert abs(info.metrics["storage_cost_percent"]) < 0.5


def test_stages_name_their_parent():
    from tinychat.runtime.checkpoint import file_sha256

    def named(path: str, key: str) -> str:
        return read_info(FOLDER / f"{path}.safetensors").lineage[key]

    digests = {path.stem: file_sha256(path) for path in FILES}
    lineage, parents = read_info(FOLDER / "sft.safetensors").lineage, []
    while "parent_sha256" in lineage:  # fine-tuning and pretraining may have gone on
        parents.append(lineage["parent_sha256"])
        lineage = lineage["ancestors"][0]
    assert digests["base"] in parents
    assert named("reward", "parent_sha256") == named("rlhf", "parent_sha256") == digests["sft"]
    assert named("rlhf", "reward_sha256") == digests["reward"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_was_made_with_the_shipped_tokenizer(path):
    load = load_reward if path.stem == "reward" else load_model
    _, tokenizer, _ = load(path)
    assert tokenizer.model == tokenizer_model()


def test_the_card_is_up_to_date():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == card(FOLDER), (
        "make it again: tinychat models --card checkpoints > checkpoints/README.md"
    )


def test_recorded_bits_per_byte_can_be_measured_again():
    """On the replies that training never saw; bfloat16 against float32 leaves a small gap."""
    model, tokenizer, info = load_model(FOLDER / "sft.safetensors")
    config = SFTConfig(sequence=info.lineage["settings"]["sequence"])
    held_out = [
        render(dialogue, tokenizer, context=config.sequence + 1)
        for dialogue in corpus.dialogues()
        if split_of(dialogue.id) == "validation"
    ]
    packed = PackedConversations(held_out, config, tokenizer.pad_id)
    batches = [packed.batch([row]) for row in packed.rows(0)]
    exact = LossFunction(model, dtype=model.embed.weight.dtype, compiled=False)
    bits = bits_per_byte(exact, batches, bytes_of_tokens(tokenizer))
    assert bits == pytest.approx(info.metrics["bits_per_byte"]["unseen replies"], rel=0.01)


@pytest.mark.parametrize("path", CHAT, ids=lambda path: path.stem)
def test_replies_are_sentences_that_end_by_themselves(path):
    model, tokenizer, _ = load_model(path)
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=200, seed=1)
    replies = []
    for prompt in ("hi", "what is your name?", "tell me a short story about a fox", "ok thanks!"):
        ids = render_prompt([Message("user", prompt)], tokenizer, context=512, reserve=200)
        replies.append("".join(stream(model, tokenizer, ids, sampling)))
    for reply in replies:
        assert reply and "\ufffd" not in reply and "<|" not in reply
    finished = [reply for reply in replies if reply.rstrip()[-1] in '.!?"']
    assert len(finished) >= 3, replies


STORY = (
    Message("user", "tell me a short story about a fox"),
    Message(
        "assistant",
        "Once upon a time there was a little fox named Rust. One day he found a red ball by the "
        "river. He pushed it with his nose, and it rolled to a girl. She laughed. He was glad.",
    ),
)


@pytest.mark.parametrize("path", CHAT, ids=lambda path: path.stem)
def test_what_was_said_before_does_not_spill_into_the_answer(path):
    """Earlier models of ours had a third of these right, and "a little fox" painted a picture."""
    model, tokenizer, _ = load_model(path)
    basics = [one for one in corpus.basics() if one.id.startswith("d12")]
    facts = Facts(basics)
    asked = [one for one in facts.asked if split_of(one.id) == "validation"][:100]
    sampling = Sampling(temperature=0.0, max_tokens=48, seed=0)
    right = []
    for before in ((), STORY):
        prompts = [(*before, one.messages[0]) for one in asked]
        said = answer_all(model, tokenizer, prompts, sampling)
        right.append(sum(facts.right(o, a.text) for o, a in zip(asked, said, strict=True)))
    alone, behind = right
    assert len(asked) == 100 and alone > 35
    assert behind > 0.75 * alone
