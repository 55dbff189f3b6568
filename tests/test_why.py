"""`/why`: the marks and KL terms are the models' own, and every terminal can show them."""

import io
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_commands import Lines, Ready, said, transcript

from tinychat.cli.console import Screen
from tinychat.cli.loop import Chat
from tinychat.cli.marks import kl_terms, marks_along, reference_of, word_ends
from tinychat.cli.session import ChatSession
from tinychat.cli.trace import Turn, last_turn
from tinychat.cli.why import Sparkline, Word, step
from tinychat.data import tokenizer_model
from tinychat.data.records import Message
from tinychat.generation import Sampling
from tinychat.gpt import GPT, GPTConfig, load_model, save_model
from tinychat.reward_model import RewardModel, load_reward, save_reward
from tinychat.runtime.checkpoint import file_sha256, read_info
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.tokenizer import Tokenizer

SHAPE = GPTConfig(
    width=32, layers=1, heads=2, kv_heads=1, head_width=16, hidden=32, context=160
)  # fmt: skip
PIECES = Tokenizer(tokenizer_model())


def stirred(seed: int, shape: GPTConfig = SHAPE) -> GPT:
    """Weights far from their start, so that every part matters."""
    torch.manual_seed(seed)
    model = GPT(shape).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """sft, rlhf (made from it) and a reward model, in one folder."""
    folder = tmp_path_factory.mktemp("models")
    common = {"tokenizer": PIECES, "metrics": {}, "quantize": "fp32"}
    sft = folder / "sft.safetensors"
    save_model(sft, stirred(1), stage="sft", lineage={}, **common)
    lineage = {"parent_sha256": file_sha256(sft)}
    save_model(folder / "rlhf.safetensors", stirred(2), stage="rlhf", lineage=lineage, **common)
    judge = RewardModel(stirred(3), PIECES.assistant_id)
    judge.mean.fill_(0.5)
    judge.deviation.fill_(2.0)
    judge.length_slope.fill_(0.1)
    save_reward(folder / "reward.safetensors", judge, lineage={}, **common)
    return folder


@pytest.fixture(scope="module")
def reward(models) -> RewardModel:
    return load_reward(models / "reward.safetensors")[0]


def turn_of(question: str, reply: str, ended: bool = True, before: str = "") -> Turn:
    older = [PIECES.user_id, *PIECES.encode(before), PIECES.end_id] if before else []
    message = [PIECES.user_id, *PIECES.encode(question), PIECES.end_id, PIECES.assistant_id]
    closed = [PIECES.end_id] if ended else []
    prompt = [PIECES.bos_id, *older, *message]
    return Turn(prompt, PIECES.encode(reply) + closed, 1 + len(older), True)


# What is measured


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Cats eat mice, mostly.", ["Cats", " eat", " mice,", " mostly."]),
        ("One:\n- two\n\n- three", ["One:\n", "- ", "two\n\n", "- ", "three"]),
        ("漢字 ok", ["漢", "字", " ok"]),
        ("Unbelievableness", ["Unbelievableness"]),
        (" ", [" "]),
    ],
)
def test_words(text, words):
    tokens = PIECES.encode(text)
    ends = word_ends(PIECES, tokens)
    found = [PIECES.decode(tokens[a:b]) for a, b in itertools.pairwise([0, *ends])]
    assert "".join(found) == text
    assert [word.strip() for word in found if word.strip()] == [
        w.strip() for w in words if w.strip()
    ]


def test_no_words():
    assert word_ends(PIECES, []) == []


@pytest.mark.parametrize("ended", [True, False])
def test_each_mark_is_that_of_a_reply_that_ends_there(reward, ended):
    turn = turn_of("what do cats eat?", "Cats eat mice, mostly.", ended)
    ends, marks = marks_along(reward, PIECES, turn)
    assert len(ends) == len(marks.values) == 4 and not marks.cut
    said = turn.reply[:-1] if ended else turn.reply
    assert ends[-1] == len(said)
    with torch.no_grad():
        alone = [
            float(reward(torch.tensor([[*turn.prompt, *said[:end], PIECES.end_id]])))
            for end in ends
        ]
        whole = float(reward(torch.tensor([turn.ids])))
    assert marks.values[:-1] == pytest.approx(alone[:-1], abs=1e-4)
    assert marks.values[-1] == pytest.approx(whole, abs=1e-4)
    assert (abs(alone[-1] - whole) < 1e-4) == ended  # unfinished, it is marked as it is


