"""Ranked replies: our corpus's, the public files', a user's votes; split by prompt."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinychat.data.corpus import basics, dialogues, graded
from tinychat.data.jsonl import parse_dialogue, parse_lines, read_lines, whole_lines
from tinychat.data.public import source_path
from tinychat.data.records import Dialogue, Message
from tinychat.data.split import Split, split_of
from tinychat.data.words import words
from tinychat.runtime.errors import DataError


@dataclass(frozen=True)
class Reply:
    """One reply to a prompt. Replies of the same rank are equally good."""

    text: str
    rank: int
    "0 is the best"
    flaw: str = ""
    "what is wrong with it, in one word; empty for a good one or where nobody said"
    ended: bool = True
    "False where the writer ran out of room before the end"


@dataclass(frozen=True)
class Ranked:
    """Several replies to one prompt, best first."""

    prompt: tuple[Message, ...]
    replies: tuple[Reply, ...]
    source: str
    id: str
    "decides the split"
    weight: float = 1.0
    "how much the order is to be trusted: 1 where a person gave it"

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every (better, worse) pair of replies; equal ranks make none."""
        return [
            (one, two)
            for one in range(len(self.replies))
            for two in range(len(self.replies))
            if self.replies[one].rank < self.replies[two].rank
        ]

    @property
    def ties(self) -> list[tuple[int, int]]:
        """Every pair of equal rank."""
        return [
            (one, two)
            for two in range(len(self.replies))
            for one in range(two)
            if self.replies[one].rank == self.replies[two].rank
        ]


@dataclass(frozen=True)
class Rated:
    """One reply with a person's mark from 1 to 5; nothing to compare it with."""

    prompt: tuple[Message, ...]
    text: str
    mark: int


# How far the order of each public file is trusted, and at most how many prompts are taken.
# Nobody judged the constructed ones: their order follows from how the replies were made.
PUBLIC = {
    "hh_harmless_test": (1.0, 10_000),
    "pandalm_human": (1.0, 10_000),
    "chat_constructed": (0.3, 2_000),
    "dolly_kwise_constructed": (0.3, 1_000),
    "oasst_eval_kwise_constructed": (0.3, 10_000),
    "personality_kwise_constructed": (0.3, 10_000),
}
RATINGS = "topical_chat_turn_ratings_sub"


def prompt_key(prompt: Sequence[Message]) -> str:
    """Return what two copies of one prompt have in common: the words of its turns, lower case."""
    turns = [message.content for message in prompt if message.role != "system"]
    key = "\n".join(" ".join(words(turn)) for turn in turns)
    return key if key.strip() else "\n".join(turn.strip() for turn in turns)


