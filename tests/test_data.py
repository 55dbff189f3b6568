"""The data's way from text to batches: records, split, sources, shards, mix."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.data import corpus, public, tokenizer_model
from tinychat.data.mix import BLOCK, Mix, Phase
from tinychat.data.preferences import prompt_key
from tinychat.data.prepare import Progress, default_sources, prepare
from tinychat.data.probes import probes
from tinychat.data.recipe import shares
from tinychat.data.records import Dialogue, Document, Message
from tinychat.data.sample import tokenizer_texts
from tinychat.data.shards import TokenShard, open_shards, write_shard
from tinychat.data.sources import TABLE
from tinychat.data.split import split_of
from tinychat.runtime.errors import ConfigError, DataError
from tinychat.tokenizer import Tokenizer, train_sentencepiece


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_model())


def one_sentence(error: pytest.ExceptionInfo[BaseException], *names: object) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    for name in names:
        assert str(name) in message


# The embedded corpus and the split


def test_the_embedded_corpus_is_read_whole():
    dialogues, stories, explanations = corpus.dialogues(), corpus.stories(), corpus.explanations()
    folder = Path(corpus.__file__).parent / "corpus"
    for records, *names in (
        (dialogues, "dialogues"),
        (corpus.basics(), "basics", "everyday"),
        (stories, "stories"),
        (explanations, "explanations"),
    ):
        texts = [(folder / f"{name}.jsonl").read_text("utf-8") for name in names]
        assert len(records) == sum(len(text.splitlines()) for text in texts)
        assert len({record.id for record in records}) == len(records)
    assert all(d.messages[-1].role == "assistant" for d in dialogues)
    assert {d.train_on for d in dialogues} == {"all", "last"}
    assert sum(len(d.rejected) for d in dialogues) > 1000
    with pytest.raises(dataclasses.FrozenInstanceError):
        dialogues[0].topic = "another"


def test_the_basics_repeat_themselves_in_other_words_only():
    asked = []
    for one in corpus.basics():
        roles = [message.role for message in one.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), one.id
        assert all(0 < len(message.content.split()) <= 110 for message in one.messages), one.id
        asked.append(tuple(m.content.casefold() for m in one.messages if m.role == "user"))
    assert len(set(asked)) == len(asked), "no question stands there twice"
    kinds = Counter(one.topic for one in corpus.basics())
    assert len(kinds) >= 50 and max(kinds.values()) < 0.1 * len(asked)


def test_basics_of_both_files_are_mixed():
    one_by_one = [one.id.startswith("d15_") for one in corpus.basics()]
    share = sum(one_by_one) / len(one_by_one)
    assert 0.1 < share < 0.5
    parts = [one_by_one[start : start + 5000] for start in range(0, len(one_by_one) - 5000, 5000)]
    assert all(sum(part) / len(part) == pytest.approx(share, abs=0.03) for part in parts)


def test_what_the_basics_hold_out_is_asked_in_words_that_they_do_not_train_on():
    parts: dict[str, set[str]] = {}
    for one in corpus.basics():
        parts.setdefault(prompt_key(one.messages[:1]), set()).add(split_of(one.id))
    assert max(map(len, parts.values())) == 1


def test_the_basics_hold_none_of_the_questions_that_models_are_measured_with():
    reading = Path(__file__).parent / "reading"
    lines = [
        line
        for name in ("prompts.txt", "newcomers.txt", "visitors.txt")
        for line in (reading / name).read_text().splitlines()
    ]
    measured = {prompt_key([Message("user", line)]) for line in lines}
    measured |= {prompt_key([Message("user", probe.prompt)]) for probe in probes()}
    for one in corpus.basics():
        for message in one.messages:
            if message.role == "user":
                assert prompt_key([message]) not in measured, one.id


def test_a_caller_can_not_spoil_the_cached_corpus():
    corpus.stories().clear()
    assert corpus.stories()


def test_the_split_is_fixed_for_all_time():
    # A changed split would leak validation text of old checkpoints into new training.
    ids = [f"record-{i}" for i in range(1000)]
    digest = hashlib.sha256("".join(map(split_of, ids)).encode()).hexdigest()
    assert digest == SPLIT_OF_A_THOUSAND


SPLIT_OF_A_THOUSAND = "15e48103181da27f41c4fd2fefc4e59937ec48c2e335ee97e9ae11dc7a4cbb23"


def test_the_split_is_about_90_5_5_and_ignores_order():
    ids = [f"{i:x}" for i in range(20_000)]
    parts = {id: split_of(id) for id in ids}
    assert parts == {id: split_of(id) for id in reversed(ids)}
    counts = Counter(parts.values())
    assert abs(counts["train"] / len(ids) - 0.9) < 0.01
    assert abs(counts["validation"] / len(ids) - 0.05) < 0.005
    assert abs(counts["test"] / len(ids) - 0.05) < 0.005


# Sources and files


def pack(path: Path, records: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with one source of documents and one of dialogues."""
    folder = tmp_path / "data"
    pack(
        folder / "public/pretrain/tinystories_sample.jsonl.zst",
        [{"text": f"Story {i}. {'Oh! ' * i}The fox ran home."} for i in range(1, 60)],
    )
    pack(
        folder / "public/sft/dolly_6k.jsonl.zst",
        [
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": f"A number after {i - 1}."},
                ],
                "source": "dolly15k",
            }
            for i in range(200)
        ],
    )
    return folder


