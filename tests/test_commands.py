"""The slash commands, through the whole loop, with a fake model."""

import base64
import json
import re
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
from fakes import ByteTokenizer, ScriptedGPT, UniformGPT

from tinychat.cli import session as session_module
from tinychat.cli.commands import Commands, completions
from tinychat.cli.console import Screen
from tinychat.cli.export import Talk, export
from tinychat.cli.loop import Chat
from tinychat.cli.session import ChatSession, first_kept
from tinychat.data.records import Message
from tinychat.generation import Sampling
from tinychat.runtime.checkpoint import CheckpointInfo
from tinychat.runtime.errors import ConfigError

GREEDY = Sampling(temperature=0, max_tokens=40)


class Lines:
    """A reader of given lines, then the end of the input; `prefills` is what stood on each."""

    unsent = ""

    def __init__(self, *lines, interactive=True):
        self.lines, self.interactive, self.prefills = list(lines), interactive, []

    def read(self, default=""):
        self.prefills.append(default)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


class Ready:
    """A model that is loaded already."""

    running, error = False, None
    info = CheckpointInfo(
        path=Path("rlhf.safetensors"), stage="rlhf", config={}, lineage={}, metrics={},
        tokenizer_sha256="0", parameters=13_900_000, bytes=1, dtype="int8", format=1,
        chat_template="tinychat-1",
    )  # fmt: skip

    def __init__(self, session):
        self._session = session

    def start(self):
        pass

    def session(self):
        return self._session


def session(model, sampling=GREEDY, **keywords) -> ChatSession:
    return ChatSession(model, ByteTokenizer(), sampling, model.config.context, **keywords)


def chat(model, *lines, sampling=GREEDY, interactive=True) -> Chat:
    reader = Lines(*lines, interactive=interactive)
    screen = Screen(interactive, render="plain")
    return Chat(Ready(session(model, sampling)), reader, screen)


def transcript(capsys, replies, *lines, **keywords) -> str:
    chat(ScriptedGPT(replies), *lines, **keywords).run()
    return capsys.readouterr().out


def said(text: str) -> str:
    return " ".join(text.split())


def turns(talk: ChatSession) -> list[str]:
    return [message.content for message in talk.messages]


# Talking


def test_before_the_first_turn_every_command_says_what_is_missing(capsys):
    out = transcript(
        capsys, ["x"],
        "/retry", "/edit", "/undo", "/continue", "/stats", "/save tea", "/export a.md", "/copy",
        "/compare", "/tokens",
    )  # fmt: skip
    assert "nothing to answer again yet" in out
    assert "no message to edit yet" in out
    assert "(nothing to undo)" in out
    assert "no reply to go on with yet" in out
    assert "no reply to measure yet" in out
    assert "nothing to save yet" in out
    assert "nothing to export yet" in out
    assert "no reply to copy yet" in out
    assert "no message to compare replies to yet" in out
    assert "nothing to look into yet" in out


def test_retry_draws_another_reply_and_keeps_one(capsys):
    talk = chat(UniformGPT(), "hi", "/retry", sampling=Sampling(seed=3, max_tokens=8))
    first: list[str] = []
    talk.on_turn = lambda: first.append(talk.session.messages[-1].content)
    talk.run()
    assert len(first) == 2 and first[0] != first[1]
    assert turns(talk.session) == ["hi", first[1]]


def test_retry_at_temperature_0_says_that_it_is_the_same(capsys):
    out = transcript(capsys, ["One."], "hi", "/retry")
    assert "temperature is 0, so the reply will be the same" in out and out.count("One.") == 2


def test_edit_puts_the_last_message_on_the_prompt_line(capsys):
    talk = chat(ScriptedGPT(["One.", "Two."]), "hi", "helo", "/edit", "hello")
    talk.run()
    assert talk.reader.prefills == ["", "", "", "helo", ""]
    assert turns(talk.session) == ["hi", "One.", "hello", "Two."]


def test_edit_without_a_prompt_changes_nothing(capsys):
    talk = chat(ScriptedGPT(["One."]), "hi", "/edit", interactive=False)
    talk.run()
    assert turns(talk.session) == ["hi", "One."]
    assert "no prompt to edit" in capsys.readouterr().err


