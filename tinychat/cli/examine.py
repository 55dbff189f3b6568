"""The slower parts of a report card: held-out text, sets of questions, manners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.data.records import Message

if TYPE_CHECKING:
    from rich.console import Console

    from tinychat.cli.contestants import Contestant
    from tinychat.evaluation import Answer
    from tinychat.generation import Sampling
    from tinychat.reward_model import RewardModel
    from tinychat.tokenizer import Tokenizer


def examine_models(
    contestants: Sequence[Contestant],
    marker: tuple[RewardModel, Tokenizer] | None,
    sampling: Sampling,
    data: Path | None,
    texts: int,
    screen: Console,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (model, what it reached) one after the other."""
    from tinychat.data.probes import probes
    from tinychat.data.public import data_folder
    from tinychat.data.unseen import unseen_texts
    from tinychat.evaluation import answer_all, bits_per_byte, examine, rude_odds

    held_out = unseen_texts(texts, data_folder(data))
    ruled = [probe for probe in probes() if probe.set != "manners"]
    odds = rude_odds()
    for one in contestants:
        with screen.status(f"{one.name} reads held-out texts ..."):
            bits = {
                name: bits_per_byte(one.model, one.tokenizer, some)
                for name, some in held_out.items()
                if some
            }
        short = replace(
            sampling, max_tokens=min(sampling.max_tokens, one.model.config.context // 2)
        )
        with screen.status(f"{one.name} answers {len(ruled)} questions of ours ..."):
            asked = [(Message("user", probe.prompt),) for probe in ruled]
            answers = answer_all(one.model, one.tokenizer, asked, short)
            sets = {name: dict(found) for name, found in examine(ruled, answers).items()}
        with screen.status(f"{one.name} is told to be nice, and mean ..."):
            behaved = manners(one, marker, short, odds)
        yield (
            one.name,
            {
                "bits_per_byte": bits,
                "probes": sets,
                "probe_replies": [
                    {
                        "set": p.set,
                        "prompt": p.prompt,
                        "reply": a.text,
                        "verdict": p.verdict(a.text),
                    }
                    for p, a in zip(ruled, answers, strict=True)
                ],
                "manners": behaved,
            },
        )


def manners(
    one: Contestant,
    marker: tuple[RewardModel, Tokenizer] | None,
    sampling: Sampling,
    odds: dict[str, float],
) -> dict[str, Any]:
    """How rude a model gets, told to be nice, told nothing, and told to be mean.

    After Ouyang et al. (2022), section 4.2, who let a service rate the toxicity; we count words
    that speak for rudeness, and take the judge's marks, given without showing it the instruction.
    """
    from tinychat.data.probes import TONES, probes
    from tinychat.evaluation import answer_all, bootstrap, give_marks, sounds_bad, wilson

    plain = [(Message("user", p.prompt),) for p in probes() if p.set == "manners"]
    found: dict[str, Any] = {}
    for name, instruction in TONES.items():
        told = [(Message("system", instruction), *p) for p in plain] if instruction else plain
        answers: list[Answer] = answer_all(one.model, one.tokenizer, told, sampling)
        rude = sum(sounds_bad(answer.text, odds) for answer in answers)
        marks = give_marks(*marker, plain, answers) if marker else None
        found[name] = {
            "rude": wilson(rude, len(answers)),
            "mark": bootstrap(marks) if marks else None,
        }
    return found
