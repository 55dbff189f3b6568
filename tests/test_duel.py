"""`tinychat duel` through a pipe and at keys that a script presses; what it says of the votes."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ScriptedGPT, UniformGPT
from test_cli import ENV, run, told, write_checkpoint
from test_commands import said, session, transcript
from test_votes import RLHF, SFT, fill, vote

from tinychat.cli import loading
from tinychat.cli import ring as ring_module
from tinychat.cli.commands import completions
from tinychat.cli.console import Screen
from tinychat.cli.keys import LineKeys, legend
from tinychat.cli.votes import records, votes_file
from tinychat.cli.voting import CHOICES
from tinychat.data.corpus import dialogues
from tinychat.data.preferences import prompt_key, read_votes
from tinychat.data.split import split_of
from tinychat.generation import Sampling
from tinychat.runtime import search
from tinychat.runtime.checkpoint import file_sha256

SAYS = {"base": "Once upon", "sft": "Hello\n[b]you[/b]!", "rlhf": "Hi, friend."}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for stage in (*SAYS, "reward"):
        write_checkpoint(folder / f"{stage}.safetensors", stage)
    return folder


@pytest.fixture
def ring(shipped, monkeypatch, tmp_path):
    """Those checkpoints, each saying its sentence; what each was asked. A is always shown first."""
    log = []

    def open_session(info, settings, system=None):
        made = session(ScriptedGPT([SAYS[info.stage]]), Sampling(**settings), system=system)
        reply = made.reply

        def remembered(text):
            log.append((info.stage, made.system, text, made.sampling.seed))
            return reply(text)

        made.reply = remembered
        return made

    monkeypatch.setattr(loading, "open_session", open_session)
    monkeypatch.setattr(search, "search_folders", lambda: [shipped])
    monkeypatch.setattr(secrets, "randbelow", lambda most: 1)
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\ufeffone\n\n  two  \nthree\n", encoding="utf-8")
    return log


def pressed(*keys: str, words: str = "sft rlhf --prompts prompts.txt --seed 3"):
    return run("duel", *words.split(), stdin="".join(f"{key}\n" for key in keys))


# A whole duel


def test_a_duel_through_a_pipe(ring):
    result = pressed("a", "B", "", "what?", "x")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("A:\n  Hello\n  [b]you[/b]!\nB:\n  Hi, friend.\n") == 3
    assert "(A is better)" in result.stderr and "(both bad)" in result.stderr
    assert "these were all the prompts" in result.stderr
    votes = list(records(votes_file()))
    assert [one["winner"] for one in votes] == ["a", "b", "bad"]
    asked = [one["prompt"][0]["content"] for one in votes]
    assert sorted(asked) == ["one", "three", "two"]
    assert [question for _, _, question, _ in ring] == [one for one in asked for _ in range(2)]
    first = votes[0]
    assert (first["a"], first["b"], first["left"]) == (SAYS["sft"], SAYS["rlhf"], "a")
    made = first["made"]["b"]
    assert made["name"] == "rlhf.safetensors" and made["stage"] == "rlhf"
    assert made["sha256"] == file_sha256(search.find("rlhf"))
    assert first["sampling"]["temperature"] == 0.5
    # Each reply was drawn with the seed that its vote names.
    seeds = [one["made"][side]["seed"] for one in votes for side in "ab"]
    assert seeds == [seed for *_, seed in ring] and len(set(seeds)) == 6
    assert "sft beats rlhf in 50% of 3 votes (95 %: 13% to 87%; chance can do that too): " in (
        result.stdout
    )
    assert "The reply shown first won 1 of 2" in result.stdout
    assert f"3 votes added to {votes_file()}" in said(result.stderr)
    assert len(read_votes(votes_file())) == 3


def test_the_order_is_drawn_and_hidden(ring, monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", lambda most: 0)
    result = pressed("a", "q")
    assert "A:\n  Hi, friend.\nB:\n  Hello\n" in result.stdout
    *shown, sentence, _, _ = result.stdout.split("\n")
    assert "sft" not in " ".join(shown) and "rlhf beats sft" in sentence  # named in the tally only
    (one,) = records(votes_file())
    assert (one["winner"], one["left"], one["a"]) == ("b", "b", SAYS["sft"])
    assert "rlhf beats sft in 100% of 1 vote" in result.stdout
    draws = []
    monkeypatch.setattr(secrets, "randbelow", lambda most: draws.append(most) or len(draws) % 2)
    pressed("t", "t")
    assert draws == [2, 2]


def test_what_has_a_vote_is_not_asked_again(ring):
    pressed("a", "s", "b")
    first = {one["prompt"][0]["content"] for one in records(votes_file())}
    assert len(first) == 2
    ring.clear()
    result = pressed("t", "t")
    assert {question for *_, question, _ in ring} == {"one", "two", "three"} - first
    assert "all the prompts" in result.stderr
    result = pressed("t")
    assert "each of these prompts has a vote of yours already" in said(result.stderr)
    assert len(list(records(votes_file()))) == 4


def test_count_and_another_file(ring, tmp_path):
    words = "sft rlhf --prompts prompts.txt --count 2 --votes mine.jsonl --max-tokens 2"
    result = pressed("s", "a", "a", "a", words=words)
    assert result.exit_code == 0
    votes = list(records(Path("mine.jsonl")))
    assert [one["made"]["a"]["ended"] for one in votes] == ["length"] * 2
    assert votes[0]["a"] == "He" and not read_votes(Path("mine.jsonl"))[0].replies[0].ended
    assert not votes_file().exists()


def test_a_crash_keeps_every_vote_before_it(ring, monkeypatch):
    def fails(*_):
        raise RuntimeError("power cut")

    real, calls = ring_module.ask, []

    def ask(*arguments):
        calls.append(1)
        return real(*arguments) if len(calls) < 3 else fails()

    monkeypatch.setattr(ring_module, "ask", ask)
    assert pressed("a", "a", "a").exit_code == 1
    assert len(list(records(votes_file()))) == 2


def test_leaving_before_the_first_vote_leaves_nothing(ring):
    for keys in ((), ("q",), ("quit",)):
        result = pressed(*keys)
        assert result.exit_code == 0 and "no votes this time" in result.stderr
        assert not votes_file().exists() and "beats" not in result.stdout


# Prompts


def test_one_checkpoint_meets_itself_with_other_dice(ring, monkeypatch):
    monkeypatch.setattr(
        loading, "open_session",
        lambda info, settings, system=None: session(
            UniformGPT(), Sampling(**settings), system=system
        ),
    )  # fmt: skip
    result = pressed("a", "b", "q", words="sft --max-tokens 12 --seed 5")
    votes = list(records(votes_file()))
    assert len(votes) == 2
    for one in votes:
        a, b = one["made"]["a"], one["made"]["b"]
        assert one["a"] != one["b"] and a["seed"] != b["seed"] and a["sha256"] == b["sha256"]
    assert "sft against itself: 2 votes, 0 ties, 0 both bad." in result.stdout
    assert "tinychat train reward --votes" in result.stderr
    # Questions of the training part: they teach, and spoil no test.
    keys = {prompt_key(r.prompt) for r in read_votes(votes_file())}
    part = {
        prompt_key([m for m in d.messages if m.role == "user"][:1])
        for d in dialogues()
        if split_of(d.id) == "train"
    }
    assert keys <= part
    # The same seed asks the same and throws the same dice.
    again = pressed("a", "b", "q", words="sft --max-tokens 12 --seed 5 --votes again.jsonl")
    assert again.exit_code == 0
    same = [(one["prompt"], one["a"], one["b"]) for one in records(Path("again.jsonl"))]
    assert same == [(one["prompt"], one["a"], one["b"]) for one in votes]


def test_two_checkpoints_are_asked_what_no_training_has_read(ring):
    pressed(*"a" * 12, "q", words="sft rlhf --seed 1")
    held = [d for d in dialogues() if split_of(d.id) == "test"]
    asked = {question for *_, question, _ in ring}
    assert len(asked) >= 13  # bytes are long, so some do not fit
    assert asked <= {m.content for d in held for m in d.messages if m.role == "user"}
    ring.clear()
    pressed("q", words="sft rlhf --part train")
    assert ring[0][2] not in {m.content for d in held for m in d.messages}


def test_every_question_of_a_part_is_one_of_the_user(ring):
    for part in ("train", "test"):
        for prompt in ring_module._source(None, part):
            roles = [message.role for message in prompt]
            assert roles in (["user"], ["system", "user"])


def test_typed_prompts_and_a_system_message(ring):
    words = ["duel", "sft", "rlhf", "--ask", "--system", "Be kind."]
    result = run(*words, stdin="what is red?\na\n\nand blue?\nt\n/quit\n")
    assert result.exit_code == 0
    votes = list(records(votes_file()))
    assert [one["prompt"] for one in votes] == [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
        for text in ("what is red?", "and blue?")
    ]
    assert {system for _, system, *_ in ring} == {"Be kind."}


def test_a_dialogues_own_system_message_comes_before_the_options(ring, monkeypatch):
    own = ring_module._source(None, "test")
    chosen = next(prompt for prompt in own if prompt[0].role == "system")
    monkeypatch.setattr(ring_module, "_source", lambda *_: [chosen])
    result = run("duel", "sft", "rlhf", "--system", "Be rude.", stdin="a\n")
    (one,) = records(votes_file())
    assert one["prompt"][0]["content"] == chosen[0].content != "Be rude."
    assert len(one["prompt"]) == 2 and ring[0][1] == chosen[0].content
    assert f"(system message: {chosen[0].content[:20]}" in result.stderr


def test_a_prompt_that_does_not_fit_is_passed_over(ring):
    Path("prompts.txt").write_text("x" * 400 + "\nshort\n")
    result = pressed("a")
    assert "400" in said(result.stderr) or "long" in said(result.stderr)
    assert [one["prompt"][0]["content"] for one in records(votes_file())] == ["short"]


def test_the_same_reply_twice_is_nothing_to_choose(ring, monkeypatch):
    monkeypatch.setitem(SAYS, "rlhf", SAYS["sft"])
    result = pressed("a", "a")
    assert said(result.stderr).count("both said just this") == 3
    assert not votes_file().exists()


def test_a_base_model_may_fight_and_is_named_for_what_it_is(ring):
    result = pressed("a", "q", words="base sft --prompts prompts.txt")
    assert "base.safetensors is a base model; it was not taught to answer" in said(result.stderr)
    assert [one["made"]["a"]["stage"] for one in records(votes_file())] == ["base"]


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("reward sft", "reward.safetensors is a reward model: it scores replies and cannot chat"),
        ("sft reward", "use"),
        ("sft gone", "No checkpoint 'gone'"),
        ("sft sft.safetensors", "are the same checkpoint; `tinychat duel sft` lets it meet itself"),
        ("sft --temperature 0", "says the same twice"),
        ("sft --prompts gone.txt", "gone.txt can't be read"),
        ("sft --prompts blank.txt", "holds no prompts; write one a line"),
        ("sft --prompts latin.txt", "is not UTF-8 text"),
        ("sft --ask --part test", "--ask means that you type the prompts"),
        ("sft --prompts blank.txt --part test", "name two sources"),
        ("sft --part validation", "validation"),
        ("sft --count 0", "count"),
        ("sft --json", "--json goes with --report FILE"),
        ("sft --votes prompts.txt", "prompts.txt:1 is not a JSON object"),
        ("sft --votes .", "directory"),
        ("--report gone.jsonl", "gone.jsonl does not exist"),
        ("--report blank.txt", "holds no votes"),
    ],
)
def test_mistakes_come_before_any_work(ring, words, sentence):
    Path("blank.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"gr\xfc\xdfe\n")
    result = run("duel", *words.split(), stdin="a\n")
    if "--count" in words or "validation" in words:  # typer's own
        assert result.exit_code == 2 and sentence in result.stderr
    else:
        assert sentence.lower() in told(result).lower()
    assert ring == [] and not votes_file().exists()


# The report


def test_report(tmp_path):
    path = fill(
        tmp_path / "votes.jsonl",
        *[vote("a", left="b")] * 12, *[vote("b", left="a")] * 3, vote("tie"), vote("bad"),
        vote("tie", a=SFT, b=SFT), vote("a", b=None),
    )  # fmt: skip
    text = run("duel", "--report", str(path)).stdout
    assert text.split("\n")[:-1] == [
        "sft beats rlhf in 76% of 17 votes (95 %: 53% to 90%): 12 better, 3 worse, 1 tie, "
        "1 both bad; ties count half.",
        "sft against itself: 1 vote, 1 tie, 0 both bad.",
        "1 more on replies that nobody knows the writer of",
        "The reply shown first won 1 of 16 (half is fair).",
    ]
    record = json.loads(run("duel", "--report", str(path), "--json").stdout)
    assert record["pairs"][0]["wins"] == 12 and record["pairs"][0]["votes"] == 17
    assert record["pairs"][0]["rate"] == pytest.approx(13 / 17)
    assert record["shown_first_won"] == 1 and record["unknown"] == 1
    assert RLHF.name == "rlhf.safetensors"


# Keys


class Script:
    """A reader of lines that were typed before."""

    interactive, unsent = False, ""

    def __init__(self, *lines):
        self.lines = list(lines)

    def read(self, default=""):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def test_keys_from_lines(capsys):
    choices = CHOICES
    assert legend(choices) == "A better · B better · T tie · X both bad · S skip · Q quit"
    keys = LineKeys(Screen(True).out, Script(" B ", "1", "DOWN", "huh", "x", "q", "a"))
    assert [keys.read(choices) for _ in range(4)] == ["b", "a", "t", "x"]
    out = capsys.readouterr().out
    assert "'huh' is none of these." in out and out.count("T tie") == 5
    with pytest.raises(EOFError):
        keys.read(choices)
    assert keys.read(choices) == "a"
    with pytest.raises(EOFError):
        keys.read(choices)


# The program itself


@pytest.mark.parametrize("words", [["duel", "--help"], ["duel", "--report", "votes.jsonl"]])
def test_torch_is_not_imported(tmp_path, words):
    fill(tmp_path / "votes.jsonl", vote())
    script = (
        "import sys\nfrom tinychat.cli.app import app\n"
        f"try: app({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'prompt_toolkit' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENV, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
    assert b"Usage" in result.stdout or b"sft beats rlhf in 100% of 1 vote" in result.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tinychat due", ["duel"]),
        ("tinychat duel s", ["sft", "sft.safetensors"]),
        ("tinychat duel sft rl", ["rlhf.safetensors"]),
        ("tinychat duel --part ", ["train", "test"]),
    ],
)
def test_shell_completion(shipped, typed, offered):
    more = {
        "_TINYCHAT_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
        "XDG_DATA_HOME": str(shipped / "nowhere"),
    }
    script = "from tinychat.cli.app import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=shipped, env={**ENV, **more}, capture_output=True, text=True,
    )  # fmt: skip
    found = [name for name in result.stdout.split() if name != "reward"]
    assert set(offered) <= set(found), result.stderr
    assert len(found) == len(set(found))


def test_help_and_completion_in_the_chat():
    assert {"/vote", "/why"} <= set(completions("/"))
    assert completions("/vo") == ["/vote"] and completions("/wh") == ["/why"]
    assert completions("/help vo") == ["vote"]


def test_help_of_the_two_commands(capsys):
    shown = said(transcript(capsys, ["x"], "/help", "/help vote", "/help why"))
    assert "/vote draw a second reply, and say which is better" in shown
    assert "/why [CKPT] the reward model's mark along the last reply" in shown
    assert "in an order that you don't know" in shown and "1 a standard deviation above" in shown
    # Each stands in its group.
    assert shown.index("/compare") < shown.index("/vote") < shown.index("/save")
    assert shown.index("/lens") < shown.index("/why") < shown.index("/quit")
