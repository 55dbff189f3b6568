"""The reward model's exam: who finds the right answer, worked out by hand."""

from dataclasses import replace

import fakes
import torch
from fakes import PERU, ByteTokenizer, ScriptedGPT, talk

from tinychat.cli import reward_exam
from tinychat.cli.reward_exam import (
    in_order,
    print_exam,
    print_readers,
    readers_order,
    right_share,
    sit_exam,
)
from tinychat.data.facts import Facts
from tinychat.data.groups import tokenize_groups
from tinychat.data.preferences import Ranked, Reply
from tinychat.data.records import Message
from tinychat.dialogue import render_prompt
from tinychat.gpt import GPT, GPTConfig
from tinychat.reward_model import RewardModel


def test_order_by_hand():
    right_QN = torch.tensor([[True, False, False], [True, True, False]])
    mark_QN = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 1.0]])
    # One of two, and one and a half of two: a tie is half.
    assert in_order(right_QN, mark_QN) == (0.5 + 0.75) / 2


class Marker:
    """Gives the marks that it is told to."""

    def __init__(self, marks):
        self.marks = marks


def test_the_exam_finds_out_who_chooses_well(monkeypatch, capsys):
    pieces, chat = ByteTokenizer(), ScriptedGPT([])
    lists = iter([["Lima.", "Quito.", "Lima.", "Cusco."], ["Cow.", "Cow.", "Cow.", "Cow."]])
    sure = iter([[-0.5, -0.1, -0.9, -0.7], [-0.1, -0.1, -0.1, -0.1]])

    def replies(model, prompts, config, **rest):
        found, logprobs = [], []
        for _ in range(0, len(prompts), 4):
            texts = [[*pieces.encode(text), pieces.end_id] for text in next(lists)]
            found += texts
            logprobs += [[value] * len(text) for value, text in zip(next(sure), texts, strict=True)]
        return found, logprobs

    monkeypatch.setattr(reward_exam, "DRAWS", 4)
    monkeypatch.setattr("tinychat.ppo.sample_replies", replies)
    monkeypatch.setattr("tinychat.reward_model.score", lambda model, texts, pad: model.marks)
    asked = [talk(*PERU), talk("what says moo", "A cow says moo.", "science")]
    marker = Marker(torch.tensor([0.0, 0.5, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0]))
    exam = sit_exam(marker, chat, pieces, asked)
    assert exam == {
        "questions": 2,
        "draws": 4,
        "chance": 0.75,  # two of four, and four of four
        "best": 1.0,
        "best_by_logprob": 0.5,
        "with_both": 1,
        "right_above_wrong": 0.5,  # 2.0 is above both, 0.0 above none
        "by_logprob": 0.25,  # -0.5 is above -0.7 alone, -0.9 above none
    }
    lists = iter([["Lima.", "Quito.", "Lima.", "Cusco."], ["Cow.", "Cow.", "Cow.", "Cow."]])
    sure = iter([[0.0] * 4] * 2)
    assert right_share(chat, pieces, Facts(asked)) == 0.75
    print_exam(exam)
    told = capsys.readouterr().out
    assert "75.0% are right; of the best of 4 by mark, 100.0%" in told
    assert "lose facts" not in told
    print_exam(exam | {"right_above_wrong": 0.2})
    assert "PPO may lose facts." in capsys.readouterr().out
    print_exam(None)
    assert capsys.readouterr().out == ""


def test_nothing_right_tells_nothing(monkeypatch):
    pieces = ByteTokenizer()
    assert sit_exam(Marker(None), ScriptedGPT([]), pieces, []) is None
    monkeypatch.setattr("tinychat.reward_model.score", lambda model, texts, pad: torch.zeros(8))
    none = [[pieces.end_id]] * 8, [[-1.0]] * 8
    monkeypatch.setattr("tinychat.ppo.sample_replies", lambda *args, **rest: none)
    assert sit_exam(Marker(None), ScriptedGPT([]), pieces, [talk(*PERU)]) is None


SHAPE = GPTConfig(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=64, vocab_size=263, context=96
)


def sureness(gpt: GPT, prompt: tuple[Message, ...], text: str) -> float:
    """Mean log-prob a token, the slow way."""
    pieces = ByteTokenizer()
    asked, said = render_prompt(prompt, pieces), [*pieces.encode(text), pieces.end_id]
    with torch.no_grad():
        logprobs_TV = gpt(torch.tensor([asked + said]))[0].log_softmax(-1)
    places = range(len(asked) - 1, len(asked) + len(said) - 1)
    nats = [logprobs_TV[n, id].item() for n, id in zip(places, said, strict=True)]
    return sum(nats) / len(nats)


def test_the_readers_order(capsys):
    pieces, chat = ByteTokenizer(), fakes.stirred(SHAPE, 0, by=0.2)
    groups = []
    for text in ("a b", "what", "who is it"):
        prompt = (Message("user", text),)
        said = sorted(["no", "maybe so", "yes!"], key=lambda s: -sureness(chat, prompt, s))
        order = tuple(Reply(reply, rank) for rank, reply in enumerate(said))
        groups.append(Ranked(prompt, order, "graded", text))
    ranks = tuple(Reply(reply.text, 2 - reply.rank) for reply in groups[-1].replies)
    groups.append(replace(groups[-1], replies=ranks, source="corpus"))  # nobody's marks
    held_out = tokenize_groups(groups, pieces, sequence=96)
    contrary = RewardModel(chat, pieces.assistant_id, surety=-1.0)
    found = readers_order(contrary, chat, pieces, held_out)
    assert found == {"pairs": 9, "by_mark": 0.0, "by_logprob": 1.0}
    print_readers(found)
    assert "9 held-out pairs that readers marked, 0.0% are in their" in capsys.readouterr().out
    assert readers_order(contrary, chat, pieces, held_out[-1:]) is None
    print_readers(None)
    assert capsys.readouterr().out == ""
