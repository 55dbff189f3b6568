"""`tinychat export`: transformers reads the folder, and comes to the same tokens and scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tinychat.cli.app import app
from tinychat.data import tokenizer_model
from tinychat.data.records import Message
from tinychat.dialogue import render_prompt
from tinychat.generation import Sampling, generate, stop_ids
from tinychat.gpt import GPT, GPTConfig, load_model, save_model
from tinychat.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

OURS = Tokenizer(tokenizer_model())
TRICKY = (
    "", " ", "  ", "a", " a", "a ", "   three   spaces   ", "\n", "\n\n", "\n\n\n", "\n\n\n\n\n",
    "a\n\n b\n c\n\n\nd \n", "\t\r\n\x00\x7f", "12345 3.14 2026-11-21 x2", "don't can't I'LL",
    "The quick brown fox jumps over the lazy dog.", "ünïcödé Straße São", "naïve\u0301 e\u0301",
    "日本語 中文 한국어", "👩‍👩‍👧‍👦 👍🏽 🇪🇺", "▁", "a▁b ▁ ▁▁", "<0x41> <0xE2>", "<|end|>",
    "<|user|>hi<|end|><|assistant|>", "<|bos|> <|unk|><|pad|>", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "------------------", "hahahahahahaha", "          indent", "\u00a0nbsp\u200b\ufeff",
    "\U0010ffff",
    "if (x >= 10) { return y[0]; }", "https://example.org/?q=1&r=2#top", "A" * 3000,
)  # fmt: skip


def write(path: Path, stage: str) -> Path:
    torch.manual_seed(1)
    shape = GPTConfig(
        width=48, layers=3, heads=4, kv_heads=2, head_width=16, hidden=64, context=128,
        rope_theta=5000.0, norm_eps=1e-5,
    )  # fmt: skip
    model = GPT(shape)
    with torch.no_grad():  # fresh blocks change nothing; these do
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight) * weight.shape[-1] ** -0.5
    source = {"licence": "CC0-1.0", "passes": 1.5, "tokens": 7, "attribution": "somebody"}
    save_model(
        path, model, stage=stage, tokenizer=OURS, lineage={"data": {"stories": source}},
        metrics={"bits_per_byte": {"stories": 1.234}},
    )  # fmt: skip
    return path


def run(*words: object):
    return CliRunner().invoke(app, ["export", *map(str, words)], env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for stage in ("base", "sft"):
        result = run(write(folder / f"{stage}.safetensors", stage), folder / stage)
        assert result.exit_code == 0, result.output
        assert "from_pretrained" in result.output
    return folder


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoTokenizer.from_pretrained(exported / "sft")


def test_the_scores_are_equal(exported):
    ours, _, _ = load_model(exported / "sft.safetensors")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported / "sft", output_loading_info=True
    )
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(weight.numel() for weight in model.parameters()) == ours.config.parameters
    ids = torch.randint(0, 8192, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(ids), model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3, "logits near zero would prove little"


def test_greedy_replies_are_equal(exported, theirs):
    ours, pieces, _ = load_model(exported / "sft.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "sft")
    settings = model.generation_config
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.5, 0.95, 200)
    assert set(settings.eos_token_id) == stop_ids(pieces) - {pieces.pad_id}
    chat = [{"role": "user", "content": "why is the sky blue?"}]
    inputs = theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        said = model.generate(
            **inputs, do_sample=False, max_new_tokens=20, temperature=None, top_p=None
        )
    greedy = Sampling(temperature=0, max_tokens=20)
    wanted = list(generate(ours, ids, greedy, stop=stop_ids(pieces)))
    assert len(wanted) > 3 and said[0, len(ids) :].tolist()[: len(wanted)] == wanted


@pytest.mark.parametrize("text", TRICKY, ids=repr)
def test_the_tokens_are_equal(theirs, text):
    expected = OURS.encode(text)
    given = {"add_special_tokens": False, "split_special_tokens": True}
    assert theirs(text, **given).input_ids == expected
    assert theirs.decode(expected, clean_up_tokenization_spaces=False) == text
    assert theirs(text, split_special_tokens=True).input_ids == [OURS.bos_id, *expected]


# Half a surrogate pair is no text to `tokenizers`, which refuses it; ours reads it as U+FFFD.
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(st.sampled_from("aeht n\n▁.1é日-<|>"), st.characters(codec="utf-8"))
    )
)
def test_the_tokens_of_any_text_are_equal(theirs, text):
    given = {"add_special_tokens": False, "split_special_tokens": True}
    assert theirs(text, **given).input_ids == OURS.encode(text)


def test_the_tokens_of_the_corpus_are_equal(theirs):
    from tinychat.data import corpus

    texts = [story.text for story in list(corpus.stories())[:20]]
    found = theirs(texts, add_special_tokens=False).input_ids
    assert found == OURS.encode_batch(texts)
    assert sum(map(len, found)) > 1000


def test_the_chat_template_is_ours(exported, theirs):
    chat = [
        Message("system", "Be brief."), Message("user", "hi\n\nyou"),
        Message("assistant", " Hello! "), Message("user", "2 + 2?"),
    ]  # fmt: skip
    messages = [{"role": m.role, "content": m.content} for m in chat]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert found["input_ids"] == render_prompt(chat, OURS, context=128, reserve=0)
    with pytest.raises(Exception, match="Roles are system, user and assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])
    base = transformers.AutoTokenizer.from_pretrained(exported / "base")
    assert base.chat_template is None  # it was never shown a chat


def test_a_tokenizer_of_ones_own(tmp_path):
    from tinychat.cli.huggingface import fast_tokenizer
    from tinychat.tokenizer import train_sentencepiece

    own = Tokenizer(train_sentencepiece(["The cat sat. It was 12 o'clock!\n\n"] * 40, 380))
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast_tokenizer(own)), encoding="utf-8")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TRICKY:
        given = {"add_special_tokens": False, "split_special_tokens": True}
        assert fast(text, **given).input_ids == own.encode(text), text


def test_the_card_tells_what_it_is(exported):
    card = (exported / "sft" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("stage `sft`", "apply_chat_template", "| stories | 1.234 |", "somebody"):
        assert part in card
    code = card.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=exported, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gone", "new"], "No checkpoint 'gone'"),
        (["reward.safetensors", "new"], "is a reward model, which gives marks and can't write"),
        (["sft.safetensors", "used"], "used exists already and is not empty; name a new folder"),
        (["sft.safetensors", "sft.safetensors"], "sft.safetensors exists already"),
        (["sft.safetensors", "new", "--format", "gguf"], "There is no format 'gguf'. Known: hf."),
        (["sft.safetensors", "new", "--format", "hff"], "Did you mean hf?"),
        (["broken.safetensors", "new"], "broken.safetensors"),
        (["sft.safetensors"], "Missing argument 'DIR'"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    for stage in ("sft", "reward"):
        write(tmp_path / f"{stage}.safetensors", stage)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = run(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert sentence in " ".join(result.output.replace("│", " ").split())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "sft.safetensors", "sft")
    (tmp_path / "empty").mkdir()
    assert run(path, tmp_path / "empty").exit_code == 0
    assert (tmp_path / "empty" / "config.json").is_file()

    def full(pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinychat.cli.huggingface.fast_tokenizer", full)
    result = run(path, tmp_path / "new")
    assert result.exit_code == 2 and "No space left" in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "sft.safetensors"]
