"""Beyond: search, the calculator and its loop, rounding, and speculation that changes nothing."""

import ast
import itertools
import math
import operator
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
import torch
from fakes import ByteTokenizer, FakeGPT, ScriptedGPT
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat import beyond
from tinychat.beyond import (
    BM25,
    DEEPEST,
    LARGEST,
    LONGEST,
    CalculationError,
    TokenCounts,
    answer_with_calculator,
    calculate,
    keep_or_replace,
    quantize,
    quantized_model,
    show_number,
    speculate,
)
from tinychat.data.corpus import explanations
from tinychat.generation import Sampling, filter_logits, generate
from tinychat.gpt import GPT, GPTConfig, load_model, save_model
from tinychat.runtime import checkpoint
from tinychat.runtime.errors import ConfigError

SHAPE = GPTConfig(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=64, vocab_size=263, context=96
)
GREEDY = Sampling(temperature=0, max_tokens=40)


def stirred(seed: int = 0) -> GPT:
    """A model whose blocks do something: fresh ones begin as "change nothing"."""
    torch.manual_seed(seed)
    model = GPT(SHAPE).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0, 0.2)
    return model


# ---- search ----------------------------------------------------------------------------------


def plain_bm25(texts: list[list[str]], question: list[str], k1=1.2, b=0.75) -> list[float]:
    """The formula, read off the page, without any index."""
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for word in set(question):
            holders = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            f = text.count(word)
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), min_size=1, max_size=6),
    st.lists(st.sampled_from("abcxyz"), max_size=5),
)
def test_bm25_follows_the_formula(texts, question):
    index = BM25([" ".join(text) for text in texts])
    found = dict(index.best(" ".join(question), len(texts)))
    for number, score in enumerate(plain_bm25(texts, question)):
        assert found.get(number, 0.0) == pytest.approx(score)
    assert all(found.values()), "a text that shares no word is not found"


def test_bm25_puts_the_best_first_and_ties_in_order():
    index = BM25(["a cat", "A CAT!", "a dog and a very long tail", "cat cat"])
    assert [number for number, _ in index.best("cat", 9)] == [3, 0, 1]
    assert len(index.best("a", 2)) == 2
    assert index.best("", 3) == index.best("zebra", 3) == []


def test_bm25_needs_words():
    for texts in ([], ["", "..."]):
        with pytest.raises(ConfigError, match="at least one text"):
            BM25(texts)


def test_bm25_finds_the_page_of_a_question():
    pages = [page.text for page in explanations()]
    index = BM25(pages)
    for question, title in (
        ("Why are a beaver's teeth orange?", "Talking With a Beaver Ranger"),
        ("How long is the Amazon River?", "The Amazon in Numbers and Wonders"),
        ("Why do onions make you cry?", "Why Onions Make You Cry"),
    ):
        assert pages[index.best(question, 1)[0][0]].startswith(title)


