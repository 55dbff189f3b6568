"""What a training step reads."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """Token ids to read, the ids to predict, and which predictions count.

    Each `[B, T]` int64: NumPy arrays as they leave the mix, tensors where training made them so.
    """

    inputs_BT: Any
    targets_BT: Any
    mask_BT: Any
    "1 where the prediction carries loss, else 0"
    segments_BT: Any = None
    "where several texts share a row: a number for each; tokens see only their own text"
