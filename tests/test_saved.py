"""Saved chats: what the file says after every command, crash and mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fakes import ScriptedGPT
from test_cli import ENV, here, run, scripted, shipped, told  # noqa: F401 (fixtures)
from test_commands import chat, said, turns

from tinychat.cli.filing import Keeper
from tinychat.cli.saved import Journal, chats_folder, find_chat, read_chat, saved_chats
from tinychat.data.records import Message
from tinychat.runtime.errors import ConfigError, DataError

ABOUT = {"checkpoint": "sft.safetensors", "settings": {"top_k": 0}, "system": None}
HEADER = (
    '{"tinychat": "0", "format": 1, "started": "2026-11-21", "checkpoint": "sft.safetensors"}\n'
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The user's data folder, not there yet."""
    data = tmp_path / "data"
    monkeypatch.setattr("platformdirs.user_data_dir", lambda _: str(data))
    monkeypatch.delenv("TINYCHAT_SAVE", raising=False)
    return data / "chats"


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """A test may leave its journals open; here they are closed, as the end of a process does."""
    journals: list[Journal] = []
    begin = Journal.__init__

    def remember(journal, folder):
        begin(journal, folder)
        journals.append(journal)

    monkeypatch.setattr(Journal, "__init__", remember)
    yield
    for journal in journals:
        journal.leave()


def messages(*texts: str) -> list[Message]:
    return [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]


def texts(saved) -> list[str]:
    return [message.content for message in saved.messages]


def keeping(folder, replies, *lines):
    """Hold a chat that is saved; return it with its lines read."""
    talk = chat(ScriptedGPT(replies), *lines)
    talk.journal = Journal(folder)
    talk.on_turn = Keeper(talk)
    talk.run()
    return talk


# The file


def test_each_turn_is_a_line_that_is_on_the_disk(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    journal = Journal(folder)
    journal.follow([], ABOUT)
    assert not folder.exists()  # nothing to keep yet
    journal.follow(messages("hi", "One\n\u2028."), ABOUT)
    journal.follow(messages("hi", "One\n\u2028.", "you \udc80", "[Two]"), ABOUT)
    lines = journal.path.read_bytes().split(b"\n")
    assert len(lines) == 4 and lines[3] == b""
    assert synced[-1] == journal.path.stat().st_size and len(synced) == 2
    header = json.loads(lines[0])
    assert header["format"] == 1 and header["checkpoint"] == "sft.safetensors"
    assert json.loads(lines[1])["reply"] == "One\n\u2028."
    saved = read_chat(journal.path)
    assert texts(saved) == ["hi", "One\n\u2028.", "you \udc80", "[Two]"]
    assert not saved.torn and saved.about["settings"] == {"top_k": 0}
    if os.name == "posix":
        assert journal.path.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700


def test_the_file_follows_every_command(folder):
    lines = ("a", "b", "/retry", "/undo", "/edit", "c", "/system be kind", "/set top_k 3", "d")
    talk = keeping(folder, ["1", "2", "3"], *lines)
    saved = read_chat(talk.journal.path)
    assert texts(saved) == turns(talk.session) == ["c", "1", "d", "2"]
    assert saved.system == "be kind" and saved.about["settings"]["top_k"] == 3
    assert saved.about["checkpoint"] == "rlhf.safetensors"
    # Only ever appended to: what was undone can still be read by a person.
    assert '"user": "b"' in talk.journal.path.read_text()


def test_continue_is_kept(folder):
    lines = ("/set max_tokens 3", "hi", "/continue")
    talk = keeping(folder, ["abcdef"], *lines)
    assert texts(read_chat(talk.journal.path)) == ["hi", "abcdef"]


def test_clear_begins_a_new_file_and_loses_nothing(folder, capsys):
    talk = keeping(folder, ["1"], "a", "/save first", "/clear", "b")
    assert "(a new conversation; /load first goes back)" in said(capsys.readouterr().out)
    assert talk.journal.path.stem != "first"
    assert sorted(chat.messages[0].content for chat in saved_chats(folder)) == ["a", "b"]


def test_the_system_message_alone_makes_no_file(folder):
    keeping(folder, ["1"], "/system be kind", "/undo")
    assert not folder.exists()


def test_names(folder, capsys):
    talk = keeping(folder, ["1"], "/save", "a", "/save", "/save my tea", "b", "/save my tea")
    out = said(capsys.readouterr().out)
    assert "This chat is empty, so not saved." in out and "this chat is kept in" in out
    assert "(saved as my tea; /load my tea takes it up again)" in out
    assert [path.name for path in folder.iterdir()] == ["my tea.jsonl"]
    assert len(read_chat(talk.journal.path).messages) == 4
    keeping(folder, ["1"], "other", "/save my tea")
    assert "There is a chat 'my tea' already" in said(capsys.readouterr().out)
    assert texts(find_chat("my tea", folder))[0] == "a"


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "a\\b", "x" * 81, "a:b", "tea."])
def test_names_that_are_no_file_names(folder, capsys, name):
    keeping(folder, ["1"], "a", f"/save {name}")
    assert "cannot name a chat" in said(capsys.readouterr().out)


