"""A conversation with a model: messages in, streamed text out. It knows no terminal."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from time import perf_counter

from tinychat.data.records import Message
from tinychat.dialogue import first_that_fits, render_prompt
from tinychat.generation import (
    Sampling,
    TextStream,
    generate,
    make_generator,
    rewind,
    sentence_ends,
    stop_ids,
)
from tinychat.gpt import GPT, KVCache
from tinychat.runtime.errors import ConfigError
from tinychat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reply:
    """How one reply went. Lengths are in tokens, times in seconds."""

    text: str
    ended: str
    """end (the model closed it), length, loop, or stopped (interrupted)"""
    prompt: int
    cached: int
    """prompt tokens that the cache already held, so that they were not computed again"""
    written: int
    dropped: int
    """user turns left out of the prompt because the context is full"""
    first: float
    """from the question to the first token"""
    final: float
    """from the question to the last token"""
    seconds: float
    """from the question until the reply was closed"""
    drafts: int = 1
    """how often each sentence was written, to say the surest"""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, which pays for reading the prompt: what a stopwatch says
        that runs from the first token on the screen to the last. With several drafts a whole
        sentence is written before its first token is shown, so that this time counts, too."""
        if self.drafts > 1:
            return self.written / max(self.final, 1e-9)
        return (self.written - 1) / max(self.final - self.first, 1e-9) if self.written > 1 else 0.0


