"""Replies of our own model for `tinychat train reward`: which prompts it answers, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinychat.data.preferences import Ranked
    from tinychat.gpt import GPT
    from tinychat.tokenizer import Tokenizer

TEMPERATURES = (0.3, 0.7, 1.0)  # the calmest first: its reply stands above the others
REPLY = 96  # tokens
ROWS = 128  # replies at a time; several times as fast as 32 with a small model


def in_turn(*sources: Iterable[Ranked]) -> Iterator[Ranked]:
    """One prompt of each source, then the next of each, until all are used up."""
    return (one for one in chain.from_iterable(zip_longest(*sources)) if one is not None)


def unwritten(folder: Path | None, judge: bool) -> Iterator[Ranked]:
    """The public prompts of one half that PPO may ask, too; nobody has written a reply to them."""
    from tinychat.data.preferences import Ranked, for_judge, prompt_key
    from tinychat.data.split import split_of
    from tinychat.data.unseen import is_asked, public_prompts

    for prompt in public_prompts(folder) if folder else ():
        key = prompt_key(prompt)
        if is_asked(prompt) and for_judge(prompt) == judge and split_of(key) == "train":
            yield Ranked(prompt, (), "public", key)


def take_samples(
    samplers: Sequence[GPT],
    pieces: Tokenizer,
    asked: Sequence[Ranked],
    path: Path,
    seed: int,
) -> None:
    """Let each model answer each prompt at each temperature, and keep the ranked replies."""
    from tinychat.data.onpolicy import sample_ranked
    from tinychat.data.preferences import write_ranked
    from tinychat.generation import Sampling

    print(f"Sampling replies to {len(asked):,} prompts ...")
    ways = [
        Sampling(temperature=temperature, top_p=1.0, max_tokens=REPLY, seed=seed)
        for temperature in TEMPERATURES
    ]
    ranked = [
        group for gpt in samplers for group in sample_ranked(gpt, pieces, asked, ways, rows=ROWS)
    ]
    partial = path.with_suffix(".tmp")
    write_ranked(partial, ranked)
    partial.replace(path)
