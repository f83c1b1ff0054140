"""Attention with a bias or mask array, the whole score matrix in memory.

No kernel reads such arrays; `dot_product_attention` and the integrations come here with
them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn import dropout


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    visible: jax.Array,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    dropout_keys: jax.Array | None = None,
    dropout_p: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, lse) of softmax(cap(scale q k^T) + bias) v over the visible keys.

    Scores and lse are float32 (float64 for float64 inputs); a query that sees no key,
    or whose scores are all -inf, gets out 0, lse -inf and no gradient.

    Args:
        q: (..., Sq, H, D).
        k: (..., Sk, Hk, D).
        v: The shape of k.
        bias: Broadcastable to (..., H, Sq, Sk), or None.
        visible: Bools, likewise.
        softmax_scale: Factor of q k^T.
        softcap: c > 0 replaces scale q k^T by c * tanh(scale q k^T / c).
        dropout_keys: Philox keys, (..., H, 2) uint32, or None.
        dropout_p: Share of probabilities that is dropped where keys are given.

    Returns:
        out, (..., Sq, H, D) in the dtype of q, and lse, (..., H, Sq).
    """
    # JAX's own would raise where it is told to promote no dtypes.
    dtype = np.promote_types(q.dtype, np.float32)
    *batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_k = k.shape[-3:-1]
    grouped = q.reshape(*batch, seqlen_q, heads_k, heads // heads_k, head_dim)
    scores = _product("...qhgd,...khd->...hgqk", grouped, k, dtype) * jnp.asarray(
        softmax_scale, dtype
    )
    scores = scores.reshape(*batch, heads, seqlen_q, seqlen_k)
    if softcap > 0:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.astype(dtype)
    scores = jnp.where(visible, scores, -jnp.inf)
    is_empty = (scores == -jnp.inf).all(-1, keepdims=True)
    # The inner where keeps -inf minus -inf out of the gradient.
    scores = jnp.where(is_empty, 0, scores)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # Not exp(scores - lse): next to a large score, lse has no digits of log(total).
    probs = jnp.where(is_empty, 0, jax.nn.softmax(scores, axis=-1))
    if dropout_keys is not None:
        keep = dropout.keep_mask(dropout_keys, seqlen_q, seqlen_k, dropout_p)
        probs = jnp.where(keep, probs / (1 - dropout_p), 0)
    probs = probs.astype(v.dtype)
    probs = probs.reshape(*batch, heads_k, heads // heads_k, seqlen_q, seqlen_k)
    out = _product("...hgqk,...khd->...qhgd", probs, v, dtype).astype(q.dtype)
    return out.reshape(q.shape), jnp.where(is_empty, -jnp.inf, lse)[..., 0]


def _product(
    subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == dtype else None
    return jnp.einsum(
        subscripts, a, b, precision=precision, preferred_element_type=dtype
    )
