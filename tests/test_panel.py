"""The blind readings of tests/reading: whose reply a letter was, and what the marks say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tinychat.data import corpus
from tinychat.data.split import split_of

PATH = Path(__file__).parent / "reading" / "panel.py"
KEY = [
    {"where": "prompts", "letters": {"A": "sft", "B": "rlhf"}, "replies": {"sft": "", "rlhf": ""}},
    {"where": "prompts", "letters": {"A": "rlhf", "B": "sft"}, "replies": {"sft": "", "rlhf": ""}},
    {"where": "openers", "letters": {"A": "rlhf", "B": "sft"}, "replies": {"sft": "", "rlhf": ""}},
]


@pytest.fixture
def panel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("panel", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_letter_is_another_checkpoint_at_each_prompt(panel):
    marks = panel.read_marks("1 A0 B3\n2 A4 B4\n\n3. A1, B2\n", KEY)
    assert marks == {1: {"sft": 0, "rlhf": 3}, 2: {"sft": 4, "rlhf": 4}, 3: {"sft": 2, "rlhf": 1}}
    first, second, *rest = panel.table(marks, KEY).splitlines()
    assert "mean 2.00" in first and "good  33%" in first and "nonsense  33%" in first
    assert "mean 2.67" in second and "good  67%" in second and "1 : 1 (p 1.000)" in second
    assert [line.split()[0] for line in rest] == ["prompts", "prompts", "openers", "openers"]


@pytest.mark.parametrize("text", ["1 A0 B3\n2 A4 B4\n", "1 A0\n2 A4 B4\n3 A1 B2\n"])
def test_no_mark_may_be_missing(panel, text):
    with pytest.raises(SystemExit, match=r"prompts \[3\]|does not mark each of A, B once"):
        panel.read_marks(text, KEY)


def test_the_sign_test_by_hand(panel):
    assert panel.sign_test(5, 0) == pytest.approx(2 / 32)
    assert panel.sign_test(0, 3) == pytest.approx(2 / 8)
    assert panel.sign_test(2, 2) == 1.0
    assert panel.sign_test(0, 0) == 1.0


def test_the_sheet_asks_what_nobody_trained_on(panel):
    asked = panel.prompts_to_read(40)
    assert [name for name, _ in asked].count("openers") == 40
    assert len(asked) == 50 + 50 + 63 + 55 + 40
    assert asked == panel.prompts_to_read(40)


def test_a_chat_before_the_prompt_is_held_out_and_another_for_each(panel):
    chats = panel.others(100, 2)
    assert len(set(chats)) == 100
    assert {len(chat) for chat in chats} == {4}
    assert [m.role for m in chats[0]] == ["user", "assistant"] * 2
    trained = {
        one.messages[:2]
        for one in (*corpus.dialogues(), *corpus.basics())
        if split_of(one.id) == "train"
    }
    assert not trained & {chat[:2] for chat in chats}
    assert panel.others(3, 0) == [(), (), ()]
