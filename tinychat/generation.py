"""Turn the scores of a GPT into text: choose, remember, stream.

Generated from chapters/08_generation.py: edit that file,
then run `python -m tinychat.book export`.
"""

import codecs
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.gpt import GPT, KVCache
from tinychat.runtime.errors import ConfigError
from tinychat.tokenizer import Tokenizer


MOST_DRAFTS = 64  # their notes take memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises ConfigError for values that make no sense."""

    temperature: float = 0.5
    "logits are divided by it: below 1 surer, above 1 wilder, 0 always takes the best token"
    top_k: int = 0
    "only the k best tokens stay; 0 switches it off"
    top_p: float = 0.95
    "the smallest set with at least this probability stays (Holtzman et al. 2020); 1 is off"
    min_p: float = 0.0
    "tokens below this share of the best one's probability go (Nguyen et al. 2024); 0 is off"
    repetition_penalty: float = 1.0
    "makes tokens of this reply less likely to come again (Keskar et al. 2019); 1 is off"
    drafts: int = 1
    "replies drawn side by side, of which the surest is said (Adiwardana et al. 2020); 1 is off"
    max_tokens: int = 200
    "longest reply in tokens"
    seed: int | None = None
    "same seed, same reply; None draws a fresh one"

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive whole number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            ("drafts", 1 <= self.drafts <= MOST_DRAFTS, f"from 1 (off) to {MOST_DRAFTS}"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2^63"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {wanted}.")

    @property
    def greedy(self) -> bool:
        """True when no dice are thrown."""
        return self.temperature == 0

    @property
    def side_by_side(self) -> int:
        """How many drafts are written: one without dice, since they would all be the same."""
        return 1 if self.greedy else self.drafts


# Sorting all 8,192 scores takes longer than the whole nano model; the best few nearly always hold
# enough, and where they don't, everything is sorted after all.
SHORTLIST = 256


