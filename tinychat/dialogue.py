"""Give text roles: a chat template, a loss mask, a memory that fits, and clean conversations.

Generated from chapters/09_dialogue.py: edit that file,
then run `python -m tinychat.book export`.
"""

import html as html_escapes
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.data.records import Dialogue, Message
from tinychat.runtime.errors import ConfigError, DataError
from tinychat.tokenizer import Tokenizer

CHAT_TEMPLATE = "tinychat-1"


def role_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the control token that opens a turn of each role."""
    return {
        "system": tokenizer.system_id,
        "user": tokenizer.user_id,
        "assistant": tokenizer.assistant_id,
    }


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens. `loss_mask` is True on what the model must learn to produce.

    Entry i of both speaks of the same token. A trainer that predicts token i + 1 from token i
    therefore uses `tokens[:-1]`, `tokens[1:]` and `loss_mask[1:]`. `system` tells whether it begins
    with a system message.
    """

    tokens: list[int]
    loss_mask: list[bool]
    system: bool = False


def split_system(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the system message (none or one) and the turns after it.

    Raises DataError unless the turns go user, assistant, user, ... and there is at least one.
    """
    cut = 1 if messages and messages[0].role == "system" else 0
    turns = tuple(messages[cut:])
    if not turns:
        raise DataError("The conversation has no user message; it needs at least one.")
    for number, message in enumerate(turns):
        wanted = "assistant" if number % 2 else "user"
        if message.role != wanted:
            raise DataError(
                f"Message {cut + number + 1} of the conversation has the role {message.role!r}; "
                f"after an optional system message, user and assistant take turns, so it must be "
                f"{wanted!r}."
            )
    return tuple(messages[:cut]), turns


def _encode_turn(message: Message, tokenizer: Tokenizer) -> list[int]:
    """`<|role|> text <|end|>`: text can't forge the control tokens, because `encode` never
    yields them."""
    role = role_ids(tokenizer)[message.role]
    return [role, *tokenizer.encode(message.content), tokenizer.end_id]


def first_that_fits(sizes: Sequence[int], limit: int) -> int:
    """Return the first turn to keep so that the sizes from it on sum to at most `limit`.

    Turns go in pairs, oldest first, so that a question never loses its answer and the first one
    kept is always the user's. The last turn (with its question) stays even when it is too long.
    """
    first, total = 0, sum(sizes)
    while total > limit and first + 2 < len(sizes):
        total -= sizes[first] + sizes[first + 1]
        first += 2
    return first


def render(
    dialogue: Dialogue | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    train_on: str | None = None,
    context: int | None = None,
) -> Rendered:
    """Render a whole conversation for training, with the template "tinychat-1".

        <|bos|> [<|system|> text <|end|>] <|user|> text <|end|> <|assistant|> text <|end|> ...

    The mask is True on the text and the `<|end|>` of assistant turns: of all of them
    (`train_on="all"`) or of the last one only (`"last"`: earlier ones are wrong on purpose). None
    takes the dialogue's own wish. At most `context` tokens: the oldest pairs of turns go first,
    then the end of what is left is cut. Raises DataError for turns in the wrong order.
    """
    if isinstance(dialogue, Dialogue):
        messages: Sequence[Message] = dialogue.messages
        train_on = train_on or dialogue.train_on
    else:
        messages = dialogue
        train_on = train_on or "all"
    if train_on not in ("all", "last"):
        raise DataError(f"train_on is {train_on!r}; it must be 'all' or 'last'.")
    system, turns = split_system(messages)
    # 1. what always stays
    tokens = [tokenizer.bos_id]
    for message in system:
        tokens += _encode_turn(message, tokenizer)
    mask = [False] * len(tokens)
    # 2. the turns that fit
    encoded = [_encode_turn(message, tokenizer) for message in turns]
    first = 0
    if context is not None:
        first = first_that_fits([len(turn) for turn in encoded], context - len(tokens))
    # 3. the mask: the opening token of a turn is given, the rest of a reply is learned
    last_reply = max((n for n, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    for number in range(first, len(turns)):
        learn = turns[number].role == "assistant" and (train_on == "all" or number == last_reply)
        tokens += encoded[number]
        mask += [False] + [learn] * (len(encoded[number]) - 1)
    return Rendered(tokens[:context], mask[:context], bool(system))


def coloured(rendered: Rendered, tokenizer: Tokenizer, *, html: bool = False) -> str:
    """Return the tokens side by side for a terminal (ANSI) or a page: learned ones stand out.

    Learned tokens are green and underlined (the underline for eyes that don't tell green), control
    tokens dim, everything else plain; a thin bar separates tokens.
    """
    controls = {*role_ids(tokenizer).values(), tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id}
    shown = []
    for token, learned in zip(rendered.tokens, rendered.loss_mask, strict=True):
        piece = tokenizer.piece(token)
        if html:
            style = "color:#177245;text-decoration:underline" if learned else ""
            style += ";opacity:.6" if token in controls else ""
            shown.append(f'<span style="{style.strip(";")}">{html_escapes.escape(piece)}</span>')
        else:
            codes = (["32", "4"] if learned else []) + (["2"] if token in controls else [])
            shown.append(f"\033[{';'.join(codes)}m{piece}\033[0m" if codes else piece)
    return "|".join(shown)


def render_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    context: int | None = None,
    reserve: int = 0,
) -> list[int]:
    """Render a conversation that waits for a reply: it ends with `<|assistant|>`.

    At most `context - reserve` tokens, so that a reply of `reserve` tokens fits: the oldest pairs
    of turns are forgotten first, the system message never. Without a `context`, nothing is. Raises
    ConfigError when even the last message alone is too long, DataError when the last message is
    not the user's.
    """
    system, turns = split_system(messages)
    if turns[-1].role != "user":
        raise DataError("The conversation ends with a reply; its last message must be the user's.")
    head = [tokenizer.bos_id]
    for message in system:
        head += _encode_turn(message, tokenizer)
    encoded = [_encode_turn(message, tokenizer) for message in turns]
    if context is not None:
        limit = context - reserve - len(head) - 1
        if len(encoded[-1]) > limit:
            raise ConfigError(
                f"Your message is {len(encoded[-1])} tokens long, but only {max(limit, 0)} fit "
                f"(the model reads {context}, {reserve} are kept for the reply and {len(head) + 1} "
                "for the system message and the template); shorten it or ask for a shorter reply."
            )
        encoded = encoded[first_that_fits([len(turn) for turn in encoded], limit) :]
    return head + [token for turn in encoded for token in turn] + [tokenizer.assistant_id]


PERSONAL_DATA = {
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "web address": re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE),
    # International, North American, and with a leading zero; most dates and numbers don't match.
    "phone number": re.compile(
        r"(?<!\w)(?:\+\d[\d ().-]{7,}\d"
        r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}"
        r"|0\d{1,4}[ /-]\d{3,}[ -]?\d{2,})(?!\w)"
    ),
}


def personal_data(text: str) -> list[tuple[str, str]]:
    """Return every (kind, text) that looks like a person's e-mail, web address or phone number."""
    return [(kind, found) for kind, rule in PERSONAL_DATA.items() for found in rule.findall(text)]


def normalized(text: str) -> str:
    """Return only the words, in lower case: what two copies of one text have in common."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def shingles(text: str, words: int = 5) -> frozenset[str]:
    """Return every run of `words` neighbouring words of a normalized text (Broder 1997)."""
    parts = text.split()
    return frozenset(
        " ".join(parts[start : start + words]) for start in range(max(1, len(parts) - words + 1))
    )


Sketch = tuple[frozenset[str], list[tuple[int, bytes]]]


class NearDuplicates:
    """Finds texts that share most of their shingles, without comparing all pairs.

    MinHash (Broder 1997): two sets have the same smallest hash with a probability equal to their
    overlap (intersection by union). 16 bands of 4 such hashes make candidates, which are then
    compared exactly; at an overlap of 0.8, fewer than one pair in a thousand slips through.
    """

    BANDS, ROWS = 16, 4

    def __init__(self, overlap: float):
        self._overlap = overlap
        draw = np.random.default_rng(0)
        size = self.BANDS * self.ROWS
        self._factors = draw.integers(1, 2**31, size=size, dtype=np.uint64)
        self._offsets = draw.integers(0, 2**31, size=size, dtype=np.uint64)
        self._buckets: dict[tuple[int, bytes], list[frozenset[str]]] = defaultdict(list)

    def sketch(self, text: str) -> Sketch:
        """Return what is compared of a text: its shingles, and the place of each band."""
        return self.sketch_of(shingles(text))

    def sketch_of(self, mine: frozenset[str]) -> Sketch:
        """Return shingles with the place of each band."""
        hashes = np.array([zlib.crc32(shingle.encode()) for shingle in mine], dtype=np.uint64)
        # The prime just above the largest hash: a product wraps around it many times. (A modulus
        # that it hardly reaches keeps the order, and all 64 choose the same shingle.)
        mixed = (hashes[:, None] * self._factors + self._offsets) % np.uint64(4_294_967_311)
        bands = mixed.min(axis=0).reshape(self.BANDS, self.ROWS)
        return mine, [(number, band.tobytes()) for number, band in enumerate(bands)]

    def seen(self, sketch: Sketch) -> bool:
        """True if a text that was added was nearly this one."""
        mine, keys = sketch
        others = (other for key in keys for other in self._buckets.get(key, ()))
        return any(len(mine & other) >= self._overlap * len(mine | other) for other in others)

    def add(self, sketch: Sketch) -> None:
        """Remember a text."""
        mine, keys = sketch
        for key in keys:
            self._buckets[key].append(mine)


@dataclass(frozen=True)
class Curated:
    """What `curate` kept, and the ids of what it removed under each reason."""

    kept: list[Dialogue]
    removed: dict[str, list[str]]


def prompt_of(dialogue: Dialogue) -> str:
    """Return everything before the last reply, without the system message."""
    _, turns = split_system(dialogue.messages)
    last_user = len(turns) if turns[-1].role == "user" else len(turns) - 1
    return "\n".join(turn.content for turn in turns[:last_user])


def curate(
    dialogues: Iterable[Dialogue],
    *,
    cap: int | None = 200,
    source_of: Callable[[Dialogue], str] = lambda dialogue: dialogue.source,
    prefix: int = 200,
    overlap: float = 0.8,
) -> Curated:
    """Clean a set of conversations as InstructGPT's prompts were (Ouyang et al. 2022, 3.2 and A).

    In this order, the first of its kind stays: 1. exact copies, 2. near copies (`overlap` of their
    shingles), 3. prompts that share their first `prefix` letters, 4. conversations with personal
    data, 5. more than `cap` from one source (`source_of`; None is no cap). InstructGPT capped at
    200 a user, so that no single voice decides what the model becomes.
    """
    kept: list[Dialogue] = []
    removed: dict[str, list[str]] = defaultdict(list)
    exact: set[str] = set()
    beginnings: set[str] = set()
    near = NearDuplicates(overlap)
    taken: Counter[str] = Counter()
    for dialogue in dialogues:
        text = "\n".join(turn.content for turn in dialogue.messages)
        said = normalized(text)
        beginning = normalized(prompt_of(dialogue))[:prefix]
        source = source_of(dialogue)
        if said in exact:
            reason = "exact copy"
        elif near.seen(sketch := near.sketch(said)):
            reason = "near copy"
        elif len(beginning) == prefix and beginning in beginnings:
            reason = "long common prefix"
        elif personal_data(text):
            reason = "personal data"
        elif cap is not None and taken[source] >= cap:
            reason = "too many from one source"
        else:
            kept.append(dialogue)  # only what stays makes others its copies
            exact.add(said)
            near.add(sketch)
            beginnings.add(beginning)
            taken[source] += 1
            reason = None
        if reason:
            removed[reason].append(dialogue.id)
    return Curated(kept, dict(removed))
