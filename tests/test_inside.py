"""Looking inside: what is measured equals what the model does, and every terminal can show it."""

import io
import math
import re
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from fakes import ByteTokenizer, ScriptedGPT
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tinychat.cli.commands import Commands
from tinychat.cli.console import Screen
from tinychat.cli.session import ChatSession
from tinychat.cli.tiles import LEVELS, Bar, HeatMap, Tile, Tiles, percent, piece
from tinychat.cli.trace import Trace, attention_weights, last_turn
from tinychat.data.records import Message
from tinychat.generation import Sampling
from tinychat.gpt import GPT, GPTConfig
from tinychat.runtime.errors import ConfigError

GREEDY = Sampling(temperature=0, max_tokens=24)
WARM = Sampling(temperature=1.3, top_p=0.8, max_tokens=40, seed=5)
T = ByteTokenizer


def tiny_gpt(layers: int = 2, kv_heads: int = 2) -> GPT:
    """A real GPT whose weights are far from their start, so that every part matters."""
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=263, width=32, layers=layers, heads=4, kv_heads=kv_heads, head_width=8,
        hidden=64, context=256,
    )  # fmt: skip
    model = GPT(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model


def session(model=None, sampling=GREEDY, **keywords) -> ChatSession:
    model = model or tiny_gpt()
    return ChatSession(model, T(), sampling, model.config.context, **keywords)


def say(chat: ChatSession, text: str) -> str:
    return "".join(chat.reply(text))


@pytest.fixture(scope="module")
def talk() -> tuple[ChatSession, Trace]:
    """Two turns, and a trace of the second."""
    chat = session(sampling=WARM, system="Be kind.")
    say(chat, "hi")
    say(chat, "hello there, hello")
    return chat, Trace(chat.model, last_turn(chat))


# The turn


def test_the_tokens_are_those_of_the_session(talk):
    chat, trace = talk
    turn = trace.turn
    written = chat._held[chat.last.prompt :]
    assert turn.as_written and turn.ids[: len(chat._held)] == chat._held
    assert turn.reply[: len(written)] == written and len(written) == chat.last.written
    message = [T.user_id, *T().encode("hello there, hello"), T.end_id, T.assistant_id]
    assert turn.prompt[turn.start :] == message


def test_the_end_belongs_to_the_reply_only_when_it_came():
    chat = session(ScriptedGPT(["ok", "one two"]))
    say(chat, "hi")
    assert last_turn(chat).reply == [*T().encode("ok"), T.end_id]
    with closing(chat.reply("count")) as pieces:
        for text in pieces:
            if text == " ":
                break
    assert last_turn(chat).reply == T().encode("one ")


def test_a_turn_that_came_as_text_is_read_again():
    chat = session(ScriptedGPT(["ok", "fine"]), system="Be kind.")
    with pytest.raises(ConfigError, match="write a message first"):
        last_turn(chat)
    say(chat, "hi")
    first = last_turn(chat)
    say(chat, "and you?")
    chat.undo()
    turn = last_turn(chat)
    assert not turn.as_written
    assert turn.prompt == first.prompt and turn.reply == T().encode("ok")
    chat.clear()
    with pytest.raises(ConfigError, match="write a message first"):
        last_turn(chat)


def test_a_long_turn_that_came_as_text_fits_the_context():
    chat = spoken("old", "news", "q" * 200, "r" * 100)
    turn = last_turn(chat)
    assert len(turn.ids) == chat.context == 256
    assert turn.prompt == [T.bos_id, *turn.prompt[turn.start :]]
    assert turn.prompt[turn.start + 1 : -2] == T().encode("q" * 200)
    assert turn.reply == T().encode("r" * 52)
    Trace(chat.model, turn)


# What is measured


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_weights_times_values_are_the_attention(kv_heads):
    attention, model = tiny_gpt(kv_heads=kv_heads).blocks[0].attention, tiny_gpt()
    x_BTD = torch.randn(2, 19, 32)
    cos_TK, sin_TK = model.cos_TK[:19], model.sin_TK[:19]
    with torch.inference_mode():
        for since in (0, 7):
            weights_BHQT = attention_weights(attention, x_BTD, cos_TK, sin_TK, since)
            assert weights_BHQT.shape == (2, 4, 19 - since, 19)
            v = attention.v(x_BTD).view(2, 19, kv_heads, 8).transpose(1, 2)
            mixed = weights_BHQT @ v.repeat_interleave(4 // kv_heads, dim=1)
            gathered = attention.out(mixed.transpose(1, 2).reshape(2, 19 - since, 32))
            torch.testing.assert_close(
                gathered, attention(x_BTD, cos_TK, sin_TK)[:, since:], atol=1e-5, rtol=1e-5
            )


def test_attention_of_the_trace_is_what_the_layers_read(talk):
    _, trace = talk
    ids = torch.tensor([trace.turn.ids])
    with torch.inference_mode():
        # The second layer's input, made by hand.
        cos, sin = (table[: ids.shape[1]] for table in (trace.model.cos_TK, trace.model.sin_TK))
        block, second = trace.model.blocks
        x = block(trace.model.embed(ids), cos, sin, None, None, 0)
        wanted = attention_weights(second.attention, second.attention_norm(x), cos, sin)[0]
    got = trace.attention(2)
    torch.testing.assert_close(got, wanted[:, trace.turn.start :], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:2]))