def keep_top(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the k best tokens, then of these the smallest set with `top_p` of their probability.

    Everything else becomes -inf. Ties are cut too, so that never more than k tokens stay; the
    best token always stays.
    """
    V = logits_BV.shape[-1]
    best_BK, ids_BK = logits_BV.topk(min(top_k or SHORTLIST, V))
    whole_B1 = (best_BK if top_k else logits_BV).logsumexp(dim=-1, keepdim=True)
    probabilities_BK = (best_BK - whole_B1).exp()
    if not top_k and best_BK.shape[1] < V and float(probabilities_BK.sum(-1).min()) <= top_p:
        best_BK, ids_BK = logits_BV.topk(V)
        probabilities_BK = (best_BK - whole_B1).exp()
    if top_p < 1:
        # A token goes when those before it already hold enough.
        before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        too_many_BK = before_BK >= top_p
        too_many_BK[:, 0] = False
        best_BK = best_BK.masked_fill(too_many_BK, -math.inf)
    return torch.full_like(logits_BV, -math.inf).scatter(1, ids_BK, best_BK)


def keep_likely(logits_BV: Tensor, min_p: float) -> Tensor:
    """Keep the tokens with at least `min_p` times the probability of the best one.

    A ratio of probabilities is a difference of logits, so this needs no softmax and no sorting.
    """
    floor_B1 = logits_BV.amax(dim=-1, keepdim=True) + math.log(min_p)
    return logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)


def penalize(logits_BV: Tensor, history_BT: Tensor, penalty: float) -> Tensor:
    """Push the scores of the tokens in `history_BT` down, whichever sign they have.

    A token counts once, however often it came (Keskar et al. 2019, section 4.1).
    """
    seen_BT = logits_BV.gather(1, history_BT)
    seen_BT = torch.where(seen_BT > 0, seen_BT / penalty, seen_BT * penalty)
    return logits_BV.scatter(1, history_BT, seen_BT)


def filter_logits(
    logits_BV: Tensor, sampling: Sampling, history_BT: Tensor | None = None
) -> Tensor:
    """Return new logits whose softmax is the distribution to draw from, always in this order.

    1. repetition penalty, 2. temperature, 3. top-k, 4. top-p, 5. min-p. Each filter sees what the
    one before left. Temperature 0 leaves the single best token.
    """
    # 1. repetition penalty
    if sampling.repetition_penalty != 1 and history_BT is not None:
        logits_BV = penalize(logits_BV, history_BT, sampling.repetition_penalty)
    # 2. temperature
    if sampling.greedy:
        return keep_top(logits_BV, 1, 1.0)
    if sampling.temperature != 1:
        # The best score moves to 0 first: a tiny temperature then can't overflow to inf.
        logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
        logits_BV = logits_BV / max(sampling.temperature, 1e-6)
    # 3. top-k and 4. top-p
    if sampling.top_k or sampling.top_p < 1:
        logits_BV = keep_top(logits_BV, sampling.top_k, sampling.top_p)
    # 5. min-p
    if sampling.min_p:
        logits_BV = keep_likely(logits_BV, sampling.min_p)
    return logits_BV


def draw_tokens(probabilities_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row, `[B]`; one of probability 0 never comes.

    The point on the row's cumulative sum is above 0 and at most the whole sum, so that the first
    rung that reaches it has a height. Rows need not add up to one.
    """
    sums_BV = probabilities_BV.cumsum(-1)
    dice_B1 = 1 - torch.rand(len(sums_BV), 1, generator=generator, device=sums_BV.device)
    return torch.searchsorted(sums_BV, dice_B1 * sums_BV[:, -1:])[:, 0]


def sample(
    logits_BV: Tensor,
    sampling: Sampling,
    *,
    history_BT: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the next token of each row, `[B]`."""
    if sampling.greedy:
        if sampling.repetition_penalty != 1 and history_BT is not None:
            logits_BV = penalize(logits_BV, history_BT, sampling.repetition_penalty)
        return logits_BV.argmax(dim=-1)
    probabilities_BV = filter_logits(logits_BV, sampling, history_BT).softmax(dim=-1)
    return draw_tokens(probabilities_BV, generator)


def make_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return dice for `device`: the same for the same seed, fresh ones for None."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def next_logits(
    model: GPT, ids_BT: Tensor, cache: KVCache | None = None, segments_BT: Tensor | None = None
) -> Tensor:
    """Return the scores of the token after the last one, `[B, V]`, float32.

    The scores after the tokens before it would be thrown away, so they are never computed: the
    vocabulary is the largest matrix of a small model.
    """
    h_BTD = model.hidden(ids_BT, cache=cache, segments_BT=segments_BT)
    return F.linear(h_BTD[:, -1], model.embed.weight).float()


def generate(
    model: GPT,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    pauses: Collection[int] = (),
    keep_stop: bool = False,
    cache: KVCache | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the tokens of one reply to `ids`, each as soon as it is chosen.

    Several `sampling.drafts` are compared at every token of `pauses` (see `sentence_ends`), and
    what the surest of them says comes at once. Ends before a token of `stop` (which is yielded only
    with `keep_stop`), after `max_tokens`, or when prompt and reply fill the cache. A `cache` may
    hold a beginning of `ids` from earlier turns: only the rest is read (Pope et al. 2022); `rewind`
    makes sure that it is one. Afterwards it holds the prompt and the reply up to the last token but
    one. Raises ConfigError at once when the prompt is empty or leaves no room for a reply.
    """
    if not ids:
        raise ConfigError("The prompt is empty; give the model at least one token to go on from.")
    if cache is None:
        cache = model.new_cache(1, len(ids) + sampling.max_tokens)
    room = cache.capacity - len(ids)
    if room < 1:
        raise ConfigError(
            f"The prompt is {len(ids)} tokens long and the model reads {cache.capacity}; "
            "shorten it so that a reply fits too."
        )
    # At least one token must be read, because its scores choose the first of the reply.
    cache.truncate(min(cache.length, len(ids) - 1))
    if generator is None:
        generator = make_generator(sampling.seed, model.device)
    limit = min(sampling.max_tokens, room)
    reply = _decode(model, ids, sampling, stop, pauses, cache, generator, limit)
    return reply if keep_stop else takewhile(lambda token: token not in stop, reply)


@torch.inference_mode()
def _decode(
    model: GPT,
    ids: Sequence[int],
    sampling: Sampling,
    stop: Collection[int],
    pauses: Collection[int],
    cache: KVCache,
    generator: torch.Generator,
    limit: int,
) -> Iterator[int]:
    """The loop of `generate`, after its checks; the token that ends the reply comes, too."""
    unread_1T = torch.tensor([ids[cache.length :]], device=model.device)
    logits_1V = next_logits(model, unread_1T, cache)
    if sampling.side_by_side > 1:
        yield from _draft(model, logits_1V, sampling, stop, pauses, cache, generator, limit)
        return
    for _, drawn in _draw(model, logits_1V, sampling, stop, cache, generator, limit):
        yield drawn[0]


def _draw(
    model: GPT,
    logits_BV: Tensor,
    sampling: Sampling,
    stop: Collection[int],
    cache: KVCache,
    generator: torch.Generator,
    limit: int,
    begun: Sequence[int] = (),
    leave: bool = False,
) -> Iterator[tuple[Tensor, dict[int, int]]]:
    """Draw a token for each row and step, from the scores of the first on.

    Yields the scores, and the token of each row that has not stopped before. Ends when all have, or
    after `limit` steps; the last token of a row is drawn but never read. `begun` is what a reply
    that goes on said before: a penalty for repeating counts it. With `leave`, rows that have
    stopped leave the batch and the cache as soon as they are half of it.
    """
    begun_BT = torch.tensor([begun], dtype=torch.long).expand(len(logits_BV), -1)
    drawn_BT = F.pad(begun_BT, (0, limit)).to(model.device)
    rows = list(range(len(logits_BV)))  # what the batch still holds
    running = set(rows)
    for step in range(len(begun), len(begun) + limit):
        if step > len(begun):
            logits_BV = next_logits(model, drawn_BT[:, step - 1 : step], cache)
        history_BT = drawn_BT[:, :step] if step else None
        chosen_B = sample(logits_BV, sampling, history_BT=history_BT, generator=generator)
        drawn_BT[:, step] = chosen_B
        tokens = zip(rows, chosen_B.tolist(), strict=True)
        drawn = {row: token for row, token in tokens if row in running}
        yield logits_BV, drawn
        running -= {row for row, token in drawn.items() if token in stop}
        if not running:
            return
        if leave and len(running) <= len(rows) // 2:
            rows, places_B = drop_stopped(cache, rows, running, model.device)
            drawn_BT = drawn_BT[places_B]


def drop_stopped(
    cache: KVCache, rows: Sequence[int], running: Collection[int], device: torch.device
) -> tuple[list[int], Tensor]:
    """Keep only the `running` of the `rows` that a cache holds; return them and their places."""
    places = [place for place, row in enumerate(rows) if row in running]
    places_B = torch.tensor(places, device=device)
    cache.keep(places_B)
    return [rows[place] for place in places], places_B


def rewind(cache: KVCache, held: Sequence[int], ids: Sequence[int]) -> int:
    """Cut the cache back to what it shares with the new prompt `ids`; return how much that is.

    `held` are the tokens that were fed to the cache, in order (it may be longer than the cache:
    a reply's last token is chosen but never read).
    """
    shared = 0
    for old, new in zip(held[: cache.length], ids, strict=False):
        if old != new:
            break
        shared += 1
    cache.truncate(shared)
    return shared


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    pauses: Collection[int] = (),
    keep_stop: bool = False,
    rows: int = 32,
    pad_id: int = 0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Return one reply a prompt, in their order; for evaluation and samples.

    Prompts of similar length share a batch of at most `rows`. The shorter ones are padded on the
    left in a segment of their own that no real token looks at. `keep_stop` leaves the token that
    ended a reply at its end. A row stops early when the longest of its batch fills the context.
    Replies with several `sampling.drafts`, compared at `pauses`, are written one after another:
    their drafts are a batch already.
    """
    if not all(prompts):
        raise ConfigError("A prompt is empty; give the model at least one token to go on from.")
    if generator is None:
        generator = make_generator(sampling.seed, model.device)
    replies: list[list[int]] = [[] for _ in prompts]
    if sampling.side_by_side > 1:
        for number, prompt in enumerate(prompts):
            said = generate(
                model,
                prompt,
                sampling,
                stop=stop,
                pauses=pauses,
                keep_stop=keep_stop,
                generator=generator,
            )
            replies[number] = list(said)
        return replies
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        group = [prompts[number] for number in numbers]
        found = _decode_batch(model, group, sampling, stop, pad_id, generator)
        for number, reply in zip(numbers, found, strict=True):
            ended = reply[-1] in stop and not keep_stop
            replies[number] = reply[:-1] if ended else reply
    return replies


def _decode_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int],
    pad_id: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """One batch of `generate_batch`."""
    longest = max(len(prompt) for prompt in prompts)
    cache = model.new_cache(len(prompts), longest + sampling.max_tokens)
    limit = min(sampling.max_tokens, cache.capacity - longest)
    if limit < 1:
        raise ConfigError(
            f"A prompt is {longest} tokens long and the model reads {cache.capacity}; "
            "shorten it so that a reply fits too."
        )
    # 1. pad on the left: the last token of every row must be its newest
    padding = [longest - len(prompt) for prompt in prompts]
    unread_BT = torch.tensor(
        [[pad_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)],
        device=model.device,
    )
    segments_BT = None
    if any(padding):
        starts_B1 = torch.tensor(padding, device=model.device)[:, None]
        segments_BT = (torch.arange(longest, device=model.device) >= starts_B1).long()
    # 2. one token a row and step, until every row has stopped
    logits_BV = next_logits(model, unread_BT, cache, segments_BT)
    replies: list[list[int]] = [[] for _ in prompts]
    steps = _draw(model, logits_BV, sampling, stop, cache, generator, limit, leave=True)
    for _, drawn in steps:
        for row, token in drawn.items():
            replies[row].append(token)
    return replies


SENTENCE_END = re.compile(r"""[.!?。！？]["'”’)\]]*\s*$""")


def sentence_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a sentence: a full stop, `!"` and their like."""
    pieces = (
        tokenizer.token_bytes(id).decode(errors="replace") for id in range(tokenizer.vocab_size)
    )
    return frozenset(id for id, piece in enumerate(pieces) if SENTENCE_END.search(piece))


class Draft(NamedTuple):
    """What may be said next, with the token that ended it, and the sum of its log-probs."""

    tokens: list[int]
    logprob: float


def surest(drafts: Sequence[Draft], ends: Collection[int]) -> Draft:
    """The likeliest a token, of those that say something and come to an end, if any do."""
    return max(
        drafts,
        key=lambda one: (
            one.tokens[0] not in ends,
            one.tokens[-1] in ends,
            one.logprob / len(one.tokens),
        ),
    )


def _draft(
    model: GPT,
    logits_1V: Tensor,
    sampling: Sampling,
    stop: Collection[int],
    pauses: Collection[int],
    cache: KVCache,
    generator: torch.Generator,
    limit: int,
) -> Iterator[int]:
    """Yield a reply sentence by sentence, the surest of several drafts of each."""
    reply: list[int] = []
    ends = {*stop, *pauses}
    while True:
        # 1. the notes of what is said already, one copy a draft
        begin = cache.length
        left = limit - len(reply)
        many = cache.copies(sampling.drafts, begin + left)
        # 2. one token a draft and step, until every draft has come to its end
        logits_DV = logits_1V.expand(sampling.drafts, -1)
        tokens: list[list[int]] = [[] for _ in logits_DV]
        logprobs = [0.0 for _ in logits_DV]
        for scores_DV, drawn in _draw(
            model, logits_DV, sampling, ends, many, generator, left, reply
        ):
            rows, chosen = list(drawn), list(drawn.values())
            sure = scores_DV[rows, chosen] - scores_DV.logsumexp(-1)[rows]
            for row, token, logprob in zip(rows, chosen, sure.tolist(), strict=True):
                tokens[row].append(token)
                logprobs[row] += logprob
        drafts = [Draft(*one) for one in zip(tokens, logprobs, strict=True)]
        said = surest(drafts, ends)
        # 3. the notes of the surest; its last token has been drawn, and not been read
        cache.follow(many, drafts.index(said), begin + len(said.tokens) - 1)
        reply += said.tokens
        yield from said.tokens
        if reply[-1] in stop or len(reply) == limit:
            return
        # 4. is this all? Drawn once; where it isn't, no draft may end before it begins
        logits_1V = next_logits(model, torch.tensor([reply[-1:]], device=model.device), cache)
        said_1T = torch.tensor([reply], device=model.device)
        last = int(sample(logits_1V, sampling, history_BT=said_1T, generator=generator))
        if last in stop:
            yield last
            return
        logits_1V[:, list(stop)] = -torch.inf


class TextStream:
    """Turns tokens into text as they come, and never shows half a character.

    A token holds bytes, and a character may span several tokens. The pieces joined are always
    exactly `tokenizer.decode` of all the tokens: bytes that can't become a character turn into
    U+FFFD, and an unfinished one at the end into a single U+FFFD, by `flush`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take one token; return the characters that it completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what is left at the end of the text, and be ready for the next one."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the control tokens: whichever of them comes, the reply is over.

    A good model ends with `<|end|>`. A poor one may start the next user turn by itself, and
    nobody wants to read that.
    """
    return frozenset(
        {
            tokenizer.pad_id,
            tokenizer.bos_id,
            tokenizer.end_id,
            tokenizer.system_id,
            tokenizer.user_id,
            tokenizer.assistant_id,
        }
    )


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] | None = None,
    cache: KVCache | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the reply to `ids` as pieces of text, never empty and never half a character.

    `stop` is every control token when None; drafts are compared at the end of each sentence. The
    rest as in `generate`.
    """
    stop = stop_ids(tokenizer) if stop is None else stop
    pauses = sentence_ends(tokenizer)
    tokens = generate(
        model, ids, sampling, stop=stop, pauses=pauses, cache=cache, generator=generator
    )
    return _text_of(tokens, TextStream(tokenizer))


def _text_of(tokens: Iterator[int], text: TextStream) -> Iterator[str]:
    for token in tokens:
        if piece := text.push(token):
            yield piece
    if piece := text.flush():
        yield piece
