"""What a file of votes says: win rates with their intervals, in sentences. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinychat.cli.votes import makers, records
from tinychat.runtime.errors import DataError


@dataclass
class Score:
    """How often one checkpoint's replies were better than another's."""

    a: str
    b: str
    same: bool
    "True where a checkpoint met itself: there is nothing to win"
    wins: int = 0
    "of a"
    losses: int = 0
    ties: int = 0
    bad: int = 0

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties + self.bad

    @property
    def rate(self) -> float:
        """a's share of the wins; ties, good or bad, are half of one."""
        return (self.wins + (self.ties + self.bad) / 2) / self.votes

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.rate, self.votes)


def wilson(rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in `count` trials (Wilson 1927).

    Unlike rate ± z * error it stays inside 0 and 1, and is right for few trials too.
    """
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    middle, scale = rate + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


@dataclass
class Tally:
    """What a file of votes says."""

    scores: list[Score]
    "one a pair of checkpoints, in the order of their first votes"
    unknown: int
    "votes on replies that nobody knows the writer of"
    left: int
    "how often the reply that was shown first won"
    decided: int
    "votes with a winner, of which it is known what was shown first"


def tally(path: Path, pair: frozenset[str] | None = None) -> Tally:
    """Count the votes of a file, or those between two checkpoints. Raises DataError."""
    votes = [(record, *makers(record)) for record in records(path)]
    # Two files of one name (a checkpoint that was trained again) are told apart by their hashes.
    digests: dict[str, set[str]] = {}
    for _, *both in votes:
        for one in both:
            if one is not None:
                digests.setdefault(one["name"], set()).add(one["sha256"])

    def label(one: Mapping[str, Any]) -> str:
        many = len(digests[one["name"]]) > 1
        return _stem(one["name"]) + (f" ({one['sha256'][:8]})" if many else "")

    scores: dict[frozenset[str], Score] = {}
    firsts: dict[frozenset[str], str] = {}
    unknown = left = decided = 0
    for record, a, b in votes:
        key = frozenset(one["sha256"] for one in (a, b) if one is not None)
        if pair is not None and key != pair:
            continue
        winner = record["winner"]
        if winner in ("a", "b") and record.get("left") in ("a", "b"):
            decided += 1
            left += winner == record["left"]
        if a is None or b is None:
            unknown += 1
            continue
        score = scores.setdefault(key, Score(label(a), label(b), len(key) == 1))
        turned = firsts.setdefault(key, a["sha256"]) != a["sha256"]
        if winner in ("a", "b"):
            won = (winner == "a") != turned
            score.wins, score.losses = score.wins + won, score.losses + (not won)
        elif winner == "tie":
            score.ties += 1
        else:
            score.bad += 1
    return Tally(list(scores.values()), unknown, left, decided)


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors")


def told(path: Path, pair: frozenset[str] | None = None) -> list[str]:
    """What the votes of a file say, in sentences."""
    found = tally(path, pair)
    lines = [_sentence(score) for score in found.scores]
    if found.unknown and pair is None:
        lines.append(f"{found.unknown} more on replies that nobody knows the writer of")
    if found.decided:
        lines.append(f"The reply shown first won {found.left} of {found.decided} (half is fair).")
    return lines


def _sentence(score: Score) -> str:
    rest = f"{score.ties} tie{'s' * (score.ties != 1)}, {score.bad} both bad"
    votes = f"{score.votes} vote{'s' * (score.votes != 1)}"
    if score.same:
        return f"{score.a} against itself: {votes}, {rest}."
    if score.rate < 0.5:  # the better one first
        score = replace(score, a=score.b, b=score.a, wins=score.losses, losses=score.wins)
    low, high = score.interval
    chance = "; chance can do that too" if low <= 0.5 else ""
    return (
        f"{score.a} beats {score.b} in {score.rate:.0%} of {votes} (95 %: {low:.0%} to {high:.0%}"
        f"{chance}): {score.wins} better, {score.losses} worse, {rest}; ties count half."
    )


def print_tally(path: Path, as_json: bool) -> None:
    """`tinychat duel --report`: print the tally of a file."""
    if not path.exists():
        raise DataError(f"{path} does not exist; collect votes with `tinychat duel`.")
    lines = told(path)
    if not lines:
        raise DataError(f"{path} holds no votes; collect some with `tinychat duel`.")
    if not as_json:
        for line in lines:
            print(line)
        return
    found = tally(path)
    rows = [
        asdict(score) | {"votes": score.votes, "rate": score.rate, "interval": score.interval}
        for score in found.scores
    ]
    print(
        json.dumps(
            {
                "pairs": rows,
                "unknown": found.unknown,
                "shown_first_won": found.left,
                "decided": found.decided,
            }
        )
    )