@torch.inference_mode()
def test_the_last_row_of_the_lens_is_the_model_itself(talk):
    _, trace = talk
    turn, model = trace.turn, trace.model
    ids = torch.tensor([turn.ids])
    places = slice(len(turn.prompt) - 1, len(turn.ids) - 1)
    own = torch.nn.functional.linear(model.hidden(ids)[0, places], model.embed.weight)
    assert torch.equal(trace.logits(2), own)
    assert torch.equal(trace.logits(), own)
    torch.testing.assert_close(trace.logits(2), model(ids)[0, places], atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_the_first_row_of_the_lens_is_the_model_without_its_second_layer(talk):
    _, trace = talk
    short = tiny_gpt(layers=1)
    short.load_state_dict(trace.model.state_dict(), strict=False)
    logits_NV = short(torch.tensor([trace.turn.ids]))[0, len(trace.turn.prompt) - 1 : -1]
    torch.testing.assert_close(trace.logits(1), logits_NV, atol=1e-4, rtol=1e-5)
    guesses = trace.guesses(1)
    assert [id for id, _ in guesses] == logits_NV.argmax(-1).tolist()
    assert [p for _, p in guesses] == pytest.approx(logits_NV.softmax(-1).amax(-1).tolist())
    assert trace.guesses(1) != trace.guesses(2)


def test_a_trace_leaves_no_hooks_behind(talk):
    _, trace = talk
    for module in trace.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_probabilities_are_an_independent_softmax(talk):
    _, trace = talk
    turn = trace.turn
    with torch.inference_mode():
        logits_TV = trace.model(torch.tensor([turn.ids]))[0].double()
    for place, p in enumerate(trace.probabilities()):
        scores = logits_TV[len(turn.prompt) - 1 + place].tolist()
        whole = sum(math.exp(score) for score in scores)
        assert p == pytest.approx(math.exp(scores[turn.reply[place]]) / whole, rel=1e-3)


def test_greedy_takes_the_first_alternative():
    chat = session()
    say(chat, "hi")
    trace = Trace(chat.model, last_turn(chat))
    for place in range(len(trace.turn.reply)):
        rows, kept = trace.alternatives(place, GREEDY)
        assert rows[0].taken and rows[0].id == trace.turn.reply[place]
        assert [row.rank for row in rows] == list(range(1, 11))
        assert (kept, rows[0].left, rows[1].left) == (1, 1.0, 0.0)


def test_alternatives_after_the_settings(talk):
    _, trace = talk
    rows, kept = trace.alternatives(3, Sampling(temperature=1, top_k=2, top_p=1))
    p, q = rows[0].probability, rows[1].probability
    assert kept == 2 and p >= q >= rows[2].probability
    assert rows[0].left == pytest.approx(p / (p + q), rel=1e-4)
    assert [row.left for row in rows[2:]] == [0] * len(rows[2:])
    assert sum(row.taken for row in rows) == 1
    # Off, they leave the model's own numbers.
    rows, kept = trace.alternatives(3, Sampling(temperature=1, top_p=1))
    assert [row.left for row in rows] == pytest.approx([row.probability for row in rows])


def test_the_penalty_counts_the_reply_so_far_and_nothing_else():
    model = tiny_gpt()
    for ids in ("a", "aa"):
        chat = session(model)
        chat.messages = [Message("user", "bbbb"), Message("assistant", ids + "c")]
        trace = Trace(model, last_turn(chat))
        place, seen = len(ids), T().encode("a")[0]
        plain, _ = trace.alternatives(place, Sampling(temperature=1, top_p=1), count=263)
        harsh, _ = trace.alternatives(
            place, Sampling(temperature=1, top_p=1, repetition_penalty=1.7), count=263
        )
        odds = {row.id: math.log(row.left) for row in harsh}
        shift = {row.id: odds[row.id] - math.log(row.left) for row in plain}
        others = [change for id, change in shift.items() if id != seen]
        # All other tokens gain by the same factor: only the one that was said lost.
        assert max(others) - min(others) < 1e-3 < max(others) - shift[seen]


def test_a_taken_token_outside_the_ten_is_listed_with_its_rank(talk):
    _, trace = talk
    for place in range(len(trace.turn.reply)):
        rows, _ = trace.alternatives(place, WARM, count=1)
        taken = next(row for row in rows if row.taken)
        if taken.rank > 1:
            break
    scores = trace.logits()[place].tolist()
    assert taken.rank == 1 + sum(score > scores[taken.id] for score in scores)
    assert len(rows) == 2 and rows[0].rank == 1


def test_heads_by_a_slow_loop(talk):
    _, trace = talk
    ids, start = trace.turn.ids, trace.turn.start
    for head, weights in zip(trace.heads(2), trace.attention(2).tolist(), strict=True):
        rows = list(enumerate(weights, start=start))
        far = beyond = 0.0
        again = []
        for t, row in rows:
            far += sum(row[s] * (t - s) for s in range(1, t + 1))
            beyond += sum(row[1 : t + 1])
            copies = [s for s in range(1, t) if ids[s - 1] == ids[t]]
            if copies:
                again.append(sum(row[s] for s in copies))
        assert head.back == pytest.approx(far / beyond, rel=1e-4)
        assert head.first == pytest.approx(sum(row[0] for _, row in rows) / len(rows), rel=1e-4)
        assert head.itself == pytest.approx(sum(row[t] for t, row in rows) / len(rows), rel=1e-4)
        previous = sum(row[t - 1] for t, row in rows) / len(rows)
        assert head.previous == pytest.approx(previous, rel=1e-4)
        assert again and head.again == pytest.approx(sum(again) / len(again), rel=1e-4)


def test_no_token_that_came_before():
    chat = session()
    chat.messages = [Message("user", "ab"), Message("assistant", "cd")]
    turn = last_turn(chat)
    trace = Trace(chat.model, turn)
    assert len(set(turn.ids)) == len(turn.ids)
    assert [head.again for head in trace.heads(1)] == [None] * 4


# What is drawn


def drawn(thing, width: int = 80, **keywords) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **keywords)
    console.print(thing)
    return console.file.getvalue()