def test_undo_clear_and_system(capsys):
    talk = chat(
        ScriptedGPT(["One.", "Two."]),
        "/system be kind", "hi", "you", "/undo", "/clear", "/undo", "/system", "/system off",
    )  # fmt: skip
    talk.run()
    out = capsys.readouterr().out
    assert "(forgotten: you)" in out and "(a new conversation)" in out
    assert out.count("(system message: be kind)") == 2 and "(no system message)" in out
    assert talk.session.messages == [] and talk.session.system is None


def test_continue_goes_on_where_the_reply_was_cut(capsys):
    talk = chat(
        ScriptedGPT(["abcdefghij"]), "hi", "/continue", "/stats", "/continue", "and?",
        sampling=Sampling(temperature=0, max_tokens=4),
    )  # fmt: skip
    talk.reader.lines.insert(4, "/continue")
    talk.run()
    out = capsys.readouterr().out
    assert out.count("(the model has nothing to add)") == 1
    assert out.index("abcd") < out.index("efgh") < out.index("ij")
    assert turns(talk.session)[:2] == ["hi", "abcdefghij"]
    # <|bos|> <|user|> h i <|end|> <|assistant|> a b c d, all but the last read before
    assert re.search(r"prompt +10 tokens, 9 of them remembered", out)


def test_continue_in_the_middle_of_a_character():
    talk = session(ScriptedGPT(["ab€!"]), Sampling(temperature=0, max_tokens=4))
    assert "".join(talk.reply("hi")) == "ab"
    assert "".join(talk.go_on()) == "€!"
    assert turns(talk) == ["hi", "ab€!"]
    prompt, reply = talk.last_tokens
    assert ByteTokenizer().decode(reply) == "ab€!" and reply[-1] == ByteTokenizer.end_id
    assert prompt[-1] == ByteTokenizer.assistant_id


def test_continue_a_reply_that_came_as_text():
    talk = session(ScriptedGPT(["abcdef"]))
    talk.messages = [Message("user", "hi"), Message("assistant", "abc")]
    assert "".join(talk.go_on()) == "def"
    assert turns(talk) == ["hi", "abcdef"]


def test_continue_interrupted_or_empty_loses_nothing():
    talk = session(ScriptedGPT(["abcdef"]), Sampling(temperature=0, max_tokens=2))
    list(talk.reply("hi"))
    with closing(talk.go_on()) as pieces:
        assert next(pieces) == "c"
    assert turns(talk) == ["hi", "abc"]
    list(talk.go_on()), list(talk.go_on())
    assert turns(talk) == ["hi", "abcdef"]
    assert list(talk.go_on()) == []
    assert turns(talk) == ["hi", "abcdef"]


def test_continue_a_reply_that_fills_the_context():
    talk = session(ScriptedGPT(["x" * 500], context=64), Sampling(temperature=0, max_tokens=500))
    with pytest.raises(ConfigError, match="it cannot go on"):
        talk.messages = [Message("user", "hi"), Message("assistant", "x" * 60)]
        list(talk.go_on())
    assert turns(talk) == ["hi", "x" * 60]


# Settings


