# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Embeddings and positions
#
# Turn token numbers into vectors, and tell the model where each token stands.

# %% tags=["export"]
import torch
import torch.nn.functional as F
from torch import Tensor


# %% tags=["export"]
def nearest(table_VD: Tensor, query_D: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the `count` rows that point most nearly where the query points, best first.

    Each as (row number, cosine from -1 to 1). Lengths don't count; a row of zeros scores 0.
    """
    scores_V = F.normalize(table_VD, dim=-1) @ F.normalize(query_D, dim=-1)
    best = scores_V.topk(min(count, len(table_VD)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


# %% tags=["export"]
def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return the fixed position vectors of Vaswani et al. 2017, section 3.5, as `[length, width]`.

    Even columns hold sines, odd columns cosines, of wavelengths from 2π to 10000 · 2π tokens.
    Raises ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"width {width} is odd; sines and cosines come in pairs")
    position_T1 = torch.arange(length, dtype=torch.float32)[:, None]
    frequency_D = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    table_TD = torch.empty(length, width)
    table_TD[:, 0::2] = torch.sin(position_T1 * frequency_D)
    table_TD[:, 1::2] = torch.cos(position_T1 * frequency_D)
    return table_TD


# %% tags=["export"]
def rotary_tables(length: int, head_width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for rotary positions, each `[length, head_width / 2]`, float32.

    Pair number i of a head turns by `theta ** (-2i / head_width)` radians a token
    (Su et al. 2021, RoFormer, equation 15).
    """
    pair = torch.arange(0, head_width, 2, dtype=torch.float32)
    speed = theta ** (-pair / head_width)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * speed
    return angle.cos(), angle.sin()


# %% tags=["export"]
def apply_rotary(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate the vector of each token by its position; lengths stay, shapes stay.

    Component i pairs with component i + K/2 (the layout of GPT-NeoX, Llama and Qwen), not with
    its neighbour as in the paper: a permutation of the head's columns, so equally expressive,
    and two contiguous halves are faster to read.
    """
    left, right = x_BHTK.chunk(2, dim=-1)
    return torch.cat((left * cos_TK - right * sin_TK, right * cos_TK + left * sin_TK), dim=-1)