def run(chat: ChatSession, line: str, width: int = 80, **keywords) -> str:
    screen = Screen(interactive=True)
    screen.out = screen.aside = Console(
        file=io.StringIO(), width=width, highlight=False, **keywords
    )
    loading = SimpleNamespace(error=None)
    Commands(SimpleNamespace(session=chat, screen=screen, loading=loading)).run(line)
    return screen.out.file.getvalue()


def spoken(*texts: str) -> ChatSession:
    """A session with a conversation that came as text."""
    chat = session()
    roles = ("user", "assistant") * len(texts)
    chat.messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    return chat


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the", "▁the"),
        (b"\n\n", "↵↵"),
        (b"\t", "→"),
        (b"\xe2", "<0xE2>"),
        (b"\xf0\x9f", "<0xF0><0x9F>"),
        (b"\x1b", "<U+001B>"),
        ("\u202ex".encode(), "<U+202E>x"),
        ("\u0301".encode(), "<U+0301>"),
        ("é漢".encode(), "é漢"),
        (b"[red]", "[red]"),
    ],
)
def test_pieces_are_visible(data, shown):
    tokenizer = SimpleNamespace(token_bytes=lambda id: data)
    assert piece(tokenizer, 9) == shown


def test_control_pieces_have_their_name():
    assert piece(T(), T.end_id) == "<|end|>"


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (1.0, "100%"), (0.973, "97%"), (0.0996, "10%"), (0.0994, "9.9%"), (0.0042, "0.4%"),
        (0.0003, "<0.1%"), (0.0, "0.0%"),
    ],
)  # fmt: skip
def test_percent(p, shown):
    assert percent(p) == shown


