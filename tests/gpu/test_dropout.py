"""The mask that the kernels draw is `testing.dropout_keep_mask`, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn

pytestmark = pytest.mark.gpu

BATCH, HEADS, WIDTH = 2, 3, 64
"""With v, or dout, an identity of this width, a column of the result is one j or i."""


def identity(seqlen, first, dtype):
    """(B, seqlen, H, WIDTH): row first + c has a one in column c, others are zero."""
    rows = jnp.arange(seqlen)[:, None] - first == jnp.arange(WIDTH)
    rows = rows.astype(dtype)
    return jnp.broadcast_to(rows[None, :, None], (BATCH, seqlen, HEADS, WIDTH))


def masks(rng, dropout_p, seqlen_q, seqlen_k, dtype, first):
    """Columns of the forward's mask from `first` on and rows of the backward's."""
    q = jnp.zeros((BATCH, seqlen_q, HEADS, WIDTH), dtype)
    k = jnp.zeros((BATCH, seqlen_k, HEADS, WIDTH), dtype)
    v = identity(seqlen_k, first, dtype)

    def call(v):
        return jax_flash_attn.flash_attn_func(
            q, k, v, dropout_p, dropout_rng=rng, implementation="cuda"
        )

    out, pullback = jax.vjp(call, v)
    (dv,) = pullback(identity(seqlen_q, first, dtype))
    forward = out.swapaxes(1, 2) != 0
    backward = dv.transpose(0, 2, 3, 1) != 0
    return forward, backward


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "dropout_p", "dtype"),
    [
        (64, 64, 0.5, "bfloat16"),
        (200, 330, 0.2, "bfloat16"),
        (131, 77, 0.9, "float16"),
        (17, 40, 0.001, "float16"),
    ],
)
def test_mask(seqlen_q, seqlen_k, dropout_p, dtype):
    rng = jax.random.key(11)
    keep = np.asarray(
        jax_flash_attn.testing.dropout_keep_mask(
            rng, dropout_p, BATCH, HEADS, seqlen_q, seqlen_k
        )
    )
    run = jax.jit(
        lambda rng, first: masks(rng, dropout_p, seqlen_q, seqlen_k, dtype, first)
    )
    for first in range(0, max(seqlen_q, seqlen_k), WIDTH):
        forward, backward = run(rng, first)
        columns = keep[..., first : first + WIDTH]
        np.testing.assert_array_equal(forward[..., : columns.shape[-1]], columns)
        rows = keep[:, :, first : first + WIDTH]
        np.testing.assert_array_equal(backward[:, :, : rows.shape[2]], rows)


def test_share_of_dropped_elements():
    rng = jax.random.key(2)
    q = jnp.zeros((BATCH, 512, HEADS, WIDTH), jnp.bfloat16)
    ones = jnp.ones_like(q)
    out = jax_flash_attn.flash_attn_func(
        q, q, ones, 0.25, dropout_rng=rng, implementation="cuda"
    )
    keep = jax_flash_attn.testing.dropout_keep_mask(rng, 0.25, BATCH, HEADS, 512, 512)
    share = np.asarray(keep.mean(axis=-1) / 0.75).swapaxes(1, 2)[..., None]
    rounded = np.broadcast_to(share, out.shape).astype(jnp.bfloat16)
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    difference = np.asarray(out, np.float32) - rounded.astype(np.float32)
    assert np.abs(difference).max() <= 2 * unit
