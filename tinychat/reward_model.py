"""Turn "this reply is better than that one" into a number that a program can raise.

Generated from chapters/11_reward_model.py: edit that file,
then run `python -m tinychat.book export`.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from tinychat.data.groups import Group, GroupBatches
from tinychat.gpt import GPT, build_model
from tinychat.pretraining import (
    Budget,
    Progress,
    Result,
    TrainConfig,
    make_optimizers,
    pack_state,
    schedule,
    train_step,
    unpack_state,
)
from tinychat.runtime import checkpoint
from tinychat.runtime.checkpoint import Checkpoint, CheckpointInfo
from tinychat.runtime.errors import CheckpointError, ConfigError, DataError
from tinychat.runtime.metrics import MetricsWriter
from tinychat.runtime.state import load_state, save_state
from tinychat.tokenizer import Tokenizer


class RewardModel(nn.Module):
    """A GPT that gives a mark in place of a next token: how good is the reply that ends here?

    A linear head reads the last layer's vector at the reply's final token. `mean`, `deviation` and
    `length_slope` turn its raw number into a mark that is 0 for an average good reply, 1 for one
    a standard deviation better, and doesn't grow with length alone; `normalize` sets them.
    `words` is a second opinion, a weight for each token `[V]`; `add_words` sets it.
    `surety` is what a nat of the GPT's own mean log-prob of the reply's tokens counts beside the
    head; with it the head begins at zero, so that the first marks are the GPT's own opinion.
    `opener` is the token `<|assistant|>`, behind which the reply begins.
    """

    mean: Tensor
    deviation: Tensor
    length_slope: Tensor
    surety: Tensor
    words: Tensor
    chunk = 1024  # tokens whose scores are held at once

    def __init__(self, gpt: GPT, opener: int = 6, surety: float = 0.0):
        super().__init__()
        self.gpt = gpt
        self.opener = opener
        # No bias: only differences of marks are learned, and `mean` sets the level.
        self.head = nn.Linear(gpt.config.width, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=0.0 if surety else (gpt.config.width + 1) ** -0.5)
        self.register_buffer("surety", torch.tensor(surety))
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("deviation", torch.tensor(1.0))
        self.register_buffer("length_slope", torch.tensor(0.0))
        self.register_buffer("words", torch.zeros(gpt.config.vocab_size))
        self.to(gpt.device)

    @property
    def device(self) -> torch.device:
        return self.gpt.device

    def forward(
        self, ids_BT: Tensor, segments_BT: Tensor | None = None, last_B: Tensor | None = None
    ) -> Tensor:
        """Return the mark of each row, `[B]`: read at index `last_B`, or at the end of the row.

        What stands behind that index (padding) can't be seen from it, so it changes nothing.
        """
        B, T = ids_BT.shape
        if last_B is None:
            last_B = torch.full((B,), T - 1, device=ids_BT.device)
        h_BTD = self.gpt.hidden(ids_BT, segments_BT=segments_BT)
        h_BD = h_BTD[torch.arange(B, device=h_BTD.device), last_B].float()
        with torch.autocast(h_BD.device.type, enabled=False):  # marks are compared finely
            raw_B = self.head(h_BD)[:, 0] + self.word_marks(ids_BT, last_B)
            if self.surety:
                raw_B = raw_B + self.surety * self.reply_logprobs(h_BTD.float(), ids_BT, last_B)
        raw_B = raw_B - self.length_slope * self.log_lengths(ids_BT, last_B)
        return (raw_B - self.mean) / self.deviation

    def in_reply(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return True on the reply's tokens, `[B, T]`: behind the last opener, up to `last_B`.

        An opener at `last_B` itself opens nothing: it is a slip of whoever wrote this reply.
        """
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        before_BT = places_T < last_B[:, None]
        opener_B = ((ids_BT == self.opener) & before_BT).mul(places_T).amax(dim=1)
        return (places_T <= last_B[:, None]) & (places_T > opener_B[:, None])

    def reply_logprobs(self, h_BTD: Tensor, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return the mean log-prob of each reply's tokens, `[B]`, by the model's own GPT.

        `h_BTD` are the last layer's vectors; the one at a place predicts the token at the next.
        """
        next_BT = self.in_reply(ids_BT, last_B)[:, 1:]
        rows_N, _ = next_BT.nonzero(as_tuple=True)

        def nats(h_ND: Tensor, ids_N: Tensor) -> Tensor:
            logits_NV = F.linear(h_ND, self.gpt.embed.weight)
            return F.cross_entropy(logits_NV.float(), ids_N, reduction="none")

        # The scores of a hundred replies are gigabytes. Those of a chunk are forgotten, and
        # computed again when their gradient is asked for (Chen et al. 2016).
        chosen = (h_BTD[:, :-1][next_BT], ids_BT[:, 1:][next_BT])
        parts = zip(*(one.split(self.chunk) for one in chosen), strict=True)
        nats_N = torch.cat([recomputed(nats, *part, use_reentrant=False) for part in parts])
        sums_B = torch.zeros(len(ids_BT), device=nats_N.device).index_add(0, rows_N, nats_N)
        return -sums_B / next_BT.sum(dim=1).clamp(min=1)

    def log_lengths(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return ln(1 + tokens of the reply) of each row, `[B]`."""
        return self.in_reply(ids_BT, last_B).sum(dim=1).float().log1p()

    def word_marks(self, ids_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return what the words of each reply say by themselves, `[B]`, as `bag_scores` does."""
        reply_BT = self.in_reply(ids_BT, last_B)
        has_BV = self.words.new_zeros(len(ids_BT), len(self.words))
        has_BV.scatter_reduce_(1, ids_BT, reply_BT.to(has_BV.dtype), "amax")
        return has_BV @ self.words / has_BV.sum(dim=1).clamp(min=1).sqrt()


def right_padded(token_lists: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]` filled up with `pad` on the right, and the last real index `[B]`."""
    if not all(token_lists):
        raise ConfigError("A text to score is empty; give it at least one token.")
    longest = max(len(tokens) for tokens in token_lists)
    ids_BT = torch.tensor([[*tokens, *[pad] * (longest - len(tokens))] for tokens in token_lists])
    return ids_BT, torch.tensor([len(tokens) - 1 for tokens in token_lists])


@torch.no_grad()
def score(
    model: RewardModel, token_lists: Sequence[Sequence[int]], pad: int, batch: int = 32
) -> Tensor:
    """Return the mark of each text `[N]`, in order; a text ends with its reply's last token.

    Texts of similar length share a batch, and the shorter ones are padded on the right.
    """
    marks_N = torch.zeros(len(token_lists))
    order = sorted(range(len(token_lists)), key=lambda number: len(token_lists[number]))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        ids_BT, last_B = right_padded([token_lists[number] for number in numbers], pad)
        marks_B = model(ids_BT.to(model.device), last_B=last_B.to(model.device))
        marks_N[numbers] = marks_B.float().cpu()
    return marks_N


def bradley_terry(scores_N: Tensor, better_P: Tensor, worse_P: Tensor, share_P: Tensor) -> Tensor:
    """Return -ln P(the better one wins), weighted by each pair's share of the whole.

    Bradley and Terry (1952): a reply with mark a beats one with mark b with the probability
    sigmoid(a - b). `better_P` and `worse_P` are places in `scores_N`.
    """
    return -(F.logsigmoid(scores_N[better_P] - scores_N[worse_P]) * share_P).sum() / share_P.sum()


class RewardBatch(NamedTuple):
    """All replies of some prompts: ids `[B, T]`, where to read, and the pairs among the rows."""

    ids_BT: Tensor
    last_B: Tensor
    better_P: Tensor
    worse_P: Tensor
    share_P: Tensor


def collate(groups: Sequence[Group], pad: int) -> RewardBatch:
    """Put every reply into one row; pairs become pairs of rows."""
    ids_BT, last_B = right_padded([tokens for group in groups for tokens in group.tokens], pad)
    better: list[int] = []
    worse: list[int] = []
    share: list[float] = []
    first = 0
    for group in groups:
        better += [first + one for one, _ in group.pairs]
        worse += [first + two for _, two in group.pairs]
        share += group.weights
        first += len(group.tokens)
    return RewardBatch(
        ids_BT, last_B, torch.tensor(better), torch.tensor(worse), torch.tensor(share)
    )


class Judged(NamedTuple):
    """What a model said of one pair."""

    margin: float
    "mark of the better reply minus mark of the worse one: right where it is above 0"
    flaw: str
    "of the worse reply, where the better one has none"
    source: str


def score_groups(model: RewardModel, groups: Sequence[Group], pad: int) -> list[list[float]]:
    """Return the mark of every reply, group by group."""
    return regroup(score(model, [t for group in groups for t in group.tokens], pad), groups)


def regroup(marks_N: Tensor, groups: Sequence[Group]) -> list[list[float]]:
    """Cut one long list of marks into those of each group."""
    marks = iter(marks_N.tolist())
    return [list(islice(marks, len(group.tokens))) for group in groups]


def judge(groups: Sequence[Group], marks: Sequence[Sequence[float]]) -> list[Judged]:
    """Compare every pair of every group."""
    return [
        Judged(
            one[better] - one[worse],
            "" if group.ranked.replies[better].flaw else group.ranked.replies[worse].flaw,
            group.ranked.source,
        )
        for group, one in zip(groups, marks, strict=True)
        for better, worse in group.pairs
    ]


def accuracy(judged: Iterable[Judged]) -> float:
    """Return the share of pairs in the right order; equal marks are half right."""
    points = [0.5 if pair.margin == 0 else float(pair.margin > 0) for pair in judged]
    return sum(points) / len(points) if points else math.nan


def accuracy_by(
    judged: Iterable[Judged], key: Callable[[Judged], str]
) -> dict[str, tuple[float, int]]:
    """Return (accuracy, number of pairs) under each key, the largest number first."""
    sorted_by: dict[str, list[Judged]] = defaultdict(list)
    for pair in judged:
        sorted_by[key(pair)].append(pair)
    names = sorted(sorted_by, key=lambda name: -len(sorted_by[name]))
    return {name: (accuracy(sorted_by[name]), len(sorted_by[name])) for name in names}


def calibration(margins: Iterable[float], bins: int = 5) -> list[tuple[float, float, int]]:
    """Return (predicted, true, pairs) of each bin: how often does its favourite really win?

    A margin m says that the favourite wins with the probability sigmoid(|m|), from 0.5 up to 1.
    It must be a difference of raw marks, before normalising.
    """
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        sure = 1 / (1 + math.exp(-min(abs(margin), 50.0)))
        won = 0.5 if margin == 0 else float(margin > 0)
        found[min(bins - 1, int((sure - 0.5) * 2 * bins))].append((sure, won))
    means = {number: np.mean(pairs, axis=0) for number, pairs in sorted(found.items())}
    return [(float(m[0]), float(m[1]), len(found[number])) for number, m in means.items()]


def length_correlation(groups: Sequence[Group], marks: Sequence[Sequence[float]]) -> float:
    """Return the correlation of mark and log length among the best replies of all prompts.

    They are equally good, so a model that looks at quality alone comes to about 0.
    """
    best = [
        (one[n], math.log1p(len(group.tokens[n]) - group.start))
        for group, one in zip(groups, marks, strict=True)
        for n, reply in enumerate(group.ranked.replies)
        if reply.rank == 0
    ]
    values = np.array(best).T
    if len(best) < 2 or not values.std(axis=1).all():
        return 0.0
    return float(np.corrcoef(values)[0, 1])


def bag_of_words(
    groups: Sequence[Group], vocab_size: int, *, decay: float = 3e-3, steps: int = 200
) -> Tensor:
    """Return a weight for each token `[V]`: the best that words alone can do (a baseline).

    Logistic regression on which tokens a reply has. It sees no order and no prompt.
    """
    batch = collate(groups, pad=0)
    weight_V = torch.zeros(vocab_size, requires_grad=True)
    optimizer = torch.optim.Adam([weight_V], lr=0.02)
    bags = Bags.of(groups)
    for _ in range(steps):
        scores_N = bags.scores(weight_V)
        loss = bradley_terry(scores_N, batch.better_P, batch.worse_P, batch.share_P)
        (loss + decay * weight_V.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight_V.detach()


class Bags(NamedTuple):
    """Which tokens the N replies of some groups have: M pairs of a token and a reply."""

    tokens_M: Tensor
    rows_M: Tensor
    share_M: Tensor
    "one over the root of the number of different tokens in the reply"
    replies: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Self:
        replies = [set(tokens[group.start :]) for group in groups for tokens in group.tokens]
        sizes_N = torch.tensor([len(reply) for reply in replies])
        rows_M = torch.arange(len(replies)).repeat_interleave(sizes_N)
        tokens_M = torch.tensor([token for reply in replies for token in sorted(reply)])
        return cls(tokens_M, rows_M, sizes_N.float().rsqrt()[rows_M], len(replies))

    def scores(self, weight_V: Tensor) -> Tensor:
        """Return the sum of each reply's weights over the root of their number, `[N]`."""
        parts_M = weight_V[self.tokens_M] * self.share_M
        return torch.zeros(self.replies).index_add(0, self.rows_M, parts_M)


def bag_scores(weight_V: Tensor, groups: Sequence[Group]) -> list[list[float]]:
    """Return the baseline's mark of every reply, group by group."""
    return regroup(Bags.of(groups).scores(weight_V), groups)


@dataclass(frozen=True)
class RewardConfig:
    """What decides a reward model's training besides the model and the ranked replies."""

    epochs: float = 1.0
    "readings of all prompts; more are soon learned by heart"
    batch: int = 16
    "prompts a step, each with all its replies"
    sequence: int = 384
    "longest prompt and reply in tokens"
    replies: int = 6
    "most replies of one prompt"
    matrix_lr: float = 1e-3
    "Muon's peak rate"
    vector_lr: float = 3e-4
    "AdamW's peak rate for embeddings, norms and the head"
    warmup: float = 0.05
    "share of the steps in which the rates rise"
    decay: float = 0.9
    "share of the steps, at the end, in which the rates fall to zero"
    clip: float = 1.0
    "largest norm of the whole gradient"
    words: float = 0.3
    "how loudly the word weights speak beside the network; 0 silences them"
    surety: float = 2.0
    "what a nat a token of the network's own log-probability counts; 0 leaves it out"
    seed: int = 0
    "decides the head's first weights and the order of the prompts"
    precision: str = "auto"
    "bf16 or fp32 matrix products; auto takes bf16 where the machine is fast at it"
    save_minutes: float = 3.0
    "time between saved states"
    evaluate_every: int = 50
    "steps between looks at held-out pairs"

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is {self.epochs}; it must be a number above 0.")
        if self.replies < 2:
            raise ConfigError(f"replies is {self.replies}; a comparison needs at least 2.")
        if not 0 <= self.words < math.inf:
            raise ConfigError(f"words is {self.words}; it must be 0 or a number above it.")
        if not 0 <= self.surety < math.inf:
            raise ConfigError(f"surety is {self.surety}; it must be 0 or a number above it.")
        self.loop()  # the loop refuses everything else that makes no sense

    def loop(self) -> TrainConfig:
        """The same settings for the parts of chapter 07's loop."""
        shared = asdict(self)
        for name in ("epochs", "replies", "words", "surety"):
            del shared[name]
        return TrainConfig(**shared, compiled=False)


def neutral(model: RewardModel) -> None:
    """Let the model give its raw numbers: what training compares."""
    model.mean.fill_(0.0)
    model.deviation.fill_(1.0)
    model.length_slope.fill_(0.0)


class RewardLoss:
    """The loss of a batch, in the form that chapter 07's `train_step` calls."""

    def __init__(self, model: RewardModel, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    def __call__(self, batch: RewardBatch) -> Tensor:
        here = RewardBatch(*(part.to(self.model.device) for part in batch))
        with torch.autocast(
            self.model.device.type, self.dtype, enabled=self.dtype != torch.float32
        ):
            scores_B = self.model(here.ids_BT, last_B=here.last_B)
        return bradley_terry(scores_B, here.better_P, here.worse_P, here.share_P)


def fit_reward(
    model: RewardModel,
    groups: Sequence[Group],
    config: RewardConfig,
    folder: str | Path,
    *,
    pad: int,
    minutes: float = 0.0,
    validation: Sequence[Group] = (),
    resume: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train `model` in place on ranked replies, and keep the run's state in `folder`.

    Runs for `config.epochs` or, where `minutes` end sooner, as many steps as fit into them. A run
    that was killed and is called again with `resume=True` goes on to the same numbers. The
    validation accuracy goes into metrics.jsonl. Raises ConfigError when `folder` holds a run.
    """
    folder, started = Path(folder), time.monotonic()
    stream = GroupBatches(groups, config.batch, config.seed)
    all_steps = max(1, round(config.epochs * len(groups) / config.batch))
    # 1. The optimizers of chapter 07; the head joins the vectors.
    optimizers = make_optimizers(model.gpt, config.loop())
    head: dict[str, Any] = {"params": [model.head.weight], "weight_decay": 0.0}
    optimizers[1].add_param_group(head | {"lr": config.vector_lr, "peak_lr": config.vector_lr})
    loss_function: Any = RewardLoss(model, config.loop().dtype)
    inside = cast(Any, model)  # the state is packed by parameter names, whatever the module
    # 2. Take up the saved state, or begin.
    saved = load_state(folder)
    if saved is not None and not resume:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, "
            "or choose another name with --run."
        )
    step, tokens, before, loss, steps = 0, 0, 0.0, math.nan, all_steps
    if saved is not None:
        unpack_state(saved[0], inside, optimizers)
        step, tokens, before = saved[1]["step"], saved[1]["tokens"], saved[1]["seconds"]
        loss = saved[1]["loss"]
        steps = steps if minutes or not saved[1]["by_time"] else saved[1]["steps"]
    budget = Budget(minutes, 0 if minutes else steps)
    neutral(model)

    def save() -> None:
        scalars: dict[str, Any] = {"step": step, "steps": budget.steps, "tokens": tokens}
        scalars |= {"seconds": before + time.monotonic() - started, "config": asdict(config)}
        scalars |= {"loss": loss, "by_time": budget.steps < all_steps}
        save_state(folder, pack_state(inside, optimizers), scalars)

    last_save, stopped = time.monotonic(), False
    recent: deque[float] = deque(maxlen=50)
    with MetricsWriter(folder / "metrics.jsonl", resume_step=step) as writer:
        batches = stream.batches(step)
        while step < min(budget.steps, steps) and not stopped:
            begun = time.monotonic()
            # 3. One step.
            factor = min(1.0, (step + 1) / 100)
            if budget.known:
                factor = schedule(step, budget.steps, config.warmup, config.decay)
            batch = collate(next(batches), pad)
            loss, norm = train_step(
                loss_function, optimizers, cast(Any, [batch]), factor=factor, clip=config.clip
            )
            step += 1
            read = int(batch.last_B.sum()) + len(batch.last_B)
            tokens += read
            seconds = time.monotonic() - begun
            # 4. Measure and report.
            row: dict[str, Any] = {"step": step, "loss": loss, "tokens": tokens, "norm": norm}
            row |= {"lr": factor, "seconds": seconds}
            if validation and (step % config.evaluate_every == 0 or step == budget.steps):
                row["accuracy"] = accuracy(judge(validation, score_groups(model, validation, pad)))
            writer.write(row)
            recent.append(seconds)  # batches differ in length
            typical = float(np.median(recent))
            left = (budget.steps - step) * typical if budget.known else math.nan
            on_step(Progress(step, budget.steps, loss, tokens, read / seconds, left, {}))
            # 5. Stop when asked to, know the budget, save.
            stopped = should_stop()
            if not budget.known:
                budget.times.append(seconds)
                if stopped or len(budget.times) == budget.TRIAL:
                    budget.settle(step, time.monotonic() - started)
                    budget.steps = min(budget.steps, steps)
            if budget.known and time.monotonic() - last_save > config.save_minutes * 60:
                save()
                last_save = time.monotonic()
    budget.steps = min(budget.steps, steps)
    save()
    return Result(step, budget.steps, tokens, before + time.monotonic() - started, loss, {})


def add_words(
    model: RewardModel,
    weight_V: Tensor,
    references: Sequence[Sequence[int]],
    pad: int,
    *,
    share: float = 0.6,
) -> None:
    """Let word weights `[V]` have a say in the mark, beside the network's.

    Over `references`, good replies that were not trained on, their deviation becomes `share` times
    the network's. Call `normalize` afterwards.
    """
    neutral(model)
    model.words.zero_()
    of_network_N = score(model, references, pad)
    model.words.copy_(weight_V)
    ids_BT, last_B = (t.to(model.device) for t in right_padded(references, pad))
    of_words_N = model.word_marks(ids_BT, last_B)
    model.words *= share * float(of_network_N.std()) / max(float(of_words_N.std()), 1e-6)


def average_weights(model: RewardModel, others: Sequence[RewardModel]) -> None:
    """Give `model` the mean of its own weights and those of `others` (Ramé et al. 2024).

    All must have begun with the same weights. Call `add_words` and `normalize` afterwards. Raises
    ConfigError where the shapes differ.
    """
    sizes = {one.gpt.config for one in (model, *others)}
    if len(sizes) > 1:
        raise ConfigError("Only reward models that began with the same chat model can be averaged.")
    with torch.no_grad():
        for weight, *theirs in zip(*(one.parameters() for one in (model, *others)), strict=True):
            weight.copy_(torch.stack([weight, *(t.to(weight) for t in theirs)]).mean(dim=0))


@torch.no_grad()
def mean_logprobs(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    pad: int,
    batch: int = 32,
) -> Tensor:
    """Return the mean log-prob of each reply's tokens behind its prompt, `[N]`, in float32."""
    order = sorted(range(len(replies)), key=lambda n: len(prompts[n]) + len(replies[n]))
    mean_N = torch.zeros(len(replies))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids_BT, last_B = right_padded([[*prompts[n], *replies[n]] for n in rows], pad)
        places_T = torch.arange(ids_BT.shape[1])
        first_B = torch.tensor([len(prompts[n]) for n in rows])
        # The vector at one place predicts the token at the next.
        asked_BT = (places_T >= first_B[:, None] - 1) & (places_T < last_B[:, None])
        rows_N, _ = asked_BT.nonzero(as_tuple=True)
        h_ND = gpt.hidden(ids_BT.to(gpt.device))[asked_BT.to(gpt.device)].float()
        next_N = ids_BT.roll(-1, 1)[asked_BT].to(gpt.device)
        logprobs_NV = (h_ND @ gpt.embed.weight.float().T).log_softmax(-1)
        logprobs_N = logprobs_NV.gather(1, next_N[:, None])[:, 0].cpu()
        sums_B = torch.zeros(len(rows)).index_add(0, rows_N, logprobs_N)
        mean_N[rows] = sums_B / (last_B - first_B + 1)
    return mean_N


def prompts_and_replies(
    groups: Sequence[Group],
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Return the prompt and the reply of every text, in order; `regroup` puts numbers back."""
    prompts: list[Sequence[int]] = [
        group.tokens[0][: group.start] for group in groups for _ in group.tokens
    ]
    replies: list[Sequence[int]] = [
        tokens[group.start :] for group in groups for tokens in group.tokens
    ]
    return prompts, replies


def group_logprobs(gpt: GPT, groups: Sequence[Group], pad: int) -> list[list[float]]:
    """Return `gpt`'s mean log-prob a token of every reply, group by group."""
    return regroup(mean_logprobs(gpt, *prompts_and_replies(groups), pad), groups)


def question_fit(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    blank: Sequence[int],
    pad: int,
    batch: int = 32,
) -> Tensor:
    """Return how well each reply fits its prompt, `[N]`, in nats a token of the reply.

    By a chat model: log p(reply | prompt) - log p(reply | blank prompt) (Li et al. 2016).
    """
    behind_blank_N = mean_logprobs(gpt, [blank] * len(replies), replies, pad, batch)
    return mean_logprobs(gpt, prompts, replies, pad, batch) - behind_blank_N


def normalize(
    model: RewardModel, references: Sequence[Sequence[int]], pad: int, *, cure_length: bool = True
) -> None:
    """Set the model's three numbers, so that good replies have mean 0 and deviation 1.

    `references` are texts with good replies that the model was not trained on. With `cure_length`,
    what their marks owe to their length (the slope of a straight line through mark against log
    length) is taken off first. Raises DataError for fewer than two.
    """
    if len(references) < 2:
        raise DataError("Normalising takes at least two reference replies; give more.")
    neutral(model)
    raw_N = score(model, references, pad).double()
    x_N = model.log_lengths(*right_padded(references, pad)).double()
    spread = float(x_N.var())
    if cure_length and spread > 0:
        slope = float(((x_N - x_N.mean()) * (raw_N - raw_N.mean())).sum() / (len(x_N) - 1) / spread)
        model.length_slope.fill_(slope)
        raw_N = raw_N - slope * x_N
    model.mean.fill_(float(raw_N.mean()))
    model.deviation.fill_(max(float(raw_N.std()), 1e-6))


def save_reward(
    path: str | Path,
    model: RewardModel,
    *,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Any],
    quantize: Literal["int8", "bf16", "fp32"] = "int8",
) -> CheckpointInfo:
    """Write a checkpoint of the stage "reward": the GPT's weights and three more tensors."""
    extra = {
        "reward.head": model.head.weight[0],  # a vector, so that it stays float32 in int8 files
        "reward.words": model.words,
        "reward.numbers": torch.stack(
            [model.mean, model.deviation, model.length_slope, model.surety]
        ),
    }
    return checkpoint.save(
        path,
        stage="reward",
        config=asdict(model.gpt.config),
        state={**model.gpt.state_dict(), **extra},
        tokenizer=tokenizer.model,
        lineage=dict(lineage),
        metrics=dict(metrics),
        quantize=quantize,
    )


def load_reward(path: str | Path) -> tuple[RewardModel, Tokenizer, CheckpointInfo]:
    """Read a reward checkpoint; the model is in float32 and in evaluation mode.

    Raises CheckpointError in one sentence for whatever is wrong with the file.
    """
    loaded = checkpoint.load(path)
    info = loaded.info
    if info.stage != "reward":
        raise CheckpointError(
            f"{path} is of the stage {info.stage}, which gives no marks; "
            "name a reward checkpoint, or make one with `tinychat train reward`."
        )
    state = dict(loaded.state)
    head_D = state.pop("reward.head", torch.empty(0))
    numbers = state.pop("reward.numbers", torch.empty(0))
    words_V = state.pop("reward.words", torch.empty(0))
    shapes = head_D.shape, words_V.shape
    wanted = (info.config["width"],), (info.config["vocab_size"],)
    if shapes != wanted or numbers.shape != (4,) or not numbers[1] > 0:
        raise CheckpointError(
            f"{path}: the reward model's head is missing or misshapen; "
            "get or train the checkpoint again."
        )
    extra = sum(tensor.numel() for tensor in (head_D, numbers, words_V))
    rest = replace(info, parameters=info.parameters - extra)
    gpt, tokenizer = build_model(Checkpoint(rest, state, loaded.tokenizer))
    model = RewardModel(gpt, tokenizer.assistant_id)
    with torch.no_grad():
        model.head.weight.copy_(head_D)
    for buffer, value in zip(
        (model.mean, model.deviation, model.length_slope, model.surety), numbers, strict=True
    ):
        buffer.copy_(value)
    model.words.copy_(words_V)
    return model.eval(), tokenizer, info