def test_unfilled_templates_are_left_out(tmp_path):
    def talk(*turns: str) -> dict:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
        return {"messages": messages, "source": "spc"}

    names = ("Hi, I'm [user 1's name].", "Nice to meet you, (name)!", "I live in (a small town).")
    kept = [talk("Hi (again)!", "Hello (I was away). What is your name?")]
    talks = [talk(text, "Hello.") for text in names] + [talk("Hi", text) for text in names]
    for source, expected in (("synthetic_persona_chat", 1), ("dolly_6k", 7)):
        pack(tmp_path / f"public/sft/{source}.jsonl.zst", kept + talks)
        assert len(list(public.read_dialogues(source, tmp_path / "public"))) == expected


def test_the_table_is_sound():
    names = [source.name for source in TABLE]
    assert len(set(names)) == len(names) == 33
    for source in TABLE:
        assert source.file == f"{source.kind}/{source.name}.jsonl.zst"
        assert len(source.sha256) == 64 and source.licence and source.attribution
    assert {s.kind for s in public.sources("sft")} == {"sft"}
    with pytest.raises(DataError) as error:
        public.source("tinystory")
    one_sentence(error, "'tinystory'", "tinystories_sample")


def test_readers_yield_records_with_ids_from_their_text(data):
    documents = list(public.read_documents("tinystories_sample", data))
    dialogues = list(public.read_dialogues("dolly_6k", data / "public"))
    assert isinstance(documents[0], Document) and isinstance(dialogues[0], Dialogue)
    path = data / "public/pretrain/tinystories_sample.jsonl.zst"
    pack(path, [{"text": d.text} for d in reversed(documents)])
    again = list(public.read_documents("tinystories_sample", data))
    assert {d.id: d.text for d in again} == {d.id: d.text for d in documents}
    assert dialogues[0].source == "dolly_6k" and dialogues[0].messages[0].role == "user"


def test_parts_of_one_article_share_an_id(tmp_path):
    title = "Congress\n\nA formal meeting"
    more = "Congress (continued)\n\nLater parts"
    pack(tmp_path / "pretrain/wikipedia_en_selected.jsonl.zst", [{"text": title}])
    pack(tmp_path / "pretrain/wikipedia_en_more.jsonl.zst", [{"text": more}])
    ids = {
        document.id
        for name in ("wikipedia_en_selected", "wikipedia_en_more")
        for document in public.read_documents(name, tmp_path)
    }
    assert len(ids) == 1


def test_verify_names_what_is_missing_and_what_changed(data):
    rows = {row.source.name: row for row in public.verify(data / "public")}
    assert len(rows) == len(TABLE)
    assert rows["dolly_6k"].state == "changed" and rows["dolly_6k"].bytes > 0
    assert rows["sgd"].state == "missing"


