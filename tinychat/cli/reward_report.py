"""How good a reward model is: on replies that it never saw, beside what words alone reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tinychat.data.groups import Group
    from tinychat.data.preferences import Rated
    from tinychat.reward_model import RewardModel
    from tinychat.tokenizer import Tokenizer

RATED = 400  # replies with a poor mark, and with an excellent one


def report(
    model: RewardModel,
    words: Tensor,
    held_out: Sequence[Group],
    pieces: Tokenizer,
    rated: Sequence[Rated],
) -> dict[str, Any]:
    """Held-out accuracy by source and flaw, beside that of word weights `[V]` alone, and more."""
    from tinychat.data.split import split_of
    from tinychat.reward_model import (
        accuracy,
        accuracy_by,
        bag_scores,
        calibration,
        judge,
        length_correlation,
        score_groups,
    )

    marks, counted = score_groups(model, held_out, pieces.pad_id), bag_scores(words, held_out)
    by_model, by_bag = judge(held_out, marks), judge(held_out, counted)
    own = [n for n, group in enumerate(held_out) if group.ranked.source == "corpus"]
    ours, theirs = [held_out[n] for n in own], [marks[n] for n in own]
    judged, baseline = (
        [pair for pair in some if pair.source == "corpus"] for some in (by_model, by_bag)
    )
    deviation = float(model.deviation)
    by_words = bag_scores(model.words.cpu(), ours)
    network = [
        [mark - part / deviation for mark, part in zip(one, its, strict=True)]
        for one, its in zip(theirs, by_words, strict=True)
    ]

    def beside(model: dict[str, tuple[float, int]], words: dict[str, tuple[float, int]]) -> Any:
        """Under each name: share right, number of pairs, share right by words alone."""
        return {
            name: [round(share, 4), count, round(words[name][0], 4)]
            for name, (share, count) in model.items()
        }

    def by_flaw(source: str) -> Any:
        return beside(
            *(
                accuracy_by(
                    (pair for pair in some if pair.flaw and pair.source == source),
                    lambda pair: pair.flaw,
                )
                for some in (by_model, by_bag)
            )
        )

    def on(part: str) -> float:
        here = [n for n, group in enumerate(ours) if split_of(group.ranked.id) == part]
        return accuracy(judge([ours[n] for n in here], [theirs[n] for n in here]))

    return {
        "accuracy": accuracy(judged),
        "accuracy_network": accuracy(judge(ours, network)),
        "baseline": accuracy(baseline),
        "pairs": len(judged),
        "accuracy_validation": on("validation"),
        "accuracy_test": on("test"),
        "by_flaw": by_flaw("corpus"),
        "by_flaw_everyday": by_flaw("everyday"),
        "by_source": beside(
            accuracy_by(by_model, lambda pair: pair.source),
            accuracy_by(by_bag, lambda pair: pair.source),
        ),
        "calibration": calibration(pair.margin * deviation for pair in judged),
        "length_correlation": length_correlation(ours, theirs),
        "normalisation": [float(model.mean), deviation, float(model.length_slope)],
        "ratings": rank_ratings(model, pieces, rated),
    }


def rank_ratings(model: RewardModel, pieces: Tokenizer, rated: Sequence[Rated]) -> Any:
    """How often a reply that people found excellent gets more than a poor one, across prompts."""
    from tinychat.dialogue import render_prompt
    from tinychat.reward_model import score

    marks = {}
    for name, wanted in (("poor", (1, 2)), ("excellent", (5,))):
        lists = []
        for one in [one for one in rated if one.mark in wanted][:RATED]:
            body = [*pieces.encode(one.text), pieces.end_id]
            if len(body) <= 128:
                context = min(320, model.gpt.config.context)
                try:
                    prompt = render_prompt(one.prompt[-3:], pieces, context=context, reserve=128)
                except ConfigError:
                    continue  # the question alone is too long
                lists.append(prompt + body)
        marks[name] = score(model, lists, pieces.pad_id)
    if not all(len(some) for some in marks.values()):
        return None
    higher = (marks["excellent"][:, None] > marks["poor"][None, :]).float().mean()
    return [round(float(higher), 4), len(marks["excellent"]), len(marks["poor"])]


def within(by_flaw: dict[str, Any]) -> list[tuple[str, Any]]:
    """The lines of a source's flaws, set in under its own."""
    return [(f"  {flaw}", line) for flaw, line in by_flaw.items()]


def print_report(metrics: dict[str, Any]) -> None:
    """The held-out table, with the word counter beside every line."""
    print(f"\nHeld-out pairs in the right order\n{'':30} pairs  model  words")
    total = [metrics["accuracy"], metrics["pairs"], metrics["baseline"]]
    lines = [("our corpus", total), *within(metrics["by_flaw"])]
    for name, line in metrics["by_source"].items():
        if name != "corpus":
            lines.append((name, line))
        if name == "everyday":
            lines += within(metrics["by_flaw_everyday"])
    for name, (share, count, words) in lines:
        print(f"{name:30} {count:5} {share:6.1%} {words:6.1%}")
    print(f"The network without its word weights: {metrics['accuracy_network']:.1%} of our corpus")
    print(f"Correlation of mark and length: {metrics['length_correlation']:+.2f}")
    if metrics["ratings"]:
        share, good, poor = metrics["ratings"]
        print(f"{good} excellent replies beat {poor} poor ones of other prompts: {share:.1%}")
