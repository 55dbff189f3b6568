"""How much of each source goes into pretraining: a wish in shares, a limit in passes.

Shares say what we would like to read; limits say how often a text may be read before another
reading teaches little. About four passes cost nothing (Muennighoff et al. 2023). We measured the
same: between 38 and 69 M tokens the two public texts that were read nine times and more got worse
on their unseen parts, those read up to six times did not (chapters/lab_notes.md). Our own texts say
who tinychat is, and may be read more often: dialogues that had been read ten times still gained a
tenth from being read on (how much of that other texts gave is not known). The basics are there to
be known by heart, and knowing takes many meetings with a fact: after a hundred a model holds about
one bit for each parameter, after a thousand two (Allen-Zhu and Li 2024). What a short source can't
give, the long ones fill.
"""

from collections.abc import Mapping

from tinychat.runtime.errors import DataError

# source: (share in the main phase, share in the final phase, most passes over it)
WISHES: dict[str, tuple[float, float, float]] = {
    "children_classics": (0.20, 0.08, 6),
    "childrens_storybooks_ccby": (0.04, 0.05, 5),
    "tinystories_sample": (0.20, 0.14, 5),
    "onestop_english": (0.03, 0.03, 5),
    "stories": (0.01, 0.02, 8),
    "explanations": (0.01, 0.02, 8),
    "dialogues": (0.06, 0.18, 16),
    "basics": (0.06, 0.45, 22),
    "self_dialogue": (0.10, 0.08, 6),
    "synthetic_persona_chat": (0.03, 0.05, 6),
    "chitchat_byu_clean": (0.02, 0.02, 6),
    "topical_chat": (0.03, 0.04, 6),
    "story_requests": (0.04, 0.07, 4),
    "dolly_6k": (0.03, 0.08, 5),
    "wikipedia_short_qa": (0.02, 0.05, 6),
    "wordnet_definitions": (0.01, 0.01, 4),
    "fun_facts": (0.01, 0.01, 4),
    "wikipedia_en_selected": (0.08, 0.04, 4),
    "classic_fiction": (0.06, 0.02, 4),
    "wikinews_en": (0.01, 0.01, 4),
    "wikipedia_en_more": (0.01, 0.0, 2),
    "sgd": (0.0, 0.0, 2),
}
OWN = (0.2, 0.2, 8)  # a user's own file
FINAL = 0.3
"the last part of a run, in which the learning rate falls, reads the second column"


def shares(
    available: Mapping[str, int],
    tokens: float,
    *,
    final: bool,
    read: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return each source's share of `tokens`, summing to 1.

    `available` holds tokens by source; a source that WISHES does not name (a user's own file)
    counts as OWN. `read` holds the tokens by source that the weights have met in earlier runs:
    they count against the limit, except that each source may be read once more, so that nothing
    is forgotten. Where limits leave too little text for the budget, all limits stretch by
    the same factor: the budget is always filled. Raises DataError where there is no text at all.
    """
    before = read or {}
    if not any(available.values()):
        raise DataError("there is no text to train on: name a file with --source")
    wishes = {name: WISHES.get(name, OWN) for name in available}
    wanted = {name: wish[1 if final else 0] for name, wish in wishes.items()}
    wanted = {name: share for name, share in wanted.items() if share > 0 and available[name] > 0}
    if not wanted:  # only sources that the recipe leaves out
        wanted = {name: 1.0 for name in available if available[name] > 0}
    limit = {
        name: max(wishes[name][2] * available[name] - before.get(name, 0), available[name]) / tokens
        for name in wanted
    }
    stretch = max(1.0, 1 / sum(limit.values()))
    limit = {name: most * stretch for name, most in limit.items()}
    result: dict[str, float] = {}
    # Water-filling: what hits its limit stays there, the rest is shared out again by wish.
    while wanted:
        scale = (1 - sum(result.values())) / sum(wanted.values())
        full = [name for name, wish in wanted.items() if wish * scale >= limit[name] * (1 - 1e-9)]
        if not full or len(full) == len(wanted):
            result |= {name: wish * scale for name, wish in wanted.items()}
            break
        for name in full:
            result[name] = limit[name]
            del wanted[name]
    total = sum(result.values())
    return {name: share / total for name, share in result.items()}