def test_verify_accepts_the_right_file(data, monkeypatch):
    path = data / "public/sft/dolly_6k.jsonl.zst"
    right = dataclasses.replace(
        public.source("dolly_6k"), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setattr(public, "TABLE", (right,))
    assert [row.state for row in public.verify(data)] == ["ok"]


def test_the_data_folder(data, monkeypatch, tmp_path):
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    assert public.data_folder() is None
    assert public.data_folder(data) == public.data_folder(data / "public") == data / "public"
    monkeypatch.setenv("TINYCHAT_DATA", str(data))
    assert public.data_folder() == data / "public"
    with pytest.raises(DataError) as error:
        public.data_folder(tmp_path / "nowhere")
    one_sentence(error, tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError) as error:
        public.data_folder(tmp_path / "bare")
    one_sentence(error, "expected files", tmp_path / "bare")
    with pytest.raises(DataError) as error:
        list(public.read_documents("classic_fiction", data))
    one_sentence(error, "classic_fiction.jsonl.zst")
    with pytest.raises(DataError) as error:
        list(public.read_documents("classic_fiction"))
    one_sentence(error, "--data")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("own.txt", b"", "is empty"),
        ("own.txt", b" \n \n", "holds no text"),
        ("own.txt", b"caf\xe9", "not UTF-8"),
        ("own.jsonl", b"", "is empty"),
        ("own.jsonl", b"\n", "no records"),
        ("own.jsonl", b'{"text": "one"}\n{"text": \n', "own.jsonl:2 is not a JSON object"),
        ("own.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "own.jsonl:2 is not UTF-8"),
        ("own.jsonl", b'["text"]\n', "own.jsonl:1 holds list"),
        ("own.jsonl", b'{"text": 3}\n', 'a text in the field "text"'),
        ("own.jsonl", b"[" * 100_000, "own.jsonl:1 is not a JSON object"),
        ("own.jsonl.zst", b"no zstd at all", "not a readable zstd file"),
        ("own.jsonl.zst", zstandard.compress(b'{"text": "one"}'), ""),
        ("own.pdf", b"%PDF", "needs a name that ends in"),
    ],
)
def test_a_bad_file_gives_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    if not words:  # a last line without its line break is a whole line
        assert [d.text for d in public.read_documents(str(path))] == ["one"]
        return
    with pytest.raises(DataError) as error:
        list(public.read_documents(str(path)))
    one_sentence(error, words, path)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "role of system, user, assistant"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "role of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, '"content"'),
        ({"messages": [{"role": "user", "content": "hi"}], "train_on": "some"}, "'some'"),
        ({"messages": [{"role": "user", "content": "hi"}], "rejected": "no"}, "rejected"),
        ({"messages": [{"role": "user", "content": "hi"}] * 2}, "take turns"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "beginning with the user"),
    ],
)
def test_a_bad_dialogue_gives_one_sentence(tmp_path, record, words):
    path = pack(tmp_path / "own.jsonl", [record])
    with pytest.raises(DataError) as error:
        list(public.read_dialogues(str(path)))
    one_sentence(error, f"{path}:1", words)


def test_a_truncated_or_flipped_zst_is_noticed(tmp_path):
    records = [{"text": f"{i} {hashlib.sha256(str(i).encode()).hexdigest()}"} for i in range(3000)]
    path = pack(tmp_path / "own.jsonl.zst", records)
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError) as error:
            list(public.read_documents(str(path)))
        one_sentence(error, path)


def test_missing_zstandard_gives_advice(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError) as error:
        list(public.read_documents("tinystories_sample", data))
    one_sentence(error, "pip install zstandard")


def test_an_own_text_is_cut_between_paragraphs(tmp_path):
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 100 for i in range(50))
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    documents = list(public.read_documents(str(path)))
    assert len(documents) > 1 and all(len(d.text) < 9000 for d in documents)
    assert "\n\n".join(d.text for d in documents) == text.strip()


# Shards


