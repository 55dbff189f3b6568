"""The tokenizer: nothing is lost, nothing is forged, and both implementations agree."""

from functools import cache

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinychat.data import tokenizer_model
from tinychat.data.corpus import stories
from tinychat.runtime.errors import TinychatError
from tinychat.tokenizer import (
    CONTROL_PIECES,
    BytePairEncoder,
    Tokenizer,
    sentences,
    train_sentencepiece,
)


@cache
def shipped() -> Tokenizer:
    return Tokenizer(tokenizer_model())


@cache
def small() -> Tokenizer:
    return Tokenizer(train_sentencepiece((d.text for d in stories()), 600))


@cache
def scratch() -> BytePairEncoder:
    return BytePairEncoder.train(stories()[0].text, 60)


ANY_TEXT = st.text(st.characters(codec="utf-8"))
CONTROL_TEXT = st.lists(
    st.one_of(st.sampled_from([*CONTROL_PIECES, "<0x41>", "▁", "\n\n", " "]), ANY_TEXT)
).map("".join)
AWKWARD = (
    "| |  two  spaces  |▁|a▁ b ▁|\0|a\0b|\n\n\n|\r\n\t|\ufeff|\ufffd|\u2585|\x85\u2028"
    "|😀\U0001f468\u200d\U0001f469\u200d\U0001f467|naïve Ελλάδα 日本語 עברית"
).split("|")


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("make", [shipped, small, scratch])
def test_round_trip_of_awkward_texts(make, text):
    assert make().decode(make().encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
@example("\0▁\n")
def test_any_unicode_round_trips(text):
    assert shipped().decode(shipped().encode(text)) == text
    assert scratch().decode(scratch().encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(CONTROL_TEXT)
def test_a_user_can_not_type_a_control_token(text):
    ids = shipped().encode(text)
    assert shipped().control_ids.isdisjoint(ids)
    assert shipped().decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text())  # with lone surrogates
def test_lone_surrogates_become_the_replacement_character(text):
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert shipped().decode(shipped().encode(text)) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(ANY_TEXT), st.sampled_from([0, 1, 2]))
def test_a_batch_is_its_texts(texts, threads):
    assert shipped().encode_batch(texts, threads) == [shipped().encode(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8191)))
def test_any_ids_decode(ids):
    tokenizer = shipped()
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert tokenizer.decode(ids) == joined.decode("utf-8", errors="replace")


def test_the_control_ids_are_fixed():
    t = shipped()
    ids = (t.pad_id, t.unk_id, t.bos_id, t.end_id, t.system_id, t.user_id, t.assistant_id)
    assert ids == tuple(range(7))
    assert [t.piece(i) for i in ids] == list(CONTROL_PIECES)
    assert t.decode(ids) == "" and all(t.token_bytes(i) == b"" for i in ids)


def test_the_shipped_tokenizer_is_what_the_design_says():
    t = shipped()
    assert t.vocab_size == 8192
    assert t.encode("2026") == [i for digit in "2026" for i in t.encode(digit)]
    assert len(t.encode("\n\n")) == len(t.encode("\n")) == len(t.encode(" the")) == 1
    assert t.piece(t.encode("\n\n")[0]) == "\\n\\n"
    text = "\n".join(story.text for story in stories())
    assert len(text.encode()) / len(t.encode(text)) > 3.6


def test_training_is_deterministic():
    texts = [story.text for story in stories()[:40]]
    assert train_sentencepiece(texts, 500) == train_sentencepiece(texts, 500)


@pytest.mark.parametrize("merges", [1, 40, 150, 300])
def test_from_scratch_learns_what_sentencepiece_learns(merges):
    text = stories()[3].text.replace("\n", " ")
    ours = BytePairEncoder.train(text, merges)
    characters = set(text.replace(" ", "▁")) | set(map(chr, range(33, 127)))
    theirs = Tokenizer(train_sentencepiece([text], 7 + 2 + 256 + len(characters) + merges))
    learned = [theirs.piece(7 + 2 + 256 + i) for i in range(merges)]
    assert [left + right for left, right in ours.merges] == learned
    unseen = "The morning was quiet, and the other boat went home."
    pieces = [theirs.piece(i) for i in theirs.encode(unseen)]
    assert [p if len(p) < 6 or p[0] != "<" else p for p in pieces] == [
        ours.pieces[i] if i > 255 else theirs.piece(theirs.encode(chr(i))[0])
        for i in ours.encode(unseen)
    ]


def test_merges_worked_out_by_hand():
    # Words: low, ▁low, ▁lower, ▁newer twice. Three times: er, lo, ow, we; the alphabet says er.
    # Then lo, and low, three times. Twice are left, of two letters: ew before ne before ▁n.
    encoder = BytePairEncoder.train("low low lower newer newer", 4)
    assert encoder.merges == [("e", "r"), ("l", "o"), ("lo", "w"), ("e", "w")]
    assert [encoder.pieces[i] for i in encoder.encode("lower")] == ["low", "er"]
    assert [encoder.pieces[i] for i in encoder.encode("é")] == ["<0xC3>", "<0xA9>"]


def test_sentences_fit_sentencepiece_and_lose_nothing():
    text = "wörd " * 3000 + "\n\n" + "x" * 9000 + "\nend"
    lines = list(sentences([text]))
    assert max(len(line.encode()) for line in lines) <= 4192
    assert "".join(lines) == text.replace("\n", "")


def test_errors_are_one_sentence(tmp_path):
    with pytest.raises(TinychatError, match="no SentencePiece model"):
        Tokenizer(b"not a model")
    with pytest.raises(TinychatError, match="no SentencePiece model"):
        Tokenizer(b"")
    with pytest.raises(TinychatError, match="can't be read"):
        Tokenizer.from_file(tmp_path / "none.model")
    (tmp_path / "README.md").write_text("# a page")
    with pytest.raises(TinychatError, match=r"README\.md: these 8 bytes are no SentencePiece"):
        Tokenizer.from_file(tmp_path / "README.md")
    with pytest.raises(TinychatError, match="8192 pieces"):
        train_sentencepiece(["too little"], 8192)
    with pytest.raises(TinychatError, match="of 5 pieces"):
        train_sentencepiece(["no room"], 5)
    with pytest.raises(TinychatError, match="token id 8192"):
        shipped().token_bytes(8192)


def test_a_foreign_model_is_refused(tmp_path):
    model = tmp_path / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([d.text.replace("\n", " ") for d in stories()]),
        model_prefix=str(model), vocab_size=300, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(TinychatError, match="lacks the control piece"):
        Tokenizer.from_file(f"{model}.model")