# ---- the calculator --------------------------------------------------------------------------

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def oracle(node: ast.expr) -> Fraction | None:
    """Python's own reading of a sum; None where the calculator must refuse."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp):
        value = oracle(node.operand)
        return None if value is None else -value
    left, right = oracle(node.left), oracle(node.right)
    if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
        return None
    value = OPERATORS[type(node.op)](left, right)
    return value if max(abs(value.numerator), value.denominator) <= LARGEST else None


numbers = st.one_of(
    st.integers(0, 10**6).map(str),
    st.tuples(st.integers(0, 999), st.integers(0, 99)).map(lambda pair: f"{pair[0]}.{pair[1]:02}"),
)
sums = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", "*", " / "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=8,
)


@given(sums.filter(lambda text: len(text) <= LONGEST and sum(map(text.count, "(-")) <= DEEPEST))
@settings(max_examples=150, deadline=None)
def test_sums_come_out_as_python_reads_them(text):
    wanted = oracle(ast.parse(text, mode="eval").body)
    if wanted is None:
        with pytest.raises(CalculationError):
            calculate(text)
    else:
        assert calculate(text) == wanted


@given(st.text(alphabet="0123456789.+-*/() x_e,\n\u00b2\u0663", max_size=250))
@settings(max_examples=150, deadline=None)
def test_any_other_text_is_refused_in_a_sentence(text):
    try:
        value = calculate(text)
    except CalculationError as error:
        assert str(error).endswith(".")
    else:
        assert max(abs(value.numerator), value.denominator) <= LARGEST


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no number at its end"),
        ("2 +", "has no number at its end"),
        ("2 ** 3", r"has no number at '\* 3'"),
        ("__import__('os').getcwd()", "has no number at .__import__"),
        ("two", "has no number at 'two'"),
        ("7/(3-3)", "divides by zero"),
        ("2 3", "can't go on with '3'"),
        ("1)", r"can't go on with '\)'"),
        ("(1", "lacks a closing bracket"),
        ("(" * 100 + "1" + ")" * 99, "nested more than 20 deep"),
        ("-" * 100 + "1", "nested more than 20 deep"),
        ("9" * 16, "beyond 1,000,000,000,000,000"),
        ("99999999*99999999", "beyond"),
        ("1/99999999/99999999", "beyond"),
        ("1" * 201, "201 characters are too long"),
        ("\u0661 + 1", "has no number"),
    ],
)
def test_what_the_calculator_refuses(text, reason):
    with pytest.raises(CalculationError, match=reason):
        calculate(text)


def test_the_limits_themselves_are_allowed():
    deep = DEEPEST * "(" + "1" + DEEPEST * ")"
    assert calculate(deep) == 1
    assert calculate(f"{LARGEST} - 1") == LARGEST - 1
    assert calculate("1" + "+1" * 99 + " ") == 100


def test_numbers_are_shown_as_a_reader_wants_them():
    shown = {"6/3": "2", "-1/2": "-0.5", "1/3": "0.333333", "2/3": "0.666667", "100": "100"}
    shown |= {"1/10000000": "0", f"{LARGEST}": f"{LARGEST}", "0.1+0.2": "0.3"}
    for text, wanted in shown.items():
        assert show_number(calculate(text)) == wanted


# ---- the loop --------------------------------------------------------------------------------

PROMPT = [ByteTokenizer.user_id, ByteTokenizer.assistant_id]
STOP = {ByteTokenizer.end_id}


def reply(script: str, prompt=PROMPT, limits: Sampling = GREEDY, **options) -> str:
    """What comes out if the model wants to say `script`: a result stands where its `?` do."""
    model = ScriptedGPT([script])
    return answer_with_calculator(model, ByteTokenizer(), prompt, limits, stop=STOP, **options)


def test_a_call_is_followed_by_its_result():
    said = reply("So <calc>12*7</calc>?? nuts.")
    assert said == "So <calc>12*7</calc>84 nuts."


def test_the_model_reads_the_result():
    class Doubter(FakeGPT):
        """Calls, then says the last byte that it read once more."""

        def scores(self, ids):
            logits_V = torch.zeros(self.config.vocab_size)
            call = ByteTokenizer().encode("<calc>3+4</calc>")
            said = ids[len(PROMPT) :]
            if len(said) < len(call):
                logits_V[call[len(said)]] = 100.0
            else:
                logits_V[ids[-1] if len(said) == len(call) + 1 else ByteTokenizer.end_id] = 100.0
            return logits_V

    model = Doubter()
    assert answer_with_calculator(model, ByteTokenizer(), PROMPT, GREEDY, stop=STOP) == (
        "<calc>3+4</calc>77"
    )


def test_several_calls_and_their_limit():
    script = "<calc>1+1</calc>? <calc>2*3</calc>? end"
    assert reply(script, limits=Sampling(temperature=0, max_tokens=90)) == (
        "<calc>1+1</calc>2 <calc>2*3</calc>6 end"
    )
    assert reply(script, calls=1) == "<calc>1+1</calc>2"
    assert reply(script, calls=0) == ""


def test_results_are_not_counted_but_every_written_token_is():
    script = "<calc>10*10</calc>???ab"
    limits = [Sampling(temperature=0, max_tokens=count) for count in (18, 19, 5)]
    wanted = ["<calc>10*10</calc>100", "<calc>10*10</calc>100a", "<calc"]
    assert [reply(script, limits=limit) for limit in limits] == wanted


def test_a_failing_sum_gives_its_reason():
    script = "<calc>1/0</calc>" + "." * 60
    said = reply(script, limits=Sampling(temperature=0, max_tokens=90))
    assert said.startswith("<calc>1/0</calc>(The sum '1/0' divides by zero")


def test_a_closing_mark_alone_is_no_call():
    assert "has no number" in reply("2+2</calc>")


def test_a_context_that_results_have_filled_ends_the_reply():
    model = ScriptedGPT(["<calc>2*8</calc>??more"], context=len(PROMPT) + len("<calc>2*8</calc>16"))
    said = answer_with_calculator(model, ByteTokenizer(), PROMPT, GREEDY, stop=STOP)
    assert said == "<calc>2*8</calc>16"


def test_marks_in_the_prompt_are_only_text():
    typed = [PROMPT[0], *ByteTokenizer().encode("<calc>1+1</calc>"), PROMPT[1]]
    assert reply("No.", prompt=typed) == "No."


def test_each_token_is_read_once():
    model, caches = ScriptedGPT(["ab<calc>5*5</calc>??cd"]), []
    new_cache = model.new_cache
    model.new_cache = lambda *options: caches.append(new_cache(*options)) or caches[-1]
    said = answer_with_calculator(model, ByteTokenizer(), PROMPT, GREEDY, stop=STOP)
    assert said == "ab<calc>5*5</calc>25cd"
    assert len(caches) == 1 and sum(caches[0].fed) == len(PROMPT) + len(said)


# ---- rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 32, 16])
def test_no_weight_moves_by_more_than_half_a_step(bits, group):
    weights = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits))
    weights[2] = 0
    rounded = quantize(weights, bits, group)
    assert rounded.steps.dtype == torch.int8 and rounded.scales.dtype == torch.float16
    assert int(rounded.steps.abs().max()) == 2 ** (bits - 1) - 1
    half = rounded.scales.float().repeat_interleave(group or 64, dim=1) / 2
    # The scale itself is rounded to float16, so the largest weight may be cut by that much.
    slack = weights.abs().max() * 2**-10
    assert ((rounded.restore() - weights).abs() <= half + slack).all()
    assert not rounded.restore()[2].any()
    assert rounded.bytes == bits * weights.numel() / 8 + 2 * 6 * (64 // (group or 64))


def test_an_outlier_spoils_only_its_group():
    weights = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weights[0, 3] = 100
    shared, apart = (quantize(weights, 4, group).restore() for group in (None, 32))
    assert not shared[0, 32:].any(), "one scale: everybody else becomes zero"
    torch.testing.assert_close(apart[:, 32:], quantize(weights[:, 32:], 4).restore())


def test_eight_bits_a_row_is_what_checkpoints_store(tmp_path):
    model, path = stirred(), tmp_path / "one.safetensors"

    class Named:
        model = b"a tokenizer"

    save_model(path, model, stage="base", tokenizer=Named(), lineage={}, metrics={})
    stored = checkpoint.load(path).state
    rounded, size = quantized_model(model, 8)
    for name, weight in rounded.state_dict().items():
        # float16 keeps eleven bits of a scale; a step may tip over where it lies on the edge.
        step = stored[name].abs().amax(-1, keepdim=True) / 127
        assert ((weight - stored[name]).abs() <= 1.1 * step).all(), name
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = sum(weight.numel() for weight in model.parameters() if weight.ndim != 2)
    assert size == sum(w.numel() + 2 * len(w) for w in matrices) + 4 * vectors


def test_a_rounded_model_is_a_copy():
    model = stirred()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(20)[None]
    errors = [float((quantized_model(model, b)[0](ids) - model(ids)).norm()) for b in (8, 5, 3)]
    assert errors == sorted(errors) and errors[0] > 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_what_cannot_be_rounded():
    weights = torch.ones(2, 48)
    for bits, group in ((1, None), (9, None), (4, 32)):
        with pytest.raises(ConfigError, match=f"{bits} bits in groups of {group or 48}"):
            quantize(weights, bits, group)
    for wrong in (math.inf, math.nan, 1e9):
        with pytest.raises(ConfigError, match="too large"):
            quantize(weights * wrong, 4)


# ---- guessing ahead --------------------------------------------------------------------------


class Table(FakeGPT):
    """Scores that depend on the last two tokens and the place, drawn once from a seed."""

    def __init__(self, seed: int, vocab_size: int = 3):
        super().__init__(vocab_size=vocab_size, context=64)
        self._scores = torch.randn(
            8, vocab_size, vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)
        )

    def scores(self, ids):
        return 1.5 * self._scores[len(ids) % 8, ids[-2] if len(ids) > 1 else 0, ids[-1]]


def courses(monkeypatch, run):
    """Every course that the dice can take through `run`: (what came out, its probability)."""
    waiting: list[list[int]] = [[]]
    while waiting:
        given_choices, taken, chance = waiting.pop(), [], 1.0

        def draw(weights_V, generator, fixed=given_choices, taken=taken):
            nonlocal chance
            shares = (weights_V / weights_V.sum()).tolist()
            possible = [number for number, share in enumerate(shares) if share > 0]
            if len(taken) < len(fixed):
                choice = fixed[len(taken)]
            else:
                choice = possible[0]
                waiting.extend([*taken, other] for other in possible[1:])
            taken.append(choice)
            chance *= shares[choice]
            return choice

        monkeypatch.setattr(beyond, "_draw", draw)
        yield run(), chance


def distance(one: dict, other: dict) -> float:
    """Total variation: half of what the probabilities differ by."""
    return sum(abs(one.get(key, 0) - other.get(key, 0)) for key in {*one, *other}) / 2


def plain_distribution(model, ids, sampling, stop=()):
    """What `generate` does, added up over all replies."""
    finished: dict[tuple[int, ...], float] = defaultdict(float)
    open_ones = {(): 1.0}
    for _ in range(sampling.max_tokens):
        longer: dict[tuple[int, ...], float] = defaultdict(float)
        for reply_so_far, chance in open_ones.items():
            logits_V = model.scores([*ids, *reply_so_far])
            shares = filter_logits(logits_V[None], sampling)[0].softmax(-1).tolist()
            for token, share in enumerate(shares):
                if token in stop:
                    finished[reply_so_far] += chance * share
                else:
                    longer[*reply_so_far, token] += chance * share
        open_ones = longer
    return {key: value for key, value in (finished | open_ones).items() if value}


@pytest.mark.parametrize(
    ("sampling", "guesses", "stop"),
    [
        (Sampling(temperature=1, top_p=1, max_tokens=3), 1, ()),
        (Sampling(temperature=1, top_p=1, max_tokens=3), 2, ()),
        (Sampling(temperature=0.7, top_p=0.9, max_tokens=3), 2, ()),
        (Sampling(temperature=1.3, top_k=2, top_p=1, max_tokens=4), 3, ()),
        (Sampling(temperature=1, top_p=1, max_tokens=3), 2, (2,)),
    ],
)
def test_the_distribution_is_exactly_that_of_plain_sampling(monkeypatch, sampling, guesses, stop):
    model, draft = Table(1), Table(2)
    ids = [0, 1]

    def run():
        passes = speculate(model, draft.scores, ids, sampling, guesses=guesses, stop=stop)
        return tuple(itertools.chain.from_iterable(passes))

    found: dict[tuple[int, ...], float] = defaultdict(float)
    for reply_tokens, chance in courses(monkeypatch, run):
        found[reply_tokens] += chance
    wanted = plain_distribution(model, ids, sampling, stop)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert distance(found, wanted) < 1e-5
    # The same test must see a wrong rule: here the one that trusts the draft.
    monkeypatch.setattr(beyond, "keep_or_replace", lambda p_V, q_V, token, generator: token)
    trusting: dict[tuple[int, ...], float] = defaultdict(float)
    for reply_tokens, chance in courses(monkeypatch, run):
        trusting[reply_tokens] += chance
    assert distance(trusting, wanted) > 0.02


def test_real_dice_agree_too():
    p_V, q_V = torch.tensor([0.1, 0.6, 0.3, 0.0]), torch.tensor([0.4, 0.1, 0.25, 0.25])
    dice, count = torch.Generator().manual_seed(5), 4000
    drawn = torch.multinomial(q_V, count, replacement=True, generator=dice).tolist()
    seen = Counter(keep_or_replace(p_V, q_V, token, dice) for token in drawn)
    assert seen[3] == 0
    chi_squared = sum(
        (seen[n] - count * p) ** 2 / (count * p) for n, p in enumerate([0.1, 0.6, 0.3])
    )
    assert chi_squared < 13.8  # p < 0.001 with two degrees of freedom


def test_equal_probabilities_keep_the_guess():
    p_V, dice = torch.tensor([0.3, 0.7]), torch.Generator().manual_seed(0)
    assert all(keep_or_replace(p_V, p_V, token, dice) == token for token in (0, 1) * 20)
    # Smaller everywhere by a rounding error: there is nothing to draw from instead.
    assert keep_or_replace(p_V * 0, p_V, 1, dice) == 1


@pytest.mark.parametrize("guesses", [1, 3, 8])
def test_greedy_text_is_the_same_token_for_token(guesses):
    model, draft_model = stirred(0), stirred(1)
    counts = TokenCounts([list(range(7, 60))], SHAPE.vocab_size)

    def other(ids):
        return draft_model(torch.tensor([ids]))[0, -1]

    def itself(ids):
        return model(torch.tensor([ids]))[0, -1]

    plain = list(generate(model, [1, 2, 3], GREEDY))
    for draft in (counts, other, itself):
        passes = list(speculate(model, draft, [1, 2, 3], GREEDY, guesses=guesses))
        assert list(itertools.chain.from_iterable(passes)) == plain
        assert all(1 <= len(new) <= guesses + 1 for new in passes)
    assert len(passes) == math.ceil(40 / (guesses + 1)), "a perfect draft: every guess stands"


def test_stop_tokens_limits_and_the_end_of_the_context():
    model = ScriptedGPT(["abcdef"])
    text = ByteTokenizer()

    def perfect(ids):
        return model.scores(list(ids))

    said = list(speculate(model, perfect, PROMPT, GREEDY, guesses=4, stop=STOP))
    assert [text.decode(new) for new in said] == ["abcde", "f"]
    short = Sampling(temperature=0, max_tokens=3)
    assert [text.decode(new) for new in speculate(model, perfect, PROMPT, short)] == ["abc"]
    narrow = ScriptedGPT(["abcdef"], context=5)
    assert [text.decode(new) for new in speculate(narrow, perfect, PROMPT, GREEDY)] == ["abc"]


def test_no_token_is_read_twice_unless_a_guess_fell():
    model, caches = ScriptedGPT(["abcdefghij"]), []
    new_cache = model.new_cache
    model.new_cache = lambda *options: caches.append(new_cache(*options)) or caches[-1]
    list(speculate(model, model.scores, PROMPT, GREEDY, guesses=4, stop=STOP))
    # The first pass reads the prompt; each next one the token that the pass before added itself.
    assert caches[0].fed == [2 + 4, 1 + 4, 1 + 4]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "0 tokens"),
        ([1], {"guesses": 0}, "0 guesses"),
        ([1] * 96, {}, "96 tokens, the model reads 96"),
        ([1], {"sampling": Sampling(repetition_penalty=1.2)}, "repetition penalty"),
        ([1], {"sampling": Sampling(drafts=8)}, "choose among 8 drafts"),
    ],
)
def test_what_speculation_refuses(ids, options, message):
    options = {"sampling": GREEDY} | options
    with pytest.raises(ConfigError, match=message):
        next(speculate(stirred(), TokenCounts([[1]], SHAPE.vocab_size), ids, **options))


def test_counts_by_hand():
    draft = TokenCounts([[0, 1, 0, 1, 2], []], vocab_size=4, order=3)
    alone = torch.tensor([3, 3, 2, 1]) / 9  # as if each had been seen once before
    torch.testing.assert_close(draft([]).exp(), alone)
    torch.testing.assert_close(draft([3]).exp(), alone)
    # After 1: once 0, once 2; after 0 1 as well. Each knows two thirds of it.
    after_1 = alone / 3 + torch.tensor([1, 0, 1, 0]) / 3
    torch.testing.assert_close(draft([1]).exp(), after_1)
    after_01 = after_1 / 3 + torch.tensor([1, 0, 1, 0]) / 3
    torch.testing.assert_close(draft([3, 0, 1]).exp(), after_01)
    torch.testing.assert_close(draft([0, 1, 0]).exp().sum(), torch.tensor(1.0))


def test_with_the_shipped_model():
    model, tokenizer, _ = load_model(checkpoint.find("base"))
    ids = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    settings = Sampling(temperature=0, max_tokens=12)
    draft = TokenCounts([tokenizer.encode(explanations()[0].text)], tokenizer.vocab_size)
    passes = list(speculate(model, draft, ids, settings))
    plain = list(generate(model, ids, settings))
    joined = list(itertools.chain.from_iterable(passes))
    # Sums in another order round differently: where the texts part, two tokens were equally good.
    for place, (one, other) in enumerate(zip(joined, plain, strict=True)):
        if one != other:
            logits_V = model(torch.tensor([ids + plain[:place]]))[0, -1]
            assert abs(float(logits_V[one] - logits_V[other])) < 1e-3
            break