def shard(path: Path, tokens: int = 1000, source: str = "source", documents: int = 5) -> TokenShard:
    lists = np.array_split(np.arange(tokens) % 8192, documents)
    return write_shard(path, lists, tokenizer_sha256="t" * 64, source=source, split="train")


def test_a_shard_holds_what_was_written(tmp_path):
    made = write_shard(
        tmp_path / "a.txt.train",
        iter([[1, 2, 3], [], [65535]]),
        tokenizer_sha256="t" * 64,
        source="a.txt",
        split="train",
    )
    assert made.array.tolist() == [1, 2, 3, 65535] and made.array.dtype == np.uint16
    again = TokenShard.open(tmp_path / "a.txt.train", "t" * 64)
    assert again == made and (again.tokens, again.documents) == (4, 3)
    assert TokenShard.open(tmp_path / "a.txt.train.json") == made
    with pytest.raises(ValueError, match="read-only"):
        again.array[0] = 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt.train.bin", "a.txt.train.json"]
    assert open_shards(tmp_path) == {"a.txt": made}


def test_a_shard_notices_damage(tmp_path):
    shard(tmp_path / "s")
    with pytest.raises(DataError) as error:
        TokenShard.open(tmp_path / "s", "u" * 64)
    one_sentence(error, "tokenizer", "t" * 12, "u" * 12)
    data = (tmp_path / "s.bin").read_bytes()
    (tmp_path / "s.bin").write_bytes(data[:-2])
    with pytest.raises(DataError) as error:
        TokenShard.open(tmp_path / "s")
    one_sentence(error, "1998 bytes")
    (tmp_path / "s.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError) as error:
        TokenShard.open(tmp_path / "s")
    one_sentence(error, "has changed")
    (tmp_path / "s.bin").unlink()
    with pytest.raises(DataError) as error:
        TokenShard.open(tmp_path / "s")
    one_sentence(error, "can't be read")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not JSON"),
        ("[]", "lacks one of"),
        ('{"format": 1}', "lacks one of"),
        ({"format": 9}, "format 9"),
        ({"tokens": 0}, "0 tokens"),
        ({"tokens": "many"}, "lacks one of"),
    ],
)
def test_a_shard_notices_a_bad_index(tmp_path, index, words):
    shard(tmp_path / "s")
    path = tmp_path / "s.json"
    if isinstance(index, dict):
        index = json.dumps(json.loads(path.read_text()) | index)
    path.write_text(index)
    with pytest.raises(DataError) as error:
        TokenShard.open(tmp_path / "s")
    one_sentence(error, words)


@pytest.mark.parametrize("lists", [[], [[]], [[1], [65536]], [[-1]]])
def test_a_failed_write_leaves_nothing(tmp_path, lists):
    with pytest.raises(DataError):
        write_shard(tmp_path / "s", lists, tokenizer_sha256="t", source="s", split="train")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="there is no shard"):
        TokenShard.open(tmp_path / "s")
    with pytest.raises(DataError, match="holds no train shards"):
        open_shards(tmp_path)


# Preparation


def test_prepare_builds_only_what_is_missing(data, tmp_path):
    calls: list[Progress] = []
    out = tmp_path / "out"
    names = ["tinystories_sample", "dolly_6k", "stories"]
    shards = prepare(data, out, tokenizer(), names, threads=1, progress=calls.append)
    assert list(shards["train"]) == names
    assert [c.source for c in calls if c.done] == names
    assert all(c.tokens == shards["train"][c.source].tokens for c in calls if c.done)
    stamp = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "stories.train.json").unlink()
    again = prepare(data, out, tokenizer(), names, threads=1)
    assert again["train"] == shards["train"]
    changed = {p.name for p in out.iterdir() if p.stat().st_mtime_ns != stamp[p]}
    assert changed == {"stories.train.bin", "stories.train.json"}


