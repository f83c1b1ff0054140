"""How many copies of key heads the backward gets, and that they add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import (
    _ffi,
    _key_copies,
    _primitives,
    _shapes,
    _spec,
    explain,
)

pytestmark = pytest.mark.core

CAUSAL = {"window_right": 0}


def copies(
    seqlens,
    heads,
    batch=1,
    head_dim=128,
    dtype=jnp.bfloat16,
    gpu=("sm_90", 132),
    **spec,
):
    dims = _shapes.Dimensions(batch, *seqlens, *heads, head_dim)
    return _key_copies.key_copies(
        dims, _spec.AttentionSpec(1.0, **spec), jnp.dtype(dtype), *gpu
    )


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (copies((2048, 2048), (16, 4), **CAUSAL), 4),
        (copies((4096, 4096), (16, 4), **CAUSAL), 2),  # 256 tiles, two rounds
        (copies((8192, 8192), (8, 1), **CAUSAL), 4),
        (copies((2048, 2048), (16, 4)), 2),  # 128 tiles of 132 that run at a time
        (copies((2048, 2048), (16, 4), gpu=("sm_90", 0)), 2),
        (copies((2048, 2048), (16, 4), gpu=("sm_90", 60)), 4),
        (copies((2048, 2048), (14, 2), **CAUSAL), 7),
        # All walks have 1,152 queries, but the last.
        (copies((8192, 8192), (16, 4), window_left=1023, window_right=0), 1),
        (copies((2048, 2048), (16, 4), window_left=1023, window_right=0), 2),
        # The first keys have the longest walks, of nearly all queries.
        (copies((4096, 4096), (16, 4), window_left=4000, window_right=0), 2),
        # Of half as many walks all have nearly all queries.
        (copies((1024, 4096), (16, 4), **CAUSAL), 1),
        (copies((1024, 4096), (16, 4), window_right=0, top_left=True), 4),
        (copies((2048, 2048), (16, 4), head_dim=256), 1),  # tiles of 64 keys
        # Two rounds of tiles, or nothing to share.
        (copies((2048, 2048), (16, 4), batch=5, **CAUSAL), 1),
        (copies((2048, 2048), (16, 16), **CAUSAL), 1),
        # Copying takes longer than it saves.
        (copies((100, 100), (4, 1), **CAUSAL), 1),
        (copies((0, 100), (8, 1)), 1),
        (copies((2048, 2048), (16, 4), deterministic=True, **CAUSAL), 1),
        (copies((2048, 2048), (16, 4), dtype=jnp.float16, **CAUSAL), 1),
        (copies((2048, 2048), (16, 4), gpu=("sm_80", 108), **CAUSAL), 1),
    ],
)
def test_copies(call, expected):
    assert call == expected


def test_query_heads_read_copies_of_their_key_head():
    heads, heads_k, number = 12, 2, 3
    k = jnp.arange(heads_k * 8).reshape(1, 1, heads_k, 8)
    copied = _key_copies.copy_heads(k, number)
    for head in range(heads):
        read = copied[..., head // (heads // (heads_k * number)), :]
        np.testing.assert_array_equal(read, k[..., head // (heads // heads_k), :])


def test_sums_are_rounded_once():
    """Each part by itself is less than half of the last place of one."""
    parts = np.asarray([1.0, -(2.0**-10), -(2.0**-10), -(2.0**-10)])
    x = jnp.asarray(parts, jnp.bfloat16).reshape(1, 1, 4, 1)
    total = _key_copies.sum_copies(x, 4)
    assert total.shape == (1, 1, 1, 1)
    assert total.dtype == jnp.bfloat16
    assert float(total[0, 0, 0, 0]) == 1.0 - 2.0**-8
    assert _key_copies.sum_copies(x, 1) is x


@pytest.mark.parametrize("packing", ["none", "kv"])
def test_gradients_with_copies(packing, monkeypatch):
    """Plain JAX in the place of the kernels, which get twice as many key heads.

    A batch entry of keys serves two of queries, and the head dim is padded.
    """
    spec = _spec.AttentionSpec(0.3, packing=packing, alibi=True, **CAUSAL)
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    q, k, v = normal(4, 20, 8, 10), normal(2, 30, 2, 10), normal(2, 30, 2, 10)
    qkv = (q, k, v) if packing == "none" else (q, jnp.stack([k, v], axis=2))
    slopes = jnp.abs(normal(4, 8))
    out, lse = _primitives._plain_forward(*qkv, slopes, spec=spec)
    operands = (*qkv, slopes, out, lse, normal(*out.shape), normal(*lse.shape))
    found_heads = []

    def stand_in(arrays, results, spec, has_dlse):
        found_heads.append(arrays[1].shape[-2])
        return [
            *_primitives._plain_backward(*arrays, spec=spec, has_dlse=has_dlse),
            *results[len(qkv) :],
        ]

    monkeypatch.setattr(_ffi, "backward_call", stand_in)
    monkeypatch.setattr(_key_copies, "key_copies", lambda *_: 2)
    found = _primitives._kernel_backward(*operands, spec=spec, has_dlse=True)
    assert found_heads == [4]
    right = _primitives._plain_backward(*operands, spec=spec, has_dlse=True)
    for gradient, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_explain_tells_them():
    q = jax.ShapeDtypeStruct((1, 2048, 16, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16)
    found = explain(q, k, k, causal=True, architecture="sm_90")
    assert found.backward.endswith("4 copies of each key head")
    assert "copies" not in found.forward
    found = explain(q, q, q, causal=True, architecture="sm_90")
    assert "copies" not in found.backward