def test_save_begins_a_chat_that_was_not_saved(folder, capsys):
    chat(ScriptedGPT(["1"]), "a", "/save", "/save tea").run()
    assert "This chat is not saved; /save NAME does it." in said(capsys.readouterr().out)
    assert texts(find_chat("tea")) == ["a", "1"]


def test_load_takes_a_chat_up_and_goes_on_in_its_file(folder, capsys):
    keeping(folder, ["1"], "/system be kind", "a", "/save tea").journal.leave()
    talk = keeping(folder, ["1", "2"], "other", "/load tea", "b")
    assert turns(talk.session) == texts(find_chat("tea")) == ["a", "1", "b", "2"]
    assert talk.session.system == "be kind"
    out = said(capsys.readouterr().out)
    assert "(tea: 1 turn) (you: a) (tinychat: 1)" in out
    assert len(saved_chats(folder)) == 2  # "other" is still there
    talk = chat(ScriptedGPT(["1", "2"]), f"/load {folder}/tea.jsonl", "/retry")
    talk.run()  # not saved: the file stays as it was
    assert texts(find_chat("tea")) == ["a", "1", "b", "2"] == turns(talk.session)


def test_a_chat_of_another_checkpoint_is_a_note(folder, capsys):
    folder.mkdir(parents=True)
    (folder / "old.jsonl").write_text(HEADER + '{"user": "a", "reply": "b"}\n')
    keeping(folder, ["x"], "/load old")
    assert "it was held with sft.safetensors; rlhf.safetensors goes on" in said(
        capsys.readouterr().out
    )


def test_two_programs_never_write_one_file(folder, capsys):
    first = keeping(folder, ["1"], "a", "/save tea")
    talk = keeping(folder, ["1"], "b", "/load tea", "c")
    assert "The chat 'tea' is open in another tinychat" in said(capsys.readouterr().out)
    assert turns(talk.session) == ["b", "1", "c", "1"]
    assert texts(read_chat(first.journal.path)) == ["a", "1"]
    first.journal.leave()
    Journal(folder).take_up(find_chat("tea", folder))


def test_two_chats_in_one_second(folder):
    for text in "ab":
        Journal(folder).follow(messages(text, "x"), ABOUT)
    assert len(saved_chats(folder)) == 2


# Crashes


@pytest.mark.parametrize("cut", [1, 2, 20, 40])
def test_a_torn_line_costs_one_turn_at_most(folder, cut):
    journal = Journal(folder)
    journal.follow(messages("a", "1"), ABOUT)
    journal.follow(messages("a", "1", "bö", "2"), ABOUT)
    journal.leave()
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-cut])
    saved = read_chat(path)
    assert saved.torn and texts(saved) == ["a", "1"]
    journal.take_up(saved)
    journal.follow([*saved.messages, *messages("c", "3")], ABOUT)
    again = read_chat(path)
    assert not again.torn and texts(again) == ["a", "1", "c", "3"]


def test_a_last_line_of_noughts_is_torn_too(folder):
    """Some file systems fill a file with zero bytes when the power fails."""
    folder.mkdir(parents=True)
    path = folder / "x.jsonl"
    path.write_text(HEADER + '{"user": "a", "reply": "b"}\n' + "\0" * 20 + "\n")
    saved = read_chat(path)
    assert saved.torn and texts(saved) == ["a", "b"]
    journal = Journal(folder)
    journal.take_up(saved)
    journal.follow(messages("a", "b", "c", "d"), saved.about)
    assert texts(read_chat(path)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no saved chat"),
        ("{}\n", "line 1 is not one of a saved chat"),
        ('{"format": 9, "started": ""}\n', "has format 9 and this tinychat reads 1"),
        (HEADER + 'x\n{"user": "a", "reply": "b"}\n', "line 2 is not"),
        (HEADER + '{"user": 1, "reply": "b"}\n{"keep": 0}\n', "line 2 is not"),
        (HEADER + '{"keep": 3}\n{"keep": 0}\n', "line 2 is not"),
        (HEADER + '{"now": 3}\n{"keep": 0}\n', "line 2 is not"),
        (HEADER + '{"now": {"system": 3}}\n{"keep": 0}\n', "line 2 is not"),
        ("[" * 100_000 + "\n" + HEADER, "line 1 is not"),
    ],
)
def test_a_damaged_file_is_one_sentence(folder, capsys, text, sentence):
    folder.mkdir(parents=True)
    (folder / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=sentence):
        find_chat("x", folder)
    assert saved_chats(folder) == []
    talk = keeping(folder, ["1"], "a", "/load x", "b")
    assert sentence in said(capsys.readouterr().out)
    assert turns(talk.session) == ["a", "1", "b", "1"]