def test_prepared_tokens_are_the_documents_of_the_split(data, tmp_path):
    t = tokenizer()
    names = ["tinystories_sample", "dolly_6k"]
    shards = prepare(data, tmp_path, t, names, threads=2)
    for split in ("train", "validation"):
        expected = []
        for document in public.read_documents("tinystories_sample", data):
            if split_of(document.id) == split:
                expected += [t.bos_id, *t.encode(document.text)]
        assert shards[split]["tinystories_sample"].array.tolist() == expected
    first = next(d for d in public.read_dialogues("dolly_6k", data) if split_of(d.id) == "train")
    user, assistant = (t.encode(message.content) for message in first.messages)
    rendered = [t.bos_id, t.user_id, *user, t.end_id, t.assistant_id, *assistant, t.end_id]
    assert shards["train"]["dolly_6k"].array[: len(rendered)].tolist() == rendered


def test_prepare_limits_validation_and_takes_a_renderer(data, tmp_path):
    shards = prepare(
        data,
        tmp_path,
        tokenizer(),
        ["tinystories_sample", "dolly_6k"],
        render=lambda dialogue, t: t.encode(dialogue.messages[0].content),
        validation_tokens=20,
    )
    assert 20 <= shards["validation"]["tinystories_sample"].tokens < 150
    text = tokenizer().decode(shards["train"]["dolly_6k"].array.tolist())
    assert text.startswith("What is ") and "A number" not in text


def test_prepare_without_a_folder_takes_the_embedded_corpus(tmp_path, monkeypatch):
    monkeypatch.delenv("TINYCHAT_DATA", raising=False)
    assert default_sources(None) == ["stories", "explanations", "dialogues", "basics"]
    shards = prepare(None, tmp_path, tokenizer(), threads=1)
    assert set(shards["train"]) == set(shards["validation"]) == set(default_sources(None))


def test_prepare_takes_own_files(tmp_path):
    text = tmp_path / "diary.txt"
    text.write_text("One short note.", encoding="utf-8")
    chat = pack(
        tmp_path / "chats.jsonl",
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}],
    )
    shards = prepare(None, tmp_path / "out", tokenizer(), [str(text), str(chat)])
    assert set(shards["train"]) == {"diary.txt", "chats.jsonl"}
    assert tokenizer().decode(shards["train"]["diary.txt"].array.tolist()) == "One short note."
    assert shards["train"]["chats.jsonl"].array[-1] == tokenizer().end_id


def test_a_run_from_a_model_reads_less_of_what_that_model_has_read(tmp_path):
    from tinychat.cli.runs import make_mix

    train = {
        name: shard(tmp_path / name, tokens=tokens, source=name)
        for name, tokens in (("dialogues", 4_000), ("classic_fiction", 400_000))
    }
    fresh = make_mix(train, 32, 0, 6_000).passes()
    again = make_mix(train, 32, 0, 6_000, {"dialogues": 17 * 4_000}).passes()
    # 192,000 tokens: dialogues reach their limit of 16 passes, or the one that is always left.
    # (A pass is 125 windows, and each of the two parts of a run rounds to whole ones.)
    assert fresh["dialogues"] == pytest.approx(16, abs=0.05)
    assert again["dialogues"] == pytest.approx(1, abs=0.05)
    assert again["classic_fiction"] > fresh["classic_fiction"]


def test_a_mix_goes_on_behind_what_was_read(tmp_path):
    train = {name: shard(tmp_path / name, tokens=4_000, source=name) for name in ("a", "b")}
    numbers = {"sequence": 32, "seed": 0, "total": 60}  # of 125 windows each
    phases = [Phase(1.0, {"a": 1.0, "b": 2.0})]
    first = Mix(train, phases, **numbers)
    read = {name: count * 32 for name, count in first.counts().items()}
    second = Mix(train, phases, **numbers, read=read)
    assert second.counts() == first.counts() == {"a": 20, "b": 40}
    places = [{mix.place(i) for i in range(60)} for mix in (first, second)]
    assert places[0] == {("a", k) for k in range(20)} | {("b", k) for k in range(40)}
    assert places[1] == {("a", k) for k in range(20, 40)} | {("b", k) for k in range(40, 80)}
    windows = [{mix.sequence_at(i).tobytes() for i in range(60)} for mix in (first, second)]
    assert len(windows[0]) == len(windows[1]) == 60 and not windows[0] & windows[1]