def test_tokens_transcript():
    assert run(spoken("hi you", "[b]é\x1b"), "/tokens", width=40) == (
        "message, 9 tokens (each with its id):\n"
        "1 <|user|> h   i   ▁  y   o   u\n"
        "  5        111 112 39 128 118 124\n"
        "8 <|end|> <|assistant|>\n"
        "  3       6\n"
        "reply, 6 tokens:\n"
        "1 [  b   ]   <0xC3> <0xA9> <U+001B>\n"
        "  98 105 100 202    176    34\n"
        "this turn was read again from its text; \n"
        "it was not written just now\n"
    )


def test_tokens_in_colour_alternate_and_control_tokens_do_not():
    out = run(spoken("hi", "ok"), "/tokens", force_terminal=True, color_system="256")
    backs = re.findall(r"48;5;(\d+)m(\w)", out)
    assert [letter for _, letter in backs] == ["h", "i", "o", "k"]
    assert backs[0][0] != backs[1][0] and backs[2][0] != backs[3][0]
    assert re.search(r"\x1b\[1m<\|user\|>", out)


def test_probabilities_in_letters(talk):
    chat, trace = talk
    out = run(chat, "/probs", width=60)
    assert "\x1b" not in out
    chances, count = trace.probabilities(), len(trace.turn.reply)
    numbers = re.findall(r"<?[\d.]+%", out.partition(f"{count} tokens,")[0])
    assert numbers == [percent(p) for p in chances]
    bits = -sum(math.log2(p) for p in chances) / count
    assert f"{count} tokens, {bits:.2f} bits each on average" in out
    worst = min(range(count), key=lambda n: chances[n])
    assert f"{worst + 1} {piece(T(), trace.turn.reply[worst])} {percent(chances[worst])}" in (
        " ".join(out.split())
    )
    assert "softmax of its raw scores, before temperature" in " ".join(out.split())


def test_probabilities_in_colour(talk):
    chat, trace = talk
    out = run(chat, "/probs", width=200, force_terminal=True, color_system="256")
    text = re.sub(r"\x1b\[[\d;]*m", "", out).split("\n <5%")[0]
    names = [piece(T(), id).replace("▁", " ") for id in trace.turn.reply]
    # The margin's numbers aside, the reply reads as it was written.
    assert "".join(re.sub(r"^ *\d+ ", "", row) for row in text.split("\n")) == "".join(names)
    wanted = []
    for p in trace.probabilities():
        style = next(style for bound, style, *_ in LEVELS if p < bound)
        wanted.append(re.search(r"color\((\d+)\)", style[6:])[1])
    rows = out.split(" <5% ")[0]
    found, now = [], None
    for colour, letters in re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)", rows):
        now = colour.partition("48;5;")[2] or (None if colour == "0" else now)
        if now:
            found += [now] * len(letters.replace("\n", ""))
    expected = [colour for colour, name in zip(wanted, names, strict=True) for _ in name]
    assert found[: len(expected)] == expected