def test_set_changes_every_live_setting(capsys):
    values = {
        "temperature": ("0.5", 0.5), "top_k": ("7", 7), "top-p": ("0.5", 0.5),
        "min_p": ("0.1", 0.1), "repetition_penalty": ("1.2", 1.2), "max_tokens": ("9", 9),
        "seed": ("5", 5),
    }  # fmt: skip
    talk = chat(
        ScriptedGPT(["x"]),
        *(f"/set {name} {text}" for name, (text, _) in values.items()),
        "/set render markdown", "/show", "/set seed random",
    )  # fmt: skip
    talk.run()
    for name, (_, value) in values.items():
        if name != "seed":
            assert getattr(talk.session.sampling, name.replace("-", "_")) == value
    assert talk.session.sampling.seed is None and talk.screen.render == "markdown"
    out = capsys.readouterr().out
    for line in (r"top_p +0\.5", "seed +5", "render +markdown", "model +rlhf.safetensors"):
        assert re.search(line + r"\b", out)
    assert "(seed is random)" in out and re.search(r"kept in +nothing \(not saved\)", out)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set temprature 1", "There is no setting 'temprature'. Did you mean temperature?"),
        ("/set", "There is no setting ''. Known: temperature, top_k,"),
        ("/set temperature hot", "temperature is hot; it must be a number from 0 up."),
        ("/set temperature", "temperature needs a value: a number from 0 up."),
        ("/set top_k 2.5", "top_k is 2.5; it must be a whole number from 0 up."),
        ("/set top-p 7", "top_p is 7; it must be a number above 0 and at most 1."),
        ("/set max_tokens 0", "max_tokens is 0; it must be a whole number from 1 up."),
        ("/set render pretty", "render is pretty; it must be auto, markdown or plain."),
        ("/set ckpt base", "not changed by /set but by /model NAME"),
        ("/set save 0", "not changed by /set but by /save NAME"),
        ("/hlep", "There is no command /hlep. Did you mean /help?"),
        ("/xyzzy", "There is no command /xyzzy. /help lists the commands."),
        ("/help stat", "There is no command /stat. Did you mean /stats?"),
        ("/export", "Give the file a name"),
        ("/load", "Name a chat"),
        ("/load nowhere", "There is no saved chat 'nowhere'"),
        ("/model nothing", "No checkpoint 'nothing'"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(
    capsys, monkeypatch, tmp_path, line, sentence
):
    monkeypatch.setattr("tinychat.cli.saved.chats_folder", lambda: tmp_path)
    talk = chat(ScriptedGPT(["One."]), "hi", line)
    talk.run()
    assert sentence in said(capsys.readouterr().out)
    assert turns(talk.session) == ["hi", "One."] and talk.session.sampling == GREEDY


@pytest.mark.parametrize("word", ["/quit", "/exit", "/bye", "/q", "/QUIT"])
def test_leaving(capsys, word):
    assert transcript(capsys, ["x"], word, "never") == ""


def test_help_is_one_screen_and_names_every_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = transcript(capsys, ["x"], "/help")
    for name in Commands.names():
        assert re.search(rf"(^|  )/{name}\b", out, re.MULTILINE), name
    lines = out.rstrip().split("\n")
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines)
    out = transcript(capsys, ["x"], "/help attn", "/help /set")
    assert "/attn [LAYER [HEAD]]: where one head looks" in out
    assert "/set NAME VALUE: change a setting" in out and "min_p, repetition_penalty" in out


def test_issue_4_commands_are_there():
    wanted = (
        "help set show system clear retry edit undo continue save load export copy model models "
        "compare stats probs tokens attn lens quit"
    )
    assert set(wanted.split()) <= set(Commands.names())


def test_completions(monkeypatch, tmp_path):
    monkeypatch.setattr("tinychat.runtime.search.search_folders", lambda: [tmp_path])
    monkeypatch.setattr("tinychat.cli.saved.chats_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (
        "base",
        "sft",
        "reward",
        "runs/n1/sft",
        "runs/n1/state-00000001",
        "runs/n2/reward",
    ):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    header = '{"format": 1, "started": ""}\n{"user": "a", "reply": "b"}\n'
    (tmp_path / "my tea.jsonl").write_text(header)
    assert completions("/re") == ["/retry"]
    assert "/set" in completions("/") and "/probs" in completions("/")
    assert completions("/set t") == ["temperature", "top_k", "top_p"]
    assert completions("/set render ") == ["auto", "markdown", "plain"]
    assert completions("/set temperature ") == ["0.5"]
    assert completions("/model ") == ["base", "n1", "sft"]  # a reward model cannot chat
    assert completions("/compare base s") == ["sft"]
    assert completions("/load ") == ["my tea"] and completions("/load my t") == ["tea"]
    assert completions("/help un") == ["undo"]
    for line in ("", "hello", "//re", "/undo x", "/set nothing "):
        assert completions(line) == []


