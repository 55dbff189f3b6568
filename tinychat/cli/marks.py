"""What a reward model thinks of a reply, word by word, and what PPO changed. Knows no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

import torch

from tinychat.cli.trace import Trace, Turn
from tinychat.gpt import GPT, load_model
from tinychat.reward_model import RewardModel, load_reward, score
from tinychat.runtime.checkpoint import CheckpointInfo, find
from tinychat.runtime.errors import CheckpointError, ConfigError
from tinychat.runtime.files import file_sha256

if TYPE_CHECKING:
    from tinychat.tokenizer import Tokenizer


def word_ends(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Where each word of a reply ends: the number of tokens up to and with its last one.

    A token that opens with a space begins a word, and so does the first one of a line, and a
    letter of a language without spaces.
    """
    pieces = [tokenizer.token_bytes(id) for id in tokens]
    text = b"".join(pieces)
    begins, place = [], 0
    for number, data in enumerate(pieces):
        if place and _begins(text[place - 1 : place], text[place : place + 4]):
            begins.append(number)
        place += len(data)
    return [*begins, len(tokens)] if tokens else []


def _begins(before: bytes, after: bytes) -> bool:
    """Whether a word begins at a token, from the byte before it and the text behind."""
    letter = after.decode("utf-8", errors="ignore")[:1]
    if not after or letter == "\n" or 0x80 <= after[0] < 0xC0:  # in the middle of a letter
        return False
    return before == b"\n" or letter.isspace() or east_asian_width(letter or " ") in "WF"


def marks_along(model: RewardModel, tokenizer: Tokenizer, turn: Turn) -> tuple[list[int], Marks]:
    """The ends of the reply's words, and the mark it would get if it ended after each of them.

    Each beginning is closed by `<|end|>`, because a reward model has learned from finished replies
    only. The last mark is that of the reply as it is. Raises ConfigError for a turn that is longer
    than the model reads.
    """
    context = model.gpt.config.context
    prompt, cut = turn.prompt, False
    if len(turn.ids) + 1 > context:  # without the older turns
        prompt, cut = [tokenizer.bos_id, *turn.prompt[turn.start :]], True
    if len(prompt) + len(turn.reply) + 1 > context:
        raise ConfigError(
            f"The last turn is {len(turn.ids)} tokens long, and this reward model reads {context}."
        )
    said = turn.reply[:-1] if turn.reply[-1:] == [tokenizer.end_id] else turn.reply
    ends = word_ends(tokenizer, said)
    texts = [[*prompt, *said[:end], tokenizer.end_id] for end in ends]
    texts[-1:] = [[*prompt, *turn.reply]]
    return ends, Marks(score(model, texts, tokenizer.pad_id).tolist(), cut)


@dataclass(frozen=True)
class Marks:
    """In deviations from the mean of good replies."""

    values: list[float]
    "one a word"
    cut: bool
    "True when older turns were left out, because the reward model reads less than the chat"


def reward_checkpoint(name: str, beside: Path) -> Path:
    """The file of the reward model: the named one, else one beside the chat's, else any.

    Raises CheckpointError where there is none.
    """
    neighbour = beside.with_name("reward.safetensors")
    if not name and neighbour.is_file():
        return neighbour
    try:
        return find(name or "reward")
    except CheckpointError:
        if name:
            raise
        raise CheckpointError(
            "There is no reward model here; make one with `tinychat train reward`, "
            "or name its file, as in /why runs/reward/reward.safetensors."
        ) from None


def open_reward(path: Path, tokenizer: Tokenizer, device: torch.device) -> RewardModel:
    """Load a reward model that reads what the chat writes. Raises CheckpointError, ConfigError."""
    model, its_tokenizer, _ = load_reward(path)
    if its_tokenizer.sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{path} has another tokenizer than the model that talks; train a reward model from "
            "that one: tinychat train reward --from CKPT."
        )
    return model.to(device)


@torch.inference_mode()
def token_logprobs(model: GPT, turn: Turn) -> torch.Tensor:
    """ln p of each token of the reply, `[N]`, at temperature 1."""
    taken_N1 = torch.tensor(turn.reply, device=model.device)[:, None]
    return Trace(model, turn).logits().log_softmax(dim=-1).gather(1, taken_N1)[:, 0].cpu()


def kl_terms(policy: GPT, reference: GPT, turn: Turn) -> list[float]:
    """log p(policy) - log p(reference) of each token of the reply, in nats: what PPO pays for.

    The sum is one sample of the KL of the whole reply (chapter 12).
    """
    return (token_logprobs(policy, turn) - token_logprobs(reference, turn)).tolist()


def reference_of(info: CheckpointInfo, tokenizer: Tokenizer) -> tuple[Path, GPT]:
    """The SFT model that an rlhf checkpoint came from: beside it, else the one found by name.

    Raises CheckpointError in a sentence where there is none, or where it is another one.
    """
    neighbour = info.path.with_name("sft.safetensors")
    path = neighbour if neighbour.is_file() else find("sft")
    wanted = info.lineage.get("parent_sha256")
    if wanted and file_sha256(path) != wanted:
        raise CheckpointError(f"{path} is not the one that {info.path.name} was made from.")
    model, its_tokenizer, _ = load_model(path)
    if its_tokenizer.sha256 != tokenizer.sha256:
        raise CheckpointError(f"{path} has another tokenizer than {info.path.name}.")
    return path, model
