"""Get more out of a finished model: show, think, look up, calculate, shrink, guess ahead.

Generated from chapters/14_beyond.py: edit that file,
then run `python -m tinychat.book export`.
"""

import copy
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.evaluation import words_of
from tinychat.generation import Sampling, filter_logits, generate, make_generator, rewind
from tinychat.gpt import GPT
from tinychat.runtime.errors import ConfigError, TinychatError
from tinychat.tokenizer import Tokenizer


class BM25:
    """Finds the texts that a question is about, by their words (Robertson and Zaragoza 2009).

    The weight of a word has the 1 inside the logarithm, so that none is negative.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(words_of(text)) for text in texts]
        if not any(counts):
            raise ConfigError("There is no word to search for; give at least one text.")
        mean = sum(count.total() for count in counts) / len(counts)
        self.size = len(counts)
        self.places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        "for each word: the texts that hold it, and how much it counts there"
        for number, count in enumerate(counts):
            length = 1 - b + b * count.total() / mean
            for word, times in count.items():
                self.places[word].append((number, times * (k1 + 1) / (times + k1 * length)))

    def best(self, question: str, count: int) -> list[tuple[int, float]]:
        """Return up to `count` texts as (number, score), best first; none that shares no word."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(words_of(question)):
            places = self.places.get(word, ())
            rarity = math.log(1 + (self.size - len(places) + 0.5) / (len(places) + 0.5))
            for number, weight in places:
                scores[number] += rarity * weight
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:count]


class CalculationError(TinychatError):
    """A sum that the calculator refuses, in one sentence that says why."""


LONGEST = 200  # characters
DEEPEST = 20  # brackets and minus signs inside each other
LARGEST = 10**15  # above the line or below it
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?|\.[0-9]+")
OPEN, CLOSE = "<calc>", "</calc>"  # around a sum that a model wants to have worked out