def digest(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\n{text}".encode("utf-8", errors="replace")).digest()


def _id(prompt: Sequence[Message]) -> str:
    return digest("prompt", prompt_key(prompt)).hex()[:20]


def for_judge(prompt: Sequence[Message]) -> bool:
    """True for the half of all prompts that only the judge may learn from.

    Another hash than the split's: the halves of train, validation and test are halves too.
    """
    return digest("tinychat judge half 1", prompt_key(prompt))[0] % 2 == 1


def by_part(groups: Iterable[Ranked]) -> dict[Split, list[Ranked]]:
    """Sort groups into train, validation and test, so that no prompt stands on two sides.

    The id decides, as everywhere (a reply that fine-tuning has read is never held out here). A
    prompt that also stands on a more strictly held-out side is dropped from this one.
    """
    groups = list(groups)
    order: tuple[Split, ...] = ("train", "validation", "test")
    side: dict[str, int] = defaultdict(int)
    for group in groups:
        key = prompt_key(group.prompt)
        side[key] = max(side[key], order.index(split_of(group.id)))
    parts: dict[Split, list[Ranked]] = {part: [] for part in order}
    for group in groups:
        home = split_of(group.id)
        if side[prompt_key(group.prompt)] == order.index(home):
            parts[home].append(group)
    return parts


def corpus_ranked() -> list[Ranked]:
    """Return the embedded corpus's ranked replies: the written one, then the rejected ones."""
    return list(_with_rejected(dialogues(), "corpus", ordered=True))


def corpus_flawed() -> list[Ranked]:
    """Return the basics to which flawed replies were written: the good one, then those.

    The flawed ones are of equal rank: their writers did not agree on which flaw is worse.
    """
    return list(_with_rejected(basics(), "everyday", ordered=False))


def _with_rejected(some: Iterable[Dialogue], source: str, *, ordered: bool) -> Iterator[Ranked]:
    """Yield the conversations with rejected replies, which are ranked as they stand, or alike."""
    for one in some:
        if one.rejected:
            worse = (
                Reply(r.content, n if ordered else 1, r.flaw) for n, r in enumerate(one.rejected, 1)
            )
            replies = (Reply(one.messages[-1].content, 0), *worse)
            yield Ranked(one.messages[:-1], replies, source, one.id)


def corpus_graded() -> list[Ranked]:
    """Return the replies of our own chat models that readers marked, where the marks differ."""
    return list(_groups(graded(), "graded", 1.0))


def corpus_answered() -> list[Ranked]:
    """Return every prompt of the embedded corpus with its written reply alone: no pairs yet."""
    return list(written(dialogues(), "corpus"))


def written(some: Iterable[Dialogue], source: str) -> Iterator[Ranked]:
    """Yield each conversation's last prompt with its written reply alone."""
    for one in some:
        yield Ranked(one.messages[:-1], (Reply(one.messages[-1].content, 0),), source, one.id)


def public_ranked(folder: Path, names: Iterable[str] = tuple(PUBLIC)) -> list[Ranked]:
    """Return the ranked replies of the public files, capped as `PUBLIC` says; raises DataError.

    Which prompts stay under a cap is decided by a hash, not by their place in the file.
    """
    found: list[Ranked] = []
    for name in names:
        weight, most = PUBLIC[name]
        groups = read_ranked(source_path(name, folder), name, weight)
        found += sorted(groups, key=lambda group: digest("cap", group.id))[:most]
    return found


def read_ranked(path: Path, source: str, weight: float = 1.0) -> list[Ranked]:
    """Return the groups of a file: pairs (`chosen`, `rejected`) or `responses` with scores.

    Groups in which nothing can be compared are left out. Raises DataError.
    """
    return list(_groups(parse_lines(read_lines(path), str(path)), source, weight))


def _groups(
    lines: Iterable[tuple[str, Mapping[str, object]]], source: str, weight: float
) -> Iterator[Ranked]:
    for where, record in lines:
        prompt = _prompt(record, where)
        replies = _replies(record, where)
        id = str(record.get("id") or _id(prompt))
        group = Ranked(prompt, replies, source, id, weight)
        # An empty winner teaches that silence is best: a slip of whoever judged.
        if group.pairs and replies[0].text.strip():
            yield group


def _replies(record: Mapping[str, object], where: str) -> tuple[Reply, ...]:
    if "responses" not in record:
        chosen, rejected = record.get("chosen"), record.get("rejected")
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise DataError(f'{where} needs a list "responses", or texts "chosen" and "rejected"')
        worse = Reply(rejected, int(chosen != rejected), str(record.get("neg", "")))
        return Reply(chosen, 0), worse
    responses = record["responses"]
    if not isinstance(responses, list) or not all(
        isinstance(r, dict)
        and isinstance(r.get("text"), str)
        and isinstance(r.get("score"), int | float)
        for r in responses
    ):
        raise DataError(f'{where}: each of the "responses" needs a "text" and a "score"')
    best_first = sorted(responses, key=lambda r: -r["score"])
    ranks = {score: n for n, score in enumerate(sorted({-r["score"] for r in best_first}))}
    return tuple(
        Reply(
            r["text"],
            ranks[-r["score"]],
            str(r.get("flaw", "")) or ("off_topic" if r.get("by") == "off_topic" else ""),
            r.get("ended", True) is not False,
        )
        for r in best_first
    )


def _prompt(record: Mapping[str, object], where: str) -> tuple[Message, ...]:
    """The messages before the replies; the last one must be the user's.

    Neighbours with one role become one turn: some files cut a turn into several.
    """
    if not isinstance(record.get("prompt"), list) or not record["prompt"]:
        raise DataError(f'{where} needs a list of messages in the field "prompt"')
    messages: list[Message] = []
    found = parse_dialogue({"messages": record.get("prompt")}, f"{where} (prompt)", "", id="?")
    for message in found.messages:
        if messages and messages[-1].role == message.role:
            both = f"{messages.pop().content}\n{message.content}"
            message = Message(message.role, both)
        messages.append(message)
    if messages[0].role == "assistant":
        raise DataError(f"{where}: the prompt begins with an assistant turn, not a user's")
    if messages[-1].role != "user":
        raise DataError(f"{where}: the prompt ends with a {messages[-1].role} turn, not a user's")
    return tuple(messages)


def write_ranked(path: Path, groups: Iterable[Ranked]) -> None:
    """Write groups as lines that `read_ranked` reads."""
    lines = []
    for group in groups:
        responses = [
            {"text": r.text, "score": -r.rank, "flaw": r.flaw, "ended": r.ended}
            for r in group.replies
        ]
        prompt = [{"role": m.role, "content": m.content} for m in group.prompt]
        record = {"id": group.id, "prompt": prompt, "responses": responses}
        lines.append(json.dumps(record | {"source": group.source}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_votes(path: Path) -> list[Ranked]:
    """Return a user's votes from `tinychat duel` or `/vote`; raises DataError.

    Each line holds `prompt` (messages), the replies `a` and `b`, and the `winner`: a, b, tie or
    bad. A tie, good or bad, is a group of two equal replies: nothing to learn from, but a measure.
    """
    votes = []
    for where, record in parse_lines(whole_lines(read_lines(path)), str(path)):
        a, b, winner = record.get("a"), record.get("b"), record.get("winner")
        if not isinstance(a, str) or not isinstance(b, str):
            raise DataError(f'{where} needs two replies, in the fields "a" and "b"')
        if winner not in ("a", "b", "tie", "bad"):
            raise DataError(f'{where}: "winner" is {winner!r}; it can be a, b, tie or bad')
        prompt = _prompt(record, where)
        worse = int(winner in ("a", "b"))
        best, other = (b, a) if winner == "b" else (a, b)
        ended = [_ended(record, side) for side in ("ba" if winner == "b" else "ab")]
        replies = Reply(best, 0, "", ended[0]), Reply(other, worse, "", ended[1])
        votes.append(Ranked(prompt, replies, "votes", _id(prompt)))
    if not votes:
        raise DataError(f"{path} holds no votes: collect some with `tinychat duel`")
    return votes


def _ended(record: dict[str, object], side: str) -> bool:
    """False where a vote says that the writer of this reply was cut off."""
    made = record.get("made")
    maker = made.get(side) if isinstance(made, dict) else None
    return not isinstance(maker, dict) or maker.get("ended", "end") == "end"


def read_rated(folder: Path, name: str = RATINGS) -> Iterator[Rated]:
    """Yield replies that people marked from 1 to 5, one a prompt; raises DataError."""
    path = source_path(name, folder)
    for where, record in parse_lines(read_lines(path), str(path)):
        prompt = _prompt(record, where)
        responses = record.get("responses")
        if not isinstance(responses, list) or not responses:
            raise DataError(f'{where} needs a list "responses"')
        for response in responses:
            yield Rated(prompt, str(response["text"]), round(float(response["score"])))
