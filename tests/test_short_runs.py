"""A short run goes without compiling, which would take most of its minutes."""

import pytest

from tinychat.cli.runs import COMPILING, override, without_compiling
from tinychat.pretraining import TrainConfig


@pytest.mark.parametrize(
    ("minutes", "chosen", "compiled"),
    [
        (1.0, [], False),
        (COMPILING, [], True),
        (None, [], True),  # by steps or epochs: nobody said that it should be short
        (1.0, ["compiled=true"], True),
        (60.0, ["compiled=false"], False),
    ],
)
def test_minutes_decide_whether_a_run_compiles(minutes, chosen, compiled):
    config = override(TrainConfig(), without_compiling(minutes, [*chosen, "batch=4"]))
    assert (config.compiled, config.batch) == (compiled, 4)
