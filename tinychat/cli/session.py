"""A conversation with a model: messages in, streamed text out. It knows no terminal."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from tinychat.data.records import Message
from tinychat.dialogue import render_prompt
from tinychat.generation import (
    Sampling,
    TextStream,
    generate,
    make_generator,
    rewind,
    stop_ids,
)
from tinychat.gpt import GPT, KVCache
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
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, which pays for reading the prompt."""
        return (
            (self.written - 1) / max(self.seconds - self.first, 1e-9) if self.written > 1 else 0.0
        )


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

    def undo(self) -> str | None:
        """Forget the last turn; returns what the user had said."""
        if not self.messages:
            return None
        said = self.messages[-2].content
        self.messages = self.messages[:-2]
        return said

    def clear(self) -> None:
        """Forget every turn. The system message and the settings stay."""
        self.messages = []
        self.last = None

    def _answer(self, history: Sequence[Message], text: str) -> Generator[str, None, None]:
        started = perf_counter()
        self.last = None
        turns = [*history, Message("user", text)]
        # 1. the prompt, and what the cache already knows of it
        prompt = self._render(turns)
        cached = min(rewind(self._cache, self._held, prompt), len(prompt) - 1)
        room = min(self.sampling.max_tokens, self.context - len(prompt))
        # 2. the reply, token by token
        stream = TextStream(self.tokenizer)
        written: list[int] = []
        shown: list[str] = []
        first, ended, repeated = 0.0, "stopped", 0
        try:
            for token in generate(
                self.model,
                prompt,
                replace(self.sampling, max_tokens=room),
                stop=stop_ids(self.tokenizer),
                cache=self._cache,
                generator=self._generator,
            ):
                first = first or perf_counter() - started
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
            content = "".join(shown)
            if repeated:  # one copy of a loop is enough for the model to read again
                kept = self.tokenizer.decode(written[: len(written) - 2 * repeated])
                content = kept.rstrip("\ufffd")
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
                seconds=perf_counter() - started,
            )

    def _render(self, turns: Sequence[Message]) -> list[int]:
        system = [Message("system", self.system)] if self.system else []
        reserve = min(self.sampling.max_tokens, self.context // 4)
        return render_prompt(
            [*system, *turns], self.tokenizer, context=self.context, reserve=reserve
        )


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
