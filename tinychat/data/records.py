"""What data is made of: messages, dialogues, documents."""

from dataclasses import dataclass
from typing import Literal

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: str
    "system, user or assistant"
    content: str


@dataclass(frozen=True)
class Rejected:
    """A worse reply to the last user message, with the name of what is wrong with it."""

    flaw: str
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation. Where `rejected` holds replies, the last message is the better one."""

    id: str
    topic: str
    messages: tuple[Message, ...]
    rejected: tuple[Rejected, ...] = ()
    "worse replies to the same last user message, least bad first"
    train_on: Literal["all", "last"] = "all"
    "which assistant turns may carry loss: last where an earlier one is wrong on purpose"
    source: str = "corpus"


@dataclass(frozen=True)
class Document:
    """A text that stands for itself: a story, an article, a chapter of a book."""

    id: str
    text: str
    source: str = "corpus"