def test_older_turns_are_left_out_where_the_reward_model_reads_less(reward):
    long = turn_of("why?", "So.", before="word " * 150)
    ends, marks = marks_along(reward, PIECES, long)
    assert marks.cut
    assert marks.values == pytest.approx(
        marks_along(reward, PIECES, turn_of("why?", "So."))[1].values, abs=1e-4
    )
    with pytest.raises(ConfigError, match="reads 160"):
        marks_along(reward, PIECES, turn_of("word " * 200, "So."))


def test_kl_terms_are_differences_of_log_probs(models):
    policy, sft = (load_model(models / f"{name}.safetensors")[0] for name in ("rlhf", "sft"))
    turn = turn_of("what do cats eat?", "Mice, mostly.")
    terms = kl_terms(policy, sft, turn)
    ids = torch.tensor([turn.ids])
    with torch.no_grad():
        p, q = (model(ids)[0].log_softmax(-1) for model in (policy, sft))
    at = range(len(turn.prompt), len(turn.ids))
    assert terms == pytest.approx(
        [float(p[n - 1, turn.ids[n]] - q[n - 1, turn.ids[n]]) for n in at], abs=1e-4
    )
    assert max(map(abs, terms)) > 0.1
    assert kl_terms(sft, sft, turn) == [0.0] * len(turn.reply)