def test_prepare_refuses_another_tokenizer_and_keeps_the_shards(data, tmp_path):
    prepare(data, tmp_path, tokenizer(), ["stories"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    other = Tokenizer(train_sentencepiece((d.text for d in corpus.stories()), 500))
    with pytest.raises(DataError) as error:
        prepare(data, tmp_path, other, ["stories"])
    one_sentence(error, "tokenizer")
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("names", [["nonsense"], ["stories", "none.txt"], ["stories", "stories"]])
def test_prepare_refuses_bad_sources_before_it_writes(data, tmp_path, names):
    with pytest.raises(DataError) as error:
        prepare(data, tmp_path / "out", tokenizer(), names)
    one_sentence(error)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_sample_keeps_validation_text_out():
    sample = set(tokenizer_texts(None))
    held_out = [d for d in corpus.stories() if split_of(d.id) != "train"]
    assert sample and held_out and not any(d.text in sample for d in held_out)


def test_importing_the_data_package_is_light():
    code = (
        "import sys, tinychat.data.prepare, tinychat.data.mix, tinychat.data.public;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'zstandard', 'sentencepiece')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The mix


@cache
def mixed() -> dict[str, TokenShard]:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    sizes = {"long": 20_000, "middle": 3_001, "short": 500}
    return {
        name: shard(folder / name, size, source=name, documents=3) for name, size in sizes.items()
    }


def mix(weights=None, total: int = 2000, seed: int = 3, sequence: int = 16, final=None) -> Mix:
    weights = weights or {"long": 0.6, "middle": 0.3, "short": 0.1}
    phases = [Phase(0.7, weights), Phase(1.0, final or {"short": 1, "long": 1})]
    return Mix(mixed(), phases, sequence=sequence, seed=seed, total=total)


def test_a_sequence_is_a_window_of_its_source():
    m = mix()
    for i in (0, 1, 700, 1999):
        window = m.sequence_at(i)
        tokens = m.shards[m.place(i)[0]].array
        assert window.dtype == np.int64 and window.shape == (17,)
        ring = [np.take(tokens, range(s, s + 17), mode="wrap") for s in range(len(tokens))]
        assert any((candidate == window).all() for candidate in ring)


def test_batches_shift_by_one_and_all_count():
    (batch,) = mix().batches(3, 8, 1)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == batch.mask_BT.shape == (8, 16)
    assert (batch.inputs_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
    assert batch.mask_BT.all() and batch.mask_BT.dtype == batch.inputs_BT.dtype == np.int64
    assert (batch.inputs_BT[0] == mix().sequence_at(24)[:-1]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 240), i=st.integers(0, 1999))
def test_resume_at_any_step_equals_the_unbroken_run(seed, step, i):
    whole = [b.inputs_BT for b in mix(seed=seed).batches(step, 8, 6)]
    resumed = mix(seed=seed)
    resumed.sequence_at(i)  # what was asked before changes nothing
    parts = [b.inputs_BT for n in range(6) for b in resumed.batches(step + n, 8, 1)]
    assert len(whole) == min(6, 250 - step) and np.array_equal(whole, parts)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_a_step_exactly(world):
    (whole,) = mix().batches(100, 8, 1)
    parts = [next(mix().batches(100, 8, 1, rank, world)).inputs_BT for rank in range(world)]
    assert np.array_equal(np.stack(parts, axis=1).reshape(8, 16), whole.inputs_BT)


def test_another_seed_is_another_order():
    assert [mix(seed=1).place(i) for i in range(99)] != [mix(seed=2).place(i) for i in range(99)]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1), min_size=3, max_size=3),
    final=st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0),
    total=st.integers(1, 3000),
)
def test_every_source_gives_its_sequences_one_after_the_other(weights, final, total):
    names = list(mixed())
    m = mix(
        dict(zip(names, weights, strict=True)), total, final=dict(zip(names, final, strict=True))
    )
    numbers: dict[str, list[int]] = {name: [] for name in names}
    for i in range(total):
        source, k = m.place(i)
        numbers[source].append(k)
    assert {name: len(ks) for name, ks in numbers.items()} == m.counts()
    for ks in numbers.values():  # none is left out, none comes twice, none far from its turn
        assert sorted(ks) == list(range(len(ks)))
        assert all(abs(k - place) <= BLOCK for place, k in enumerate(ks))