def test_alternatives_transcript():
    chat = session()
    say(chat, "hi")
    trace = Trace(chat.model, last_turn(chat))
    rows, _ = trace.alternatives(4, GREEDY)
    out = run(chat, "/probs 5")
    assert f"token 5 of {len(trace.turn.reply)} after “" in out
    table = [line for line in out.split("\n") if re.match(r">? +\d+ ", line)]
    assert len(table) == 10
    for line, row in zip(table, rows, strict=True):
        cells = line.removeprefix(">").split()
        assert cells[:2] == [str(row.rank), piece(T(), row.id)]
        assert cells[2:4] == [percent(row.probability), "100%" if row.rank == 1 else "-"]
        assert line.startswith(">") == row.taken
        assert line.count("█") == round(40 * row.probability)
    assert "leave 1 of 263 tokens" in " ".join(out.split())


def test_heads_transcript(talk):
    chat, trace = talk
    out = run(chat, "/attn", width=40)
    rows = re.findall(r"^ +(\d) +(\d) +([\d.]+) ", out, re.MULTILINE)
    heads = [*trace.heads(1), *trace.heads(2)]
    assert rows == [(str(h.layer), str(h.head), f"{h.back:.1f}") for h in heads]
    furthest = max(heads, key=lambda head: head.back)
    assert f"/attn {furthest.layer} {furthest.head} looks furthest" in " ".join(out.split())
    assert len(re.findall(r"^ +2 +\d ", run(chat, "/attn 2"), re.MULTILINE)) == 4


MAP = HeatMap(["▁a", "漢", "c"], [[0.5, 0.5, 0, 0], [0.2, 0.0, 0.8, 0], [0.0, 0.05, 0.15, 0.8]])


def test_heat_map_transcript():
    assert drawn(MAP, width=60) == (
        "      │1 2 3 \n"
        "1 ▁a ▓│▓▓\n"
        "2 漢 ░│  ██\n"
        "3 c   │··░░██\n"
        "· 3%+  ░ 10%+  ▒ 25%+  ▓ 50%+  █ 75%+\n"
        "left of the │: all that came before\n"
    )


def test_a_narrow_heat_map_keeps_the_last_tokens_and_sums_the_rest():
    lines = drawn(MAP, width=10).split("\n")
    assert lines[:3] == ["      │23", "2 漢 ░│█", "3 c  ·│░█"]
    assert "the last 2 of 3 tokens of the turn;" in " ".join(" ".join(lines).split())


def test_attention_is_drawn_for_the_tokens_of_the_turn(talk):
    chat, trace = talk
    turn = trace.turn
    out = run(chat, "/attn 2 3", width=200)
    rows = re.findall(r"^ *(\d+) (.*?) .│", out, re.MULTILINE)
    names = [piece(T(), id) for id in turn.ids[turn.start :]]
    assert [name.strip() for _, name in rows] == names
    assert "layer 2, head 3" in out
    assert run(chat, "/attn 2 3", width=200) != run(chat, "/attn 1 3", width=200)