def test_a_folder_that_cannot_be_written_is_one_note(folder, capsys):
    folder.parent.write_text("not a folder")
    talk = keeping(folder, ["1"], "a", "b", "c")
    out = capsys.readouterr().out
    assert out.count("this chat cannot be saved") == 1 and out.count("\n1\n") == 2
    # As soon as it can be, all of it is.
    folder.parent.unlink()
    talk.on_turn()
    assert texts(read_chat(talk.journal.path)) == ["a", "1", "b", "1", "c", "1"]


def test_a_full_disk_is_tried_again(folder, monkeypatch):
    journal = Journal(folder)
    journal.follow(messages("a", "1"), ABOUT)
    real = os.fsync

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.follow(messages("a", "1", "b", "2"), ABOUT)
    monkeypatch.setattr(os, "fsync", real)
    journal.follow(messages("a", "1", "b", "2", "c", "3"), ABOUT)
    assert texts(read_chat(journal.path)) == ["a", "1", "b", "2", "c", "3"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the data folder by XDG_DATA_HOME")
def test_killed_while_it_writes(shipped, tmp_path):  # noqa: F811
    env = {**ENV, "XDG_DATA_HOME": str(tmp_path)}
    child = subprocess.Popen(
        [sys.executable, "-m", "tinychat", "chat", "--ckpt", "sft.safetensors", "--save",
         "--max-tokens", "8"],
        cwd=shipped, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        child.stdin.write(b"first question\n/set max_tokens 100\n" + b"more\n" * 200)
        child.stdin.flush()
        end = time.monotonic() + 100
        chats = tmp_path / "tinychat" / "chats"
        while time.monotonic() < end:
            found = saved_chats(chats)
            if found and len(found[0].messages) >= 6:
                break
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
    saved = saved_chats(chats)[0]
    assert texts(saved)[0] == "first question" and len(saved.messages) >= 6
    Journal(chats).take_up(saved)  # the killed process holds no lock


# The command line


def test_chats_lists_the_newest_first(folder):
    assert "No chat is saved in" in run("chats").stdout
    for number, text in enumerate(["old [b]one[/b]", "new \x1b[1m\none"]):
        Journal(folder).follow(messages(text, "x", "more", "x"), ABOUT)
        path = max(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns)
        os.utime(path, (1000 + number, 1000 + number))
    out = run("chats").stdout
    assert out.index("new [1m one") < out.index("old [b]one[/b]")
    assert "1970-01-01" in out
    rows = json.loads(run("chats", "--json").stdout)
    assert [row["first"] for row in rows] == ["new \x1b[1m\none", "old [b]one[/b]"]
    assert rows[0]["turns"] == 2 and rows[0]["checkpoint"] == "sft.safetensors"


def test_a_pipe_is_saved_only_when_asked(folder, scripted):  # noqa: F811
    assert run("chat", stdin="hi\n").exit_code == 0
    assert not folder.exists()
    run("chat", "--save", stdin="hi\n")
    assert texts(saved_chats()[0]) == ["hi", "Hello [b]you[/b]!"]


def test_continue_takes_up_the_newest(folder, scripted):  # noqa: F811
    run("chat", "--save", "--system", "be kind", stdin="hi\n")
    result = run("chat", "--continue", stdin="bye\n/show\n")
    assert result.stdout == "Bye.\n"  # the model sees that this is the second turn
    assert "1 turn" in result.stderr and "be kind" in result.stderr
    assert [len(saved.messages) for saved in saved_chats()] == [4]
    name = saved_chats()[0].name
    result = run("chat", "--load", name, "--no-save", "--system", "", stdin="/retry\n/show\n")
    assert result.stdout == "Bye.\n" and "be kind" not in result.stderr
    assert [len(saved.messages) for saved in saved_chats()] == [4]


def test_mistakes(folder, here):  # noqa: F811
    assert "no saved chat to continue yet" in told(run("chat", "--continue", stdin=""))
    assert "no saved chat 'tea'; none is saved yet." in told(run("chat", "--load", "tea"))
    assert "name two chats" in told(run("chat", "--continue", "--load", "tea"))
    Journal(folder).follow(messages("a", "b"), ABOUT)
    next(folder.iterdir()).rename(folder / "tea.jsonl")
    assert "'teh'; did you mean tea? `tinychat chats` lists them." in told(
        run("chat", "--load", "teh")
    )


def test_the_folder_is_the_users_own():
    assert chats_folder().name == "chats" and "tinychat" in str(chats_folder())


def test_rename_before_the_first_turn(folder):
    journal = Journal(folder)
    journal.rename("tea")
    journal.follow(messages("a", "b"), ABOUT)
    assert journal.path == folder / "tea.jsonl"
    with pytest.raises(ConfigError, match="already"):
        Journal(folder).rename("tea")