def test_weights_hold_within_one_percent_in_every_part_of_the_run():
    m = mix({"long": 6, "middle": 3, "short": 1}, total=20_000)
    for start in range(0, 14_000, 2000):
        counts = Counter(m.place(i)[0] for i in range(start, start + 2000))
        assert abs(counts["long"] / 2000 - 0.6) < 0.01
        assert abs(counts["middle"] / 2000 - 0.3) < 0.01
        assert abs(counts["short"] / 2000 - 0.1) < 0.01
    final = Counter(m.place(i)[0] for i in range(14_000, 20_000))
    assert final == {"short": 3000, "long": 3000}


def test_an_epoch_reads_every_window_once_and_no_two_epochs_alike():
    size = mixed()["middle"].tokens
    windows = size // 16
    m = Mix(mixed(), [Phase(1.0, {"middle": 1})], sequence=16, seed=1, total=3 * windows)
    ring = np.arange(size) % 8192
    place = {tuple(np.take(ring, range(s, s + 17), mode="wrap")): s for s in range(size)}
    by_epoch: dict[int, list[int]] = {}
    for i in range(3 * windows):
        k = m.place(i)[1]
        by_epoch.setdefault(k // windows, []).append(place[tuple(m.sequence_at(i).tolist())])
    assert len({tuple(starts) for starts in by_epoch.values()}) == 3
    for starts in by_epoch.values():
        ordered = np.sort([(s - starts[0]) % size for s in starts])
        assert len(ordered) == windows and ordered[0] == 0
        gaps = np.diff(np.append(ordered, size))
        # Windows touch but never overlap; one gap holds what doesn't fill a window.
        assert (gaps >= 16).all() and sorted(gaps)[-2] == 16


def test_a_source_shorter_than_a_window_still_works():
    m = Mix(mixed(), [Phase(1.0, {"short": 1})], sequence=800, seed=1, total=5)
    window = m.sequence_at(4)
    assert len(window) == 801 and (window[:301] == window[500:]).all()


def test_the_length_may_change_without_another_share():
    assert mix(sequence=8).counts() == mix(sequence=64).counts()


def test_the_recipe_feeds_a_mix():
    available = {"stories": 500, "classic_fiction": 20_000, "mine.txt": 300}
    for final in (False, True):
        weights = shares(available, 50_000, final=final)
        assert abs(sum(weights.values()) - 1) < 1e-9 and weights["mine.txt"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": {"long": 1, "longer": 1}}, "longer"),
        ({"weights": {"long": -1}}, "-1"),
        ({"weights": {"long": float("nan")}}, "nan"),
        ({"weights": {"long": 0}}, "all zero"),
        ({"total": 0}, "at least one sequence"),
        ({"sequence": 0}, "at least one sequence"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_mix_that_can_not_work_says_why(arguments, words):
    with pytest.raises((ConfigError, DataError)) as error:
        mix(**arguments)
    one_sentence(error, words)


def test_phases_and_processes_that_can_not_work():
    with pytest.raises(ConfigError, match="until 1.0"):
        Mix(mixed(), [Phase(0.5, {"long": 1})], sequence=4, seed=1, total=10)
    with pytest.raises(ConfigError, match="0.2"):
        phases = [Phase(0.5, {"long": 1}), Phase(0.2, {"long": 1}), Phase(1.0, {"long": 1})]
        Mix(mixed(), phases, sequence=4, seed=1, total=10)
    with pytest.raises(ConfigError, match="shared by 3"):
        next(mix().batches(0, 8, 1, 0, 3))
    with pytest.raises(ConfigError, match="no sequence 2000"):
        mix().sequence_at(2000)


def test_the_mix_is_fast_enough():
    m = mix(sequence=512, total=4000)
    start = time.process_time()
    tokens = sum(batch.inputs_BT.size for batch in m.batches(0, 16, 100))
    assert tokens / (time.process_time() - start) > 500_000