def test_lens_transcript(talk):
    chat, trace = talk
    out = run(chat, "/lens 4", width=40).split("\n")[1:]
    reply = trace.turn.reply
    assert out[1].split() == ["token", "4", "5", "6"]
    for layer in (1, 2):
        wanted = ""
        for (id, p), taken in list(zip(trace.guesses(layer), reply, strict=True))[3:6]:
            mark = next(mark for bound, _, mark, _ in LEVELS if p < bound)
            wanted += f"{piece(T(), id):<8.8}{mark}{'=' if id == taken else ' '}"
        assert out[1 + layer] == f"L{layer}    {wanted}"
    assert out[4].split()[1:] == [piece(T(), id) for id in reply[3:6]]
    assert out[5] == f"tokens 4 to 6 of {len(reply)}; /lens 7 goes on"
    assert "goes on" not in run(chat, f"/lens {len(reply)}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/probs x", "N is 'x'; it must be a whole number from 1 to 2, the tokens of the reply."),
        ("/probs 0", "N is '0'"),
        ("/probs 3", "N is '3'"),
        ("/probs ²", "N is '²'"),
        ("/lens 9999999999999", "N is '9999999999999'"),
        ("/attn 3 1", "LAYER is '3'; it must be a whole number from 1 to 2, the layers."),
        ("/attn 1 5", "HEAD is '5'; it must be a whole number from 1 to 4"),
        ("/attn 1 2 3", "give it a layer and a head"),
    ],
)
def test_mistakes_are_explained(line, said):
    assert said in " ".join(run(spoken("hi", "ok"), line).split())


def test_nothing_to_look_into_yet():
    for line in ("/tokens", "/probs", "/attn", "/attn 1 1", "/lens"):
        assert run(session(), line) == (
            "There is nothing to look into yet; write a message first.\n"
        )


ODD = "[red]no[/red] \x1b[31m漢字 👍🏽 e\u0301 \u202ezo\n\n\ttab " + "x" * 30


@pytest.mark.parametrize("width", [12, 40, 80, 200])
@pytest.mark.parametrize("colour", [None, "256"])
@pytest.mark.parametrize(
    "line", ["/tokens", "/probs", "/probs 9", "/attn", "/attn 1 1", "/lens", "/lens 60"]
)
def test_every_width_and_no_escape_of_the_model(line, colour, width):
    keywords = {"force_terminal": True, "color_system": colour} if colour else {}
    out = run(spoken("tell me", ODD), line, width, **keywords)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "\x1b" not in plain and "\u202e" not in plain
    assert colour is not None or plain == out
    for row in plain.split("\n"):
        assert cell_len(row) <= width


def test_no_color_keeps_the_numbers(talk, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = run(talk[0], "/probs", force_terminal=True, color_system="256")
    assert "48;5" not in out and percent(talk[1].probabilities()[0]) in out


def test_ascii_terminals_see_ascii_ink():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(file=file, width=60)
    console.print(MAP)
    console.print(Bar(0.5))
    file.flush()
    lines = file.buffer.getvalue().decode("ascii").split("\n")
    assert lines[:4] == ["      |1 2 3 ", "1 ?a *|**", "2 ? :|  ##", "3 c   |..::##"]
    assert lines[-2] == "#" * 20


@given(
    st.lists(st.tuples(st.text(" ab漢<", min_size=1, max_size=9), st.booleans()), min_size=1),
    st.integers(24, 60),
)
def test_tiles_lose_nothing(tokens, width):
    tiles = [Tile(text + "↵" * ends) for text, ends in tokens]
    rows = drawn(Tiles(tiles), width).split("\n")[:-1]
    margin = len(str(len(tiles))) + 1
    assert "".join(row[margin:] for row in rows) == "".join(tile.text for tile in tiles)
    assert all(cell_len(row) <= width for row in rows)
    # The margin says which token a row begins with.
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        first = int(row[:margin])
        last = int(following[:margin]) - 1 if following else len(tiles)
        assert row[margin:] == "".join(tile.text for tile in tiles[first - 1 : last])


def test_a_word_is_not_cut_where_a_row_ends():
    tiles = [Tile(text) for text in ("Once", " up", "on", " a", " ti", "me")]
    assert drawn(Tiles(tiles), 10) == "1 Once\n2  upon a\n5  time\n"


def test_the_commands_wait_with_torch():
    code = "import sys, tinychat.cli.inside; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
