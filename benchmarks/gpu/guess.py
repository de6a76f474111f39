"""How long a case will take, guessed from the shape of its model: enough to say what fits into a call."""

from __future__ import annotations

from benchmarks.gpu.models import SHAPES

RATE = 3.5e14
"""Operations a second that a step is taken to reach: somewhat less than half of what a data centre's card multiplies in
16 bit. Nothing was measured; the runner finds out by how much all guesses are wrong (`chunks.pace`)."""

START = 20.0
"""Seconds until a process has imported everything."""

AROUND = 6.0
"""Seconds for preparing rows, finding the rate of a matrix product, and making a trainer."""


def linear_parameters(shape: str) -> float:
    """Parameters in the linear layers of a shape's blocks: q and o, k and v, gate, up and down."""
    facts = SHAPES[shape]
    kv = facts["num_key_value_heads"] * facts["head_dim"]
    block = facts["hidden_size"] * (2 * facts["hidden_size"] + 2 * kv + 3 * facts["intermediate_size"])
    return float(facts["num_hidden_layers"] * block)


def seconds(shape: str, tokens: int, steps: int, *, length: int, recomputed: float = 1.0, slow: float = 1.0) -> float:
    """Of building the model and taking `steps` steps of `tokens` tokens.

    length      of a row, which attention grows with
    recomputed  the share of the layers
    slow        how much slower than others this way is taken to be (padding, no kernels)
    """
    facts = SHAPES[shape]
    linears = 2 * linear_parameters(shape) * (2 + recomputed)
    head = 6 * facts["hidden_size"] * facts["vocab_size"]
    attention = 2 * length * facts["num_hidden_layers"] * facts["hidden_size"] * (3.5 + recomputed)
    building = 1e-9 * (linear_parameters(shape) + 2 * facts["hidden_size"] * facts["vocab_size"])
    training = slow * steps * tokens * (linears + head + attention) / RATE
    return float(AROUND + building + training)
