"""What goes on inside a model while it reads and writes one turn. It knows no terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tinychat.attention import Attention, causal_mask
from tinychat.data.records import Message
from tinychat.dialogue import render_prompt
from tinychat.embeddings import apply_rotary
from tinychat.generation import Sampling, filter_logits
from tinychat.gpt import GPT, Block
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.cli.session import ChatSession


@dataclass(frozen=True)
class Turn:
    """The last turn as tokens."""

    prompt: list[int]
    "all that the model read, from `<|bos|>` to `<|assistant|>`"
    reply: list[int]
    "what it wrote, with the `<|end|>` that closed it, if one did"
    start: int
    "where the last message begins in `prompt`"
    as_written: bool
    "False when the turn came as text (/load, /undo, /model) and was cut into tokens again"

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.reply


def last_turn(session: ChatSession) -> Turn:
    """The tokens of the last turn, exactly as the session had them wherever it did.

    Raises ConfigError when there is no turn.
    """
    if not session.messages:
        raise ConfigError("There is nothing to look into yet; write a message first.")
    tokenizer = session.tokenizer
    kept = session.last_tokens
    if kept is not None:
        prompt, reply = kept
    else:
        # The turn itself comes first: its reply loses its end only where the context does.
        system = [Message("system", session.system)] if session.system else []
        *older, question, answer = session.messages
        context = session.context
        alone = render_prompt([*system, question], tokenizer, context=context, reserve=1)
        reply = tokenizer.encode(answer.content)[: context - len(alone)]
        prompt = render_prompt(
            [*system, *older, question], tokenizer, context=context, reserve=len(reply)
        )
    start = len(prompt) - 1 - prompt[::-1].index(tokenizer.user_id)
    return Turn(prompt, reply, start, kept is not None)


def attention_weights(
    attention: Attention, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, since: int = 0
) -> Tensor:
    """How much each token from `since` on looks at each token: `[B, H, T - since, T]`.

    The fused kernel that the model uses never shows its weights, so they are computed again from
    what the layer read. Each row sums to 1.
    """
    B, T, _ = x_BTD.shape
    q = attention.q_norm(attention.q(x_BTD).view(B, T, -1, attention.head_width)).transpose(1, 2)
    k = attention.k_norm(attention.k(x_BTD).view(B, T, -1, attention.head_width)).transpose(1, 2)
    q, k = apply_rotary(q, cos_TK, sin_TK)[:, :, since:], apply_rotary(k, cos_TK, sin_TK)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores_BHTS = (q @ k.transpose(-2, -1)).float() * attention.head_width**-0.5
    visible_TS = causal_mask(T - since, T, x_BTD.device)
    return scores_BHTS.masked_fill(~visible_TS, float("-inf")).softmax(dim=-1)


@dataclass(frozen=True)
class Alternative:
    """A token that could have come at one place of the reply."""

    id: int
    rank: int
    "1 is the likeliest"
    probability: float
    "as the model sees it"
    left: float
    "after the sampling settings; 0 when they rule it out"
    taken: bool


@dataclass(frozen=True)
class Head:
    """What one attention head does on average over the tokens of the last turn.

    All but `back` are shares of the attention, from 0 to 1.
    """

    layer: int
    head: int
    back: float
    "mean distance in tokens of what it looks at, the first token left out: many heads rest there"
    first: float
    "on the first token of all (Xiao et al. 2023 call it the sink)"
    itself: float
    previous: float
    "on the token just before"
    again: float | None
    """on tokens that followed an earlier copy of this token, which is how induction heads copy
    (Olsson et al. 2022); None when no token of the turn came before"""


class Trace:
    """One pass of the model over a turn, without a cache, and what can be read off it.

    Layers and heads are counted from 1, places in the reply from 0. Place n is about the scores
    that chose `turn.reply[n]`: they stand at the token before it.
    """

    def __init__(self, model: GPT, turn: Turn) -> None:
        self.model = model
        self.turn = turn
        self._read: list[tuple[Tensor, Tensor, Tensor]] = []
        self._stream: list[Tensor] = []
        hooks = []
        for block in model.blocks:
            assert isinstance(block, Block)
            # What a layer's attention reads, with its rotary tables, and what the layer leaves.
            hooks.append(
                block.attention.register_forward_pre_hook(
                    lambda _, inputs: self._read.append(inputs[:3])
                )
            )
            hooks.append(
                block.register_forward_hook(lambda _, __, out_BTD: self._stream.append(out_BTD))
            )
        try:
            with torch.inference_mode():
                model.hidden(torch.tensor([turn.ids], device=model.device))
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def layers(self) -> int:
        return self.model.config.layers

    @torch.inference_mode()
    def logits(self, layer: int | None = None) -> Tensor:
        """The scores at each place of the reply, `[places, V]`, as the model computes them.

        With a `layer`, what they would be if the model ended there: its last norm and its
        embedding read the residual stream (the logit lens, nostalgebraist 2020). The last layer's
        are the model's own.
        """
        stream_TD = self._stream[(layer or self.layers) - 1][0]
        before = slice(len(self.turn.prompt) - 1, len(self.turn.ids) - 1)
        h_ND = self.model.norm(stream_TD[before])
        return F.linear(h_ND, self.model.embed.weight).float()

    @torch.inference_mode()
    def probabilities(self) -> list[float]:
        """What the model gave each token of the reply before any sampling setting."""
        taken_N1 = torch.tensor(self.turn.reply, device=self.model.device)[:, None]
        return self.logits().softmax(dim=-1).gather(1, taken_N1)[:, 0].tolist()

    @torch.inference_mode()
    def alternatives(
        self, place: int, sampling: Sampling, count: int = 10
    ) -> tuple[list[Alternative], int]:
        """The `count` likeliest tokens at a place, likeliest first, and the one that was taken.

        Also returns how many tokens `sampling` leaves in the draw.
        """
        logits_1V = self.logits()[place : place + 1]
        history = torch.tensor([self.turn.reply[:place]], device=self.model.device)
        left_1V = filter_logits(logits_1V, sampling, history if place else None).softmax(dim=-1)
        left, p_V = left_1V[0].tolist(), logits_1V.softmax(dim=-1)[0]
        taken = self.turn.reply[place]
        ranked = logits_1V[0].argsort(descending=True, stable=True).tolist()
        listed = ranked[:count]
        if taken not in listed:
            listed.append(taken)
        rows = [
            Alternative(id, ranked.index(id) + 1, float(p_V[id]), left[id], id == taken)
            for id in listed
        ]
        return rows, sum(p > 0 for p in left)

    @torch.inference_mode()
    def guesses(self, layer: int) -> list[tuple[int, float]]:
        """The likeliest token after this layer at each place of the reply, and its probability."""
        p_N, ids_N = self.logits(layer).softmax(dim=-1).max(dim=-1)
        return list(zip(ids_N.tolist(), p_N.tolist(), strict=True))

    @torch.inference_mode()
    def attention(self, layer: int) -> Tensor:
        """Where the tokens of the turn look in this layer: `[H, tokens of the turn, T]`."""
        block = self.model.blocks[layer - 1]
        assert isinstance(block, Block)
        x_1TD, cos_TK, sin_TK = self._read[layer - 1]
        return attention_weights(block.attention, x_1TD, cos_TK, sin_TK, self.turn.start)[0].cpu()

    @torch.inference_mode()
    def heads(self, layer: int) -> list[Head]:
        """A summary of each head of a layer: sums of its weights over six kinds of places."""
        ids_T = torch.tensor(self.turn.ids)
        weights_HQT = self.attention(layer)
        s_T = torch.arange(len(ids_T))
        t_Q1 = s_T[self.turn.start :, None]
        distance_QT = (t_Q1 - s_T).clamp(min=0)
        # Where token s - 1 is a copy of token t, token s is what followed it.
        follows_QT = torch.zeros_like(distance_QT, dtype=torch.bool)
        follows_QT[:, 1:] = (ids_T[:-1] == ids_T[t_Q1]) & (s_T[1:] < t_Q1)
        sink_QT = (s_T == 0).expand_as(distance_QT)
        kinds_CQT = torch.stack(
            (distance_QT * ~sink_QT, ~sink_QT, sink_QT, s_T == t_Q1, distance_QT == 1, follows_QT)
        ).float()
        sums_HC = weights_HQT.flatten(1) @ kinds_CQT.flatten(1).T
        rows, repeats = len(t_Q1), int(follows_QT.any(dim=-1).sum())
        return [
            Head(
                layer,
                number,
                back=far / max(beyond, 1e-9),
                first=first / rows,
                itself=itself / rows,
                previous=previous / rows,
                again=again / repeats if repeats else None,
            )
            for number, (far, beyond, first, itself, previous, again) in enumerate(
                sums_HC.tolist(), start=1
            )
        ]