class ChatSession:
    """The turns so far, and the KV cache that remembers them.

    A turn enters `messages` when its reply is closed: a reply that is interrupted keeps what it
    wrote; one that wrote nothing leaves the conversation as it was. The next prompt is rendered
    from `messages` alone, so the cache only ever saves work: the tokens that it shares with the
    new prompt are kept, the others computed.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        sampling: Sampling,
        context: int,
        system: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.context = context
        self.system = system
        self.messages: list[Message] = []
        self.last: Reply | None = None
        self._cache: KVCache = model.new_cache(1, context)
        self._held: list[int] = []
        self._pauses = sentence_ends(tokenizer)
        # A turn in tokens, with the two that open and close it; counted once a message.
        self._length = lru_cache(maxsize=2048)(lambda text: len(tokenizer.encode(text)) + 2)
        # One pair of dice for the whole conversation: a seed replays all of it, and a second
        # reply to the same message still differs from the first.
        self._generator = make_generator(sampling.seed, model.device)

    def seed(self, seed: int | None) -> None:
        """Throw the dice from `seed` on; None makes them fresh."""
        self.sampling = replace(self.sampling, seed=seed)
        self._generator = make_generator(seed, self.model.device)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Answer a message. Raises ConfigError, and changes nothing, when it cannot fit."""
        return self._answer(self.messages, text)

    def retry(self) -> Generator[str, None, None]:
        """Answer the last message once more; the new reply takes the old one's place."""
        if not self.messages:
            raise LookupError("no turn to answer again")
        return self._answer(self.messages[:-2], self.messages[-2].content)

    def go_on(self) -> Generator[str, None, None]:
        """Write on where the last reply ended, as if it had not been closed.

        Yields the new text only. Raises ConfigError when the context has no room for more.
        """
        if not self.messages:
            raise LookupError("no reply to go on with")
        history, question, reply = self.messages[:-2], self.messages[-2], self.messages[-1]
        return self._answer(history, question.content, reply.content)

    def undo(self) -> str | None:
        """Forget the last turn; returns what the user had said."""
        if not self.messages:
            return None
        said = self.messages[-2].content
        self.messages = self.messages[:-2]
        self.last = None  # what it measured is forgotten too
        return said

    def clear(self) -> None:
        """Forget every turn. The system message and the settings stay."""
        self.messages = []
        self.last = None

    def fork(self, sampling: Sampling) -> ChatSession:
        """Another session of the same model, with the turns before the last one."""
        other = ChatSession(self.model, self.tokenizer, sampling, self.context, self.system)
        other.messages = self.messages[:-2]
        return other

    def adopt(self, other: ChatSession) -> None:
        """Go on with the turns of another session of the same model, as if they were held here."""
        self.messages, self.last = other.messages, other.last
        self._cache, self._held = other._cache, other._held

    @property
    def last_tokens(self) -> tuple[list[int], list[int]] | None:
        """The last turn's prompt and reply (with the `<|end|>` that closed it) as the model had
        them; None when this session didn't write that turn."""
        last = self.last
        if last is None or not self.messages or last.text != self.messages[-1].content:
            return None
        closed = [self.tokenizer.end_id] if last.ended == "end" else []
        # A reply that was gone on with began before the end of its last prompt.
        begin = len(self._held) - self._held[::-1].index(self.tokenizer.assistant_id)
        return self._held[:begin], [*self._held[begin:], *closed]

    def _answer(
        self, history: Sequence[Message], text: str, begun: str = ""
    ) -> Generator[str, None, None]:
        """Answer `text` after `history`; `begun` is what the reply already says."""
        started = perf_counter()
        turns = [*history, Message("user", text)]
        # 1. the prompt, and what the cache already knows of it
        opened = self._opened(begun)
        prompt = self._render(turns, opened)
        self.last = None
        cached = min(rewind(self._cache, self._held, prompt), len(prompt) - 1)
        room = min(self.sampling.max_tokens, self.context - len(prompt))
        # 2. the reply, token by token
        stream = TextStream(self.tokenizer)
        for token in opened:  # the last one may hold half a character
            stream.push(token)
        written: list[int] = []
        shown: list[str] = []
        first = final = 0.0
        ended, repeated = "stopped", 0
        try:
            for token in generate(
                self.model,
                prompt,
                replace(self.sampling, max_tokens=room),
                stop=stop_ids(self.tokenizer),
                pauses=self._pauses,
                cache=self._cache,
                generator=self._generator,
            ):
                final = perf_counter() - started
                first = first or final
                written.append(token)
                shown.append(stream.push(token))
                if shown[-1]:
                    yield shown[-1]
                if repeated := loop_length(written):
                    ended = "loop"
                    break
            else:
                # An unfinished character at the very end is dropped, never shown as U+FFFD.
                shown.append(stream.flush().rstrip("\ufffd"))
                if shown[-1]:
                    yield shown[-1]
                ended = "length" if len(written) == room else "end"
        # 3. however it ended: remember what was written
        finally:
            self._held = [*prompt, *written]
            content = begun + "".join(shown)
            if repeated:  # one copy of a loop is enough for the model to read again
                kept = self.tokenizer.decode(written[: len(written) - 2 * repeated])
                content = begun + kept.rstrip("\ufffd")
            if content.strip():
                self.messages = [*turns, Message("assistant", content)]
            self.last = Reply(
                text=content,
                ended=ended,
                prompt=len(prompt),
                cached=cached,
                written=len(written),
                dropped=len(turns) // 2 + 1 - prompt.count(self.tokenizer.user_id),
                first=first,
                final=final,
                seconds=perf_counter() - started,
                drafts=self.sampling.side_by_side,
            )

    def _opened(self, begun: str) -> list[int]:
        """The tokens of a reply's beginning: the very ones that were written, where they are known.

        Cut into tokens again, a text that stops in the middle of a word becomes other tokens.
        """
        kept = self.last_tokens if begun else None
        if kept is not None:
            tokens = [token for token in kept[1] if token != self.tokenizer.end_id]
            if self.tokenizer.decode(tokens).rstrip("\ufffd") == begun:
                return tokens
        return self.tokenizer.encode(begun) if begun else []

    def _render(self, turns: Sequence[Message], opened: Sequence[int]) -> list[int]:
        """The prompt: the turns that are still read, and the tokens of a reply that goes on."""
        system = [Message("system", self.system)] if self.system else []
        reserve = min(self.sampling.max_tokens, self.context // 4)
        lengths = [self._length(message.content) for message in [*system, *turns]]
        sizes = lengths[len(system) :]
        sizes[-1] += len(opened)
        limit = self.context - reserve - sum(lengths[: len(system)]) - 2
        first = first_kept(sizes, limit)
        if opened and sizes[-1] > limit:
            raise ConfigError(
                f"The reply and its question are {sizes[-1]} tokens long, but only "
                f"{max(limit, 0)} fit with {reserve} more; it cannot go on."
            )
        prompt = render_prompt(
            [*system, *turns[first:]],
            self.tokenizer,
            context=self.context - len(opened),
            reserve=reserve,
        )
        return [*prompt, *opened]


def first_kept(sizes: Sequence[int], limit: int, share: float = 0.75) -> int:
    """The first turn (a user's) that a full conversation still reads.

    Each forgotten turn moves all others, so that the cache must read them again. So nothing is
    forgotten until `limit` tokens are full, and then so much that only a `share` of them is. The
    answer follows from the turns alone: it replays the conversation, question by question.
    """
    first = total = 0
    for end in range(1, len(sizes) + 1, 2):
        total += sum(sizes[max(end - 2, 0) : end])
        if total > limit:
            first += first_that_fits(sizes[first:end], int(limit * share))
            total = sum(sizes[first:end])
    return first


def loop_length(tokens: Sequence[int], shortest: int = 12, repeats: int = 3) -> int:
    """The length of the segment that the sequence ends with `repeats` times over, or 0.

    A shorter loop ("ha ha ha") is found too, as a segment of several rounds.
    """
    for length in range(shortest, len(tokens) // repeats + 1):
        if tokens[-1] != tokens[-1 - length]:
            continue
        segment = tokens[-length:]
        if all(tokens[-length * (n + 1) : -length * n] == segment for n in range(1, repeats)):
            return length
    return 0
