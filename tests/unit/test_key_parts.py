"""Into how many parts the backward splits key heads, and that they add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import (
    _ffi,
    _key_parts,
    _primitives,
    _shapes,
    _spec,
    explain,
    testing,
)

pytestmark = pytest.mark.core

CAUSAL = {"window_right": 0}


def parts(
    seqlens,
    heads,
    batch=1,
    head_dim=128,
    dtype=jnp.bfloat16,
    gpu=("sm_90", 132),
    **spec,
):
    dims = _shapes.Dimensions(batch, *seqlens, *heads, head_dim)
    return _key_parts.key_parts(
        dims, _spec.AttentionSpec(1.0, **spec), jnp.dtype(dtype), *gpu
    )


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (parts((2048, 2048), (16, 4), **CAUSAL), 4),
        (parts((4096, 4096), (16, 4), **CAUSAL), 2),  # 256 tiles, two rounds
        (parts((8192, 8192), (8, 1), **CAUSAL), 4),
        (parts((2048, 2048), (16, 4)), 2),  # 128 tiles of 132 that run at a time
        (parts((2048, 2048), (16, 4), gpu=("sm_90", 0)), 2),
        (parts((2048, 2048), (14, 2), **CAUSAL), 7),
        (parts((2048, 2048), (16, 4), window_left=1023, window_right=0), 2),
        # The first keys have the longest walks, of nearly all queries.
        (parts((4096, 4096), (16, 4), window_left=4000, window_right=0), 2),
        # Of half as many walks all have nearly all queries.
        (parts((1024, 4096), (16, 4), **CAUSAL), 1),
        (parts((2048, 2048), (16, 4), head_dim=256), 1),  # tiles of 64 keys
        # Queries of a head in parts, too: as many key tiles as run at a time,
        (parts((1024, 1024), (8, 8)), 2),
        (parts((512, 512), (8, 8)), 4),
        (parts((512, 512), (16, 4), **CAUSAL), 8),
        # or twice as many, the longest of which are half as long,
        (parts((2048, 2048), (8, 8), **CAUSAL), 2),
        (parts((2048, 2048), (8, 1), **CAUSAL), 16),
        # but not where these take as long one after the other.
        (parts((1024, 1024), (16, 16)), 1),
        (parts((1024, 1024), (16, 16), **CAUSAL), 1),
        (parts((1024, 1024), (16, 4), **CAUSAL), 4),
        (parts((1024, 1024), (8, 8), head_dim=136), 1),
        (parts((1024, 1024), (8, 8), packing="qkv"), 1),
        (parts((65536, 128), (1, 1)), 128),
        (parts((1024, 1024), (8, 8), deterministic=True), 1),
        (parts((1024, 1024), (8, 8), softcap=9.0), 2),
        (parts((1024, 1024), (8, 8), softcap=9.0, dropout_p=0.1), 1),
        (parts((1024, 1024), (8, 2), head_dim=136), 4),
        # Two rounds of tiles, or nothing to share.
        (parts((2048, 2048), (16, 4), batch=5, **CAUSAL), 1),
        (parts((2048, 2048), (16, 16), **CAUSAL), 1),
        (parts((60, 60), (4, 4), **CAUSAL), 1),
        (parts((0, 100), (8, 1)), 1),
        (parts((2048, 2048), (16, 4), deterministic=True, **CAUSAL), 4),
        (parts((2048, 2048), (8, 1), deterministic=True, **CAUSAL), 8),
        (parts((2048, 2048), (16, 4), dtype=jnp.float16, **CAUSAL), 1),
        (parts((2048, 2048), (16, 4), gpu=("sm_80", 108), **CAUSAL), 1),
    ],
)
def test_parts(call, expected):
    assert call == expected


def test_queries_come_whole_where_a_family_is_forced():
    """One of them has dk and dv of whole query heads alone."""
    call = {"seqlens": (1024, 1024), "heads": (8, 8)}
    with testing.override_tiles("backward", "sm90"):
        assert parts(**call) == 1
    with testing.override_tiles("forward", "sm90"):
        assert parts(**call) == 2


def test_sums_are_rounded_once():
    """Each part by itself is less than half of the last place of one."""
    parts = np.asarray([1.0, -(2.0**-10), -(2.0**-10), -(2.0**-10)])
    x = jnp.asarray(parts, jnp.bfloat16).reshape(1, 1, 4, 1)
    total = _key_parts.sum_parts(x, 4)
    assert total.shape == (1, 1, 1, 1)
    assert total.dtype == jnp.bfloat16
    assert float(total[0, 0, 0, 0]) == 1.0 - 2.0**-8
    assert _key_parts.sum_parts(x, 1) is x


@pytest.mark.parametrize("packing", ["none", "kv"])
def test_gradients_in_parts(packing, monkeypatch):
    """Plain JAX in the place of the kernels, with key heads in two parts.

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
        found_heads.append((arrays[1].shape[-2], results[1].shape[-2]))
        apart = [
            jnp.repeat(x, 2, axis=-2) if 1 <= i < len(qkv) else x
            for i, x in enumerate(arrays)
        ]
        return [
            *_primitives._plain_backward(*apart, spec=spec, has_dlse=has_dlse),
            *results[len(qkv) :],
        ]

    monkeypatch.setattr(_ffi, "backward_call", stand_in)
    monkeypatch.setattr(_key_parts, "key_parts", lambda *_: 2)
    found = _primitives._kernel_backward(*operands, spec=spec, has_dlse=True)
    assert found_heads == [(2, 4)]
    right = _primitives._plain_backward(*operands, spec=spec, has_dlse=True)
    for gradient, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "family"),
    [(64, "sm90"), (128, "sm90"), (136, "sm90split"), (256, "sm90split")],
)
def test_key_tiles_are_those_of_the_kernels(head_dim, family):
    """Otherwise the rule counts others than run (csrc/launchers/sm90_tiles.cc)."""
    q = jax.ShapeDtypeStruct((1, 2048, 16, head_dim), jnp.bfloat16)
    with testing.override_tiles("backward", family):
        tiles = explain(q, q, q, architecture="sm_90").backward
    dims = _shapes.dimensions((q, q, q), "none")
    key_tile, *_ = tiles.split(",")[1 if family == "sm90split" else 0].split("x")[1:]
    assert int(key_tile) == _key_parts._tile_k(dims), tiles


def test_explain_tells_them():
    q = jax.ShapeDtypeStruct((1, 2048, 16, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16)
    found = explain(q, k, k, causal=True, architecture="sm_90")
    assert found.backward.endswith("each key head in 4 parts")
    assert "parts" not in found.forward
    found = explain(q, q, q, causal=True, architecture="sm_90")
    assert "parts" not in found.backward
    q = jax.ShapeDtypeStruct((1, 512, 8, 64), jnp.bfloat16)
    found = explain(q, q, q, architecture="sm_90")
    assert found.backward.startswith("sm90 128x128")  # not by the split form
    assert found.backward.endswith("each key head in 4 parts")