def test_models(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tinychat.runtime.search.search_folders", lambda: [tmp_path])
    monkeypatch.chdir(tmp_path)
    assert "No checkpoint in" in transcript(capsys, ["x"], "/models")


def test_model_keeps_the_conversation_and_the_settings(capsys, monkeypatch):
    def open_session(info, settings, system=None):
        return session(ScriptedGPT(["x", "new"]), Sampling(**settings), system=system)

    monkeypatch.setattr("tinychat.cli.compare.choose", lambda name: Ready.info)
    monkeypatch.setattr("tinychat.cli.loading.open_session", open_session)
    talk = chat(ScriptedGPT(["old"]), "/system be kind", "hi", "/model rlhf", "you", "/model")
    talk.run()
    assert turns(talk.session) == ["hi", "old", "you", "new"]
    assert talk.session.system == "be kind" and talk.session.sampling == GREEDY
    assert capsys.readouterr().out.count("rlhf.safetensors (rlhf, 13.9 M parameters)") == 2


# Files and the clipboard


def test_copy_sends_the_last_reply_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = transcript(capsys, ["  Hellö \x1b[31m!"], "hi", "/copy")
    code = re.search(r"\x1b\]52;c;([A-Za-z0-9+/=]+)\x07", out)
    assert base64.b64decode(code[1]).decode() == "Hellö [31m!"
    assert "11 characters" in out and "OSC 52" in out


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_copy_without_a_terminal_is_a_note(capsys, monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    chat(ScriptedGPT(["One."]), "hi", "/copy", interactive=term == "dumb").run()
    out = "".join(capsys.readouterr())
    assert "no terminal with a clipboard" in out and "\x1b]52" not in out


def test_export(capsys, tmp_path):
    markdown, js, html = (tmp_path / f"my chat.{kind}" for kind in ("md", "json", "html"))
    out = transcript(
        capsys, ["<b>One</b> & \x1b[1m{two}"], "/system be <kind>", "</article><script>x</script>",
        f"/export {markdown}", f"/export {js}", f"/export {html}", f"/export {markdown}",
        f"/export {tmp_path}/chat.txt", f"/export {tmp_path}/no/chat.md", f"/export {tmp_path}.md/",
    )  # fmt: skip
    assert markdown.read_text(encoding="utf-8") == (
        "# A chat with tinychat\n\nCheckpoint: `rlhf.safetensors` (rlhf)\n\n"
        "**System:** be <kind>\n\n**You:** </article><script>x</script>\n\n"
        "**tinychat:** <b>One</b> & [1m{two}\n"
    )
    record = json.loads(js.read_text(encoding="utf-8"))
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][2]["content"] == "<b>One</b> & \x1b[1m{two}"
    assert record["checkpoint"] == "rlhf.safetensors" and record["settings"]["temperature"] == 0
    page = html.read_text(encoding="utf-8")
    assert "&lt;b&gt;One&lt;/b&gt; &amp; [1m{two}" in page and "be &lt;kind&gt;" in page
    assert "<script" not in page and "http" not in page and "prefers-color-scheme: dark" in page
    assert page.count("<article") == page.count("</article>") == 3
    out = said(out)
    assert "exists already; choose another name" in out
    assert "must end in .md, .json or .html" in out
    assert "No such file or directory" in out


def test_a_failed_export_leaves_nothing(monkeypatch, tmp_path):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    def open_full(path, mode):
        path.touch(exist_ok=False)
        return Full()

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space"):
        export(tmp_path / "a.md", Talk("x", "sft", {}, None, [Message("user", "hi")]))
    assert list(tmp_path.iterdir()) == []


# Speed and memory


def test_tokens_per_second_is_what_a_stopwatch_says(capsys, monkeypatch):
    """Each token takes 0.1 s, reading the prompt 2 s more, noticing the end 0.7 s more."""
    clock = [100.0]
    monkeypatch.setattr(session_module, "perf_counter", lambda: clock[0])

    class Slow(ScriptedGPT):
        def scores(self, ids):
            logits = super().scores(ids)
            if ids[-1] == ByteTokenizer.assistant_id:
                clock[0] += 2.0
            if int(logits.argmax()) == ByteTokenizer.end_id and ids[-1] > 7:
                clock[0] += 0.7 if ByteTokenizer.assistant_id in ids else 0
            elif ByteTokenizer.assistant_id in ids:
                clock[0] += 0.1
            return logits

    talk = chat(Slow(["elevenchars"]), "hi", "/stats")
    talk.run()
    last = talk.session.last
    assert last.written == 11
    assert last.first == pytest.approx(2.1) and last.final == pytest.approx(3.1)
    assert last.seconds == pytest.approx(3.8)
    assert last.tokens_per_second == pytest.approx(10)  # ten tokens in the second after the first
    out = capsys.readouterr().out
    assert re.search(r"speed +10 tokens/s", out) and re.search(r"reply +11 tokens in 3\.80 s", out)
    assert re.search(r"first token +after 2100 ms", out)


def test_one_token_has_no_speed():
    talk = session(ScriptedGPT(["x"]))
    list(talk.reply("hi"))
    assert talk.last.tokens_per_second == 0


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ([10], 0),
        ([10, 10, 10], 0),
        ([40, 40, 20], 0),  # exactly full
        ([40, 40, 21], 2),
        ([20, 20, 20, 20, 20, 20, 20], 4),  # 120 > 100 with the third question: 75 may stay
        ([20] * 9, 4),  # (0, 100) forgets 4; 4..8 are 100 again, which fits
        ([20] * 11, 8),
        ([300], 0),  # the last message stays, render_prompt says that it is too long
        ([300, 10, 5], 2),
    ],
)
def test_first_kept(sizes, first):
    assert first_kept(sizes, 100) == first


