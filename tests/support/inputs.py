"""Arrays and specifications for a case."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn import _spec, dropout


def make(case, seed=0):
    """Returns the arrays of a call: standard normal, the same for the same seed.

    Args:
        case: a `cases.Case`.
        seed: seed of the generator.

    Returns:
        dict of q, k, v, dout in the case's dtype, dlse in float32 (float64 for float64
        cases), slopes of shape (H,) or (B, H) or None, dropout_rng or None.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=case.dtype):
        return jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype))

    queries = (case.batch, case.seqlen_q, case.heads, case.head_dim)
    keys = (case.batch, case.seqlen_k, case.heads_k, case.head_dim)
    rows = (case.batch, case.heads, case.seqlen_q)
    lse_dtype = "float64" if case.dtype == "float64" else "float32"
    return {
        "q": normal(*queries),
        "k": normal(*keys),
        "v": normal(*keys),
        "dout": normal(*queries),
        "dlse": normal(*rows, dtype=lse_dtype),
        "slopes": _slopes(case, rng),
        "dropout_rng": jax.random.key(seed) if case.dropout_p > 0 else None,
    }


def spec(case):
    """Returns the `AttentionSpec` of a case."""
    left, right = case.window_size
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    return _spec.AttentionSpec(
        softmax_scale=scale,
        window_left=left,
        window_right=0 if case.causal else right,
        softcap=case.softcap,
        alibi=case.alibi != "none",
        dropout_p=case.dropout_p,
    )


def primitive_operands(case, arrays):
    """Returns q, k, v, slopes (B, H) and dropout_keys (B, H, 2) of a case's arrays."""
    slopes, dropout_rng = arrays["slopes"], arrays["dropout_rng"]
    if slopes is not None:
        slopes = jnp.broadcast_to(slopes, (case.batch, case.heads))
    dropout_keys = None
    if dropout_rng is not None:
        dropout_keys = dropout.philox_keys(dropout_rng, case.batch, case.heads)
    return arrays["q"], arrays["k"], arrays["v"], slopes, dropout_keys


def _slopes(case, rng):
    if case.alibi == "none":
        return None
    shape = (case.heads,) if case.alibi == "h" else (case.batch, case.heads)
    return jnp.asarray(rng.uniform(0.0, 0.5, shape), jnp.float32)