class _Sum:
    """Reads an expression from left to right, by one method for each line of the grammar."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def refuse(self, reason: str) -> CalculationError:
        return CalculationError(f"The sum {self.text!r} {reason}.")

    def rest(self) -> str:
        """What is not read yet, without leading spaces."""
        rest = self.text[self.place :].lstrip()
        self.place = len(self.text) - len(rest)
        return rest

    def take(self, signs: str) -> str:
        """Read the next character if it is one of these."""
        found = self.rest()[:1]
        self.place += found in set(signs)
        return found if found in set(signs) else ""

    def checked(self, value: Fraction) -> Fraction:
        if max(abs(value.numerator), value.denominator) > LARGEST:
            raise self.refuse(f"needs a number beyond {LARGEST:,}, use smaller ones")
        return value

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while sign := self.take("+-"):
            other = self.product(depth)
            value = self.checked(value + other if sign == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self.take("*/"):
            other = self.factor(depth)
            if sign == "/" and other == 0:
                raise self.refuse("divides by zero, which has no answer")
            value = self.checked(value * other if sign == "*" else value / other)
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise self.refuse(f"is nested more than {DEEPEST} deep, make it plainer")
        if self.take("-"):
            return -self.factor(depth + 1)
        if self.take("("):
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise self.refuse("lacks a closing bracket, add it")
            return value
        found = NUMBER.match(rest := self.rest())
        if not found:
            where = f"at {rest[:12]!r}" if rest else "at its end"
            raise self.refuse(f"has no number {where}; it takes numbers, + - * / and ( )")
        self.place += found.end()
        return self.checked(Fraction(found[0]))


def calculate(text: str) -> Fraction:
    """Work out a sum with + - * / and brackets, exactly; raises CalculationError.

    Nothing is ever run: the text is data, and so may come from a model or from a stranger.
    """
    if len(text) > LONGEST:
        raise CalculationError(f"{len(text)} characters are too long a sum; at most {LONGEST}.")
    reading = _Sum(text)
    value = reading.sum(0)
    if rest := reading.rest():
        raise reading.refuse(f"can't go on with {rest[:12]!r}, put + - * / between numbers")
    return value


def show_number(value: Fraction) -> str:
    """`3`, `-0.5` or `0.333333`: rounded to six digits after the point."""
    return f"{Decimal(round(value * 10**6)).scaleb(-6).normalize():f}"


def result_of(expression: str) -> str:
    """What goes behind a call: the number, or in brackets why there is none."""
    try:
        return show_number(calculate(expression))
    except CalculationError as error:
        return f"({error})"


def answer_with_calculator(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    calls: int = 4,
) -> str:
    """Return a reply in which every `<calc>...</calc>` is followed by its result.

    The results are not counted in `max_tokens`. After `calls` calls the reply is over.
    """
    cache = model.new_cache()
    generator = make_generator(sampling.seed, model.device)
    reply, held, left = "", list(ids), sampling.max_tokens
    while left and calls > 0:
        prompt = [*ids, *tokenizer.encode(reply)]
        if reply and len(prompt) >= cache.capacity:
            break  # the results have filled the context
        rewind(cache, held, prompt)
        tokens: list[int] = []
        said, limited = "", replace(sampling, max_tokens=left)
        for token in generate(model, prompt, limited, stop=stop, cache=cache, generator=generator):
            tokens.append(token)
            said = tokenizer.decode(tokens)
            if CLOSE in said:
                break
        held, left, calls = prompt + tokens, left - len(tokens), calls - 1
        said, closed, _ = said.partition(CLOSE)  # what a token holds behind the mark is dropped
        reply += said + closed
        if not closed:
            break
        _, opened, expression = said.rpartition(OPEN)
        reply += result_of(expression if opened else "")
    return reply


@dataclass(frozen=True)
class Quantized:
    """A matrix as small whole numbers, with a scale for each group of neighbours in a row."""

    steps: Tensor
    "int8, [rows, columns]"
    scales: Tensor
    "float16, [rows, columns / group]"
    bits: int

    def restore(self) -> Tensor:
        """The weights as float32: steps times scales."""
        rows, groups = self.scales.shape
        scaled = self.steps.float().view(rows, groups, -1) * self.scales.float()[..., None]
        return scaled.view(rows, -1)

    @property
    def bytes(self) -> float:
        """What it takes with the steps packed side by side."""
        return self.bits / 8 * self.steps.numel() + 2 * self.scales.numel()


def quantize(weights: Tensor, bits: int, group: int | None = None) -> Quantized:
    """Round a matrix to the nearest of 2^bits - 1 steps; `group` weights share a scale, or a row.

    Symmetric: the largest weight of a group becomes the last step, zero stays zero.
    """
    rows, columns = weights.shape
    group = group or columns
    if not 2 <= bits <= 8 or columns % group:
        raise ConfigError(f"{bits} bits in groups of {group}: take 2 to 8, a divisor of {columns}.")
    last = 2 ** (bits - 1) - 1
    grouped = weights.detach().float().reshape(rows, -1, group)
    scales = (grouped.abs().amax(-1) / last).half()
    if not scales.isfinite().all():
        raise ConfigError("A weight is too large for a scale in float16, or not a number.")
    # By the scale as it is stored: rounding must undo what restoring does. An empty group has 0.
    divisor = torch.where(scales > 0, scales, 1.0).float()[..., None]
    steps = (grouped / divisor).round().clamp(-last, last).to(torch.int8)
    return Quantized(steps.view(rows, columns), scales, bits)


def quantized_model(model: GPT, bits: int, group: int | None = None) -> tuple[GPT, float]:
    """A copy whose matrices were rounded and restored, and the bytes that they would take."""
    rounded, size = copy.deepcopy(model), 0.0
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.ndim == 2:
                quantized = quantize(weight, bits, group)
                weight.copy_(quantized.restore())
                size += quantized.bytes
            else:
                size += 4 * weight.numel()
    return rounded, size


Draft = Callable[[Sequence[int]], Tensor]  # tokens so far -> logits [V] of the next


class TokenCounts:
    """A draft that costs almost nothing: what followed the last few tokens in some texts.

    A context seen n times takes n / (n + 1) of the guess, shorter ones share the rest.
    """

    def __init__(self, texts: Iterable[Sequence[int]], vocab_size: int, order: int = 4) -> None:
        alone_V = torch.ones(vocab_size)  # as if each token had been seen once
        self.after: dict[tuple[int, ...], dict[int, int]] = {}
        for text in texts:
            ids = torch.tensor(text, dtype=torch.long)
            alone_V += torch.bincount(ids, minlength=vocab_size)
            for place, token in enumerate(text):
                for length in range(1, min(order, place + 1)):
                    seen = self.after.setdefault(tuple(text[place - length : place]), {})
                    seen[token] = seen.get(token, 0) + 1
        self.alone_V, self.order = alone_V / alone_V.sum(), order

    def __call__(self, ids: Sequence[int]) -> Tensor:
        p_V = self.alone_V.clone()
        for length in range(1, min(self.order, len(ids) + 1)):
            seen = self.after.get(tuple(ids[len(ids) - length :]))
            if seen is None:
                break
            times = sum(seen.values())
            p_V *= 1 / (times + 1)
            p_V[list(seen)] += torch.tensor(list(seen.values())) / (times + 1)
        return p_V.log()


def _draw(weights_V: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights_V, 1, generator=generator))


def keep_or_replace(p_V: Tensor, q_V: Tensor, token: int, generator: torch.Generator) -> int:
    """Turn a token that was drawn from q into one that is drawn from p (Leviathan et al. 2023)."""
    kept = min(1.0, float(p_V[token] / q_V[token]))
    if _draw(p_V.new_tensor([1 - kept, kept]), generator):
        return token
    left_V = (p_V - q_V).clamp(min=0)
    # Where p and q differ in the last bit only, there may be nothing left to draw from.
    return _draw(left_V, generator) if float(left_V.sum()) > 0 else token


@torch.inference_mode()
def speculate(
    model: GPT,
    draft: Draft,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    guesses: int = 4,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """Yield the new tokens of each pass of `model`: together, a reply as `generate` would draw it.

    The draft only changes how many passes it takes. A penalty for repeating would change the
    distribution from one guess to the next, and drafts to choose from are several replies: both are
    refused with ConfigError.
    """
    if sampling.repetition_penalty != 1:
        raise ConfigError("Speculation can't repeat a repetition penalty exactly; set it to 1.")
    if sampling.side_by_side != 1:
        raise ConfigError(
            f"Speculation writes one reply and can't choose among {sampling.drafts} drafts; "
            "set drafts to 1."
        )
    if not ids or guesses < 1:
        raise ConfigError(f"{len(ids)} tokens and {guesses} guesses; give at least one of each.")
    text = list(ids)
    cache = model.new_cache(1, len(text) + sampling.max_tokens)
    end = cache.capacity
    if end <= len(text):
        raise ConfigError(f"The prompt has {len(text)} tokens, the model reads {end}; shorten it.")
    generator = generator or make_generator(sampling.seed, model.device)
    while len(text) < end:
        # 1. the draft guesses, one token after another
        asked: list[int] = []
        q_NV: list[Tensor] = []
        for _ in range(min(guesses, end - len(text) - 1)):
            logits_V = draft(text + asked).to(model.device)
            q_NV.append(filter_logits(logits_V[None], sampling)[0].softmax(-1))
            asked.append(_draw(q_NV[-1], generator))
        # 2. the model reads what is new and all guesses, in one pass
        unread = torch.tensor([(text + asked)[cache.length :]], device=model.device)
        h_ND = model.hidden(unread, cache=cache)[0, -len(asked) - 1 :]
        logits_NV = F.linear(h_ND, model.embed.weight).float()
        p_NV = filter_logits(logits_NV, sampling).softmax(-1)
        # 3. the guesses stand until the first one that falls; the pass always adds one of its own
        new: list[int] = []
        for p_V, q_V, token in zip(p_NV[:-1], q_NV, asked, strict=True):
            new.append(keep_or_replace(p_V, q_V, token, generator))
            if new[-1] != token:
                break
        else:
            new.append(_draw(p_NV[-1], generator))
        # 4. hand over what comes before a stop token, and forget the guesses that fell
        before = list(itertools.takewhile(lambda token: token not in stop, new))
        if before:
            yield before
        if before != new:
            return
        text += new
        cache.truncate(len(text) - 1)