def test_a_full_conversation_seldom_reads_everything_again():
    """Turns of 16 tokens in a context of 256: once it is full, a quarter is dropped at a time."""
    model = ScriptedGPT(["fine!"])
    talk = session(model, Sampling(temperature=0, max_tokens=10))
    read, dropped = [], []
    for number in range(100):
        list(talk.reply(f"ask{number:03d}"))
        read.append(talk.last.prompt - talk.last.cached)
        dropped.append(talk.last.dropped)
    again = [number for number, count in enumerate(read) if number and count > 30]
    # <|end|> <|user|> a s k n n n <|end|> <|assistant|>: the rest is remembered
    assert all(count == 10 for number, count in enumerate(read) if number not in (0, *again))
    steps = [b - a for a, b in zip(again, again[1:], strict=False)]
    assert dropped[-1] > 80 and min(steps) >= 4  # 256 / 4 / 16
    assert [number for number in range(1, 100) if dropped[number] != dropped[number - 1]] == again
    # Dropping one turn at a time would read about 240 tokens for each of the 85 full turns.
    assert sum(read) < 100 * 10 + len(again) * 200 and len(again) <= 25


def test_memory_of_200_turns_is_bounded():
    talk = session(ScriptedGPT(["fine, and you?"]), Sampling(temperature=0, max_tokens=16))
    tracemalloc.start()
    try:
        sizes = []
        for number in range(200):
            list(talk.reply(f"message number {number}"))
            assert len(talk._held) <= talk.context and talk._cache.length <= talk.context
            talk._cache.fed.clear()  # the fake's own diary
            if number in (99, 199):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    text = sum(len(message.content) for message in talk.messages[200:])
    # 200 messages of ~16 characters; a str and a Message have some 200 bytes around them.
    assert sizes[1] - sizes[0] < 200 * 300 + text


def test_a_message_is_cut_into_tokens_once_however_long_the_chat():
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text):
            self.calls += 1
            return super().encode(text)

    tokenizer, model = Counting(), ScriptedGPT(["fine!"])
    talk = ChatSession(model, tokenizer, GREEDY, 256)
    talk.messages = [
        Message("assistant" if n % 2 else "user", f"text number {n}") for n in range(400)
    ]
    list(talk.reply("hi"))
    before = tokenizer.calls
    list(talk.reply("more"))
    assert tokenizer.calls - before < 40  # what still fits, not 400 turns
