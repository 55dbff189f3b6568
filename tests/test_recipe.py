"""Shares of the sources: worked out by hand, and what must hold for any amounts of text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.data.prepare import EMBEDDED
from tinychat.data.recipe import OWN, WISHES, shares
from tinychat.data.sources import TABLE
from tinychat.runtime.errors import DataError


def test_wishes_are_shares_of_sources_that_exist():
    assert set(WISHES) <= {source.name for source in TABLE} | set(EMBEDDED)
    assert set(EMBEDDED) <= set(WISHES)
    for main, final, passes in WISHES.values():
        assert 0 <= main < 1 and 0 <= final < 1 and passes > 0


def test_by_hand():
    # 1,000 tokens are wanted. Ten tokens of dialogues may be read 16 times: a share of 0.16, less
    # than the wish of 6 / 27. What is left, 0.84, is shared out 20 to 1.
    available = {"tinystories_sample": 10_000, "dialogues": 10, "stories": 1_000}
    assert shares(available, 1_000, final=False) == pytest.approx(
        {"dialogues": 0.16, "tinystories_sample": 0.84 * 20 / 21, "stories": 0.84 / 21}
    )


def test_the_final_phase_has_its_own_wishes():
    available = {"tinystories_sample": 10**9, "dialogues": 10**9}
    assert shares(available, 1_000, final=False) == pytest.approx(
        {"tinystories_sample": 20 / 26, "dialogues": 6 / 26}
    )
    assert shares(available, 1_000, final=True) == pytest.approx(
        {"tinystories_sample": 14 / 32, "dialogues": 18 / 32}
    )


def test_limits_stretch_when_everything_is_short():
    # 8 passes over 40 tokens make 320 of 1,000: all limits grow by the same factor, 1 / 0.32.
    found = shares({"stories": 10, "explanations": 30}, 1_000, final=False)
    assert found == pytest.approx({"stories": 0.25, "explanations": 0.75})


def test_what_was_read_before_counts_against_the_limit():
    # Dialogues may be read 16 times: 160 of 1,000 tokens, of which 100 are already behind the
    # model. Stories were read more often than the limit allows, and may be read once more: 20.
    available = {"tinystories_sample": 10_000, "dialogues": 10, "stories": 20}
    read = {"dialogues": 100.0, "stories": 500.0}
    assert shares(available, 1_000, final=False, read=read) == pytest.approx(
        {"dialogues": 0.06, "stories": 0.02, "tinystories_sample": 0.92}
    )


def test_a_file_of_your_own_counts_as_stories_do():
    found = shares({"mine.txt": 10**9, "tinystories_sample": 10**9}, 1_000, final=False)
    assert found == pytest.approx({"mine.txt": 0.5, "tinystories_sample": 0.5})
    assert shares({"mine.txt": 3}, 1_000, final=True) == pytest.approx({"mine.txt": 1.0})


def test_sources_without_a_wish_or_without_text():
    assert shares({"sgd": 100}, 1_000, final=False) == pytest.approx({"sgd": 1.0})
    found = shares({"sgd": 100, "stories": 100, "dialogues": 0}, 1_000, final=False)
    assert found == pytest.approx({"stories": 1.0})
    with pytest.raises(DataError, match="no text"):
        shares({"stories": 0}, 1_000, final=False)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*WISHES, "mine.txt", "other.jsonl"]), st.integers(1, 10**9), min_size=1
    ),
    st.integers(1, 10**9),
    st.booleans(),
)
def test_shares_sum_to_one_within_the_limits(available, tokens, final):
    found = shares(available, tokens, final=final)
    assert sum(found.values()) == pytest.approx(1)
    assert set(found) <= set(available) and min(found.values()) > 0
    limit = {name: WISHES.get(name, OWN)[2] * available[name] / tokens for name in found}
    stretch = max(1.0, 1 / sum(limit.values()))
    for name, share in found.items():
        assert share <= limit[name] * stretch * (1 + 1e-6)