def test_the_reference_must_be_the_one_that_ppo_began_with(models, tmp_path):
    info = read_info(models / "rlhf.safetensors")
    path, model = reference_of(info, PIECES)
    assert path == models / "sft.safetensors"
    assert torch.equal(model.embed.weight, load_model(path)[0].embed.weight)
    other = replace(info, lineage={"parent_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match="not the one that rlhf.safetensors was made from"):
        reference_of(other, PIECES)


# The drawing


def drawn(words, width=40, encoding="utf-8", **more) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, **more)
    console.print(Sparkline([Word(*word) for word in words]))
    file.flush()
    text = file.buffer.getvalue().decode(encoding)
    return [line.rstrip() for line in text.rstrip("\n").split("\n")]


def test_bars_stand_below_their_words():
    words = [("Cats", -1.0), ("eat", 0.0), ("mice.", 1.0)]
    # From -1 to 1: the middle is the fifth of eight bars.
    assert drawn(words) == ["Cats eat mice.", "▁▁▁▁ ▅▅▅ █████"]
    assert drawn(words, encoding="ascii") == ["Cats eat mice.", "1111 555 88888"]
    assert drawn(words, width=8) == ["Cats eat", "▁▁▁▁ ▅▅▅", "mice.", "█████"]
    assert [step(share) for share in (0.0, 0.124, 0.126, 0.5, 0.99, 1.0)] == [0, 0, 1, 4, 7, 7]


def test_small_differences_look_small():
    assert drawn([("a", 0.0), ("b", 0.2)]) == ["a b", "▁ ▂"]  # of a whole deviation


def test_what_ppo_changed_is_a_second_row():
    words = [("up", 0.0, 2.0), ("half", 0.0, 1.0), ("same", 0.0, 0.01), ("down", 0.0, -1.0)]
    assert drawn(words)[2] == "██ ▅▅▅▅      ----"


def test_lines_end_where_the_reply_s_do_and_wide_letters_fit():
    assert drawn([("One:↵", 0.0), ("漢", 1.0), ("字", 0.0)]) == ["One:↵", "▁▁▁▁▁", "漢 字", "██ ▁▁"]
    assert drawn([("x" * 30, 0.0)], width=10)[0] == "x" * 9 + "…"


def test_colour_tells_good_from_bad():
    lines = drawn(
        [("bad", -0.1), ("good", 0.9)], force_terminal=True, color_system="256", no_color=False
    )
    assert "38;5;208" in lines[1].split("▁▁▁")[0] and "38;5;75" in lines[1]


# The command


def chatting(models, capsys, *lines, stage="rlhf", messages=(), interactive=True, **change) -> str:
    path = models / f"{stage}.safetensors"
    model, pieces, info = load_model(path)
    talk = ChatSession(model, pieces, Sampling(temperature=0, max_tokens=8), 160)
    talk.messages = list(messages)
    loading = Ready(talk)
    loading.info = replace(info, **change)
    screen = Screen(interactive, render="plain")
    Chat(loading, Lines(*lines, interactive=interactive), screen).run()
    return capsys.readouterr()


SPOKEN = [Message("user", "what do cats eat?"), Message("assistant", "Mice, mostly.")]


def test_why(models, capsys, monkeypatch, reward):
    monkeypatch.setenv("COLUMNS", "200")
    out = chatting(models, capsys, "/why", messages=SPOKEN).out
    turn = last_turn(SimpleNamespace(
        messages=SPOKEN, last_tokens=None, tokenizer=PIECES, system=None, context=160
    ))  # fmt: skip
    _, marks = marks_along(reward, PIECES, turn)
    final = marks.values[-1]
    side = "above" if final >= 0 else "below"
    sentence = f"mark {final:+.2f}: {abs(final):.2f} deviations {side} the mean of good replies"
    assert "by reward.safetensors" in out and sentence in out
    assert re.search(r"Mice, mostly\.\n[▁-█]{5} [▁-█]{7}\n", out)
    assert f"largest steps: {marks.values[1] - marks.values[0]:+.2f} at “mostly.”" in out
    policy, sft = (load_model(models / f"{name}.safetensors")[0] for name in ("rlhf", "sft"))
    terms = kl_terms(policy, sft, turn)
    assert f"KL to the sft model: {sum(terms):+.2f} nats in {len(terms)} tokens" in out
    assert "second row: likelier than in sft.safetensors" in out
    assert "this turn was read again from its text" in out


def test_why_after_a_reply_of_its_own(models, capsys):
    out = chatting(models, capsys, "hello", "/why").out
    assert "deviations" in out and "read again" not in out


def test_why_with_another_stage_has_no_kl(models, capsys):
    out = said(chatting(models, capsys, "/why", stage="sft", messages=SPOKEN).out)
    assert "no KL: sft.safetensors is of the stage sft" in out and "mark " in out


def test_why_without_the_right_sft(models, capsys):
    out = chatting(models, capsys, "/why", messages=SPOKEN, lineage={"parent_sha256": "0" * 64}).out
    assert "is not the one that rlhf.safetensors was made from" in said(out) and "mark " in out


def test_why_from_a_pipe_leaves_standard_output_alone(models, capsys):
    shown = chatting(models, capsys, "/why", messages=SPOKEN, interactive=False)
    assert shown.out == "" and "deviations" in shown.err


def test_why_names_another_reward_model(models, capsys, tmp_path):
    copy = tmp_path / "strict.safetensors"
    copy.write_bytes((models / "reward.safetensors").read_bytes())
    out = said(chatting(models, capsys, f"/why {copy}", messages=SPOKEN).out)
    assert "by strict.safetensors" in out
    out = said(chatting(models, capsys, "/why gone", messages=SPOKEN).out)
    assert "No checkpoint 'gone'" in out
    out = said(chatting(models, capsys, f"/why {models / 'sft.safetensors'}", messages=SPOKEN).out)
    assert "is of the stage sft, which gives no marks" in out


def test_why_without_a_reward_model(models, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tinychat.runtime.search.search_folders", lambda: [tmp_path])
    monkeypatch.chdir(tmp_path)
    alone = models.parent / "alone"
    alone.mkdir(exist_ok=True)
    (alone / "rlhf.safetensors").write_bytes((models / "rlhf.safetensors").read_bytes())
    out = said(chatting(alone, capsys, "/why", messages=SPOKEN).out)
    assert "There is no reward model here; make one with `tinychat train reward`" in out


def test_why_before_the_first_reply(capsys):
    assert "nothing to look into yet" in transcript(capsys, ["x"], "/why")


def test_why_of_a_model_with_another_tokenizer(models, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "sha256", property(lambda self: str(id(self))))
    out = said(chatting(models, capsys, "/why", messages=SPOKEN).out)
    assert "has another tokenizer than the model that talks" in out
