"""Model FLOPs of a training step, counted exactly: what the architecture asks for, whatever a program computes.

A multiply and an add are two. Products with parameters count for what they multiply: every token that is not padding,
or, in the head, every target. Attention counts the pairs that see one another. The backward pass is twice the forward.
What is recomputed, norms, activations and the optimizer do not count.
"""

import itertools
import math
from typing import Any

import jax
import numpy as np

from flax_encoder.config import EncoderConfig


def visible_pairs(segment_ids: np.ndarray, window: int | tuple[int, int] | None) -> int:
    """How many (query, key) pairs of rows [B, T] attention looks at: same document, at most `window` apart, or so many
    to the (left, right)."""
    sides = window if isinstance(window, tuple) else (window, window)
    total = 0
    for row in np.asarray(segment_ids):
        starts = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
        for start, stop in itertools.pairwise(starts):
            if row[start] > 0:
                length = int(stop - start)
                reaches = [length - 1 if side is None else min(side, length - 1) for side in sides]
                total += length + sum(length * reach - reach * (reach + 1) // 2 for reach in reaches)
    return total


def forward_flops(
    config: EncoderConfig, segment_ids: np.ndarray, num_targets: int, num_classes: int | None = None
) -> int:
    """FLOPs of one forward pass of attention layers with BERT's head for masked LM, or for so many classes."""
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads or config.num_heads
    tokens = int(np.count_nonzero(segment_ids))
    per_token = D * (N + 2 * K) * H + N * H * D + (3 if config.gated else 2) * D * F
    pairs = {window: visible_pairs(segment_ids, window) for window in set(config.windows)}
    attended = sum(2 * N * H * pairs[window] for window in config.windows)
    width = config.embedding_dim or D
    out = width * config.vocab_size if num_classes is None else D * num_classes
    head = num_targets * (D * (width if num_classes is None else D) + out)
    projection = tokens * width * D if width != D else 0
    return 2 * (config.num_layers * tokens * per_token + attended + head + projection)


def step_flops(
    config: EncoderConfig, segment_ids: np.ndarray, num_targets: int, num_classes: int | None = None
) -> int:
    return 3 * forward_flops(config, segment_ids, num_targets, num_classes)


def product_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products that a traced function makes, loops by their turns: for models that are not
    attention layers, whose arithmetic is no formula here. A loop of unknown length counts once."""
    total = 0
    for equation in jaxpr.eqns:
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [product_flops(each) for each in _jaxprs(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        elif inner:
            total += turns * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The functions that an operation calls; of one with a derivative of its own, the function alone."""
    leaves = jax.tree.leaves(
        [value for name, value in params.items() if name != "fwd_jaxpr_thunk"],
        is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
    )
    found = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
    return [each for each in found if hasattr(each, "eqns")]
