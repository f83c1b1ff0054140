"""The definition, against three nested loops in NumPy float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import dropout, reference
from tests.support import closeness, inputs, oracle
from tests.support.cases import Case

TINY = Case(
    "tiny", "few enough for Python loops", 2, 7, 9, 4, 2, head_dim=8, dtype="float64"
)


def tiny(name, **options):
    return dataclasses.replace(TINY, name=name, **options)


CASES = (
    tiny("plain"),
    tiny("more_queries_causal", seqlen_q=9, seqlen_k=6, causal=True),
    tiny("window", window_size=(3, 1)),
    tiny("softcap_negative_scale", softcap=1.5, softmax_scale=-0.7),
    tiny("alibi", alibi="h"),
    tiny("dropout", dropout_p=0.4),
    tiny(
        "everything",
        causal=True,
        window_size=(4, -1),
        softcap=2.0,
        alibi="bh",
        dropout_p=0.3,
    ),
)


def attention_by_loops(q, k, v, slopes, keep, spec):
    num_batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_k = k.shape[1:3]
    out = np.zeros_like(q)
    lse = np.full((num_batch, heads, seqlen_q), -np.inf)
    for b, h, i in np.ndindex(lse.shape):
        kv_head = h // (heads // heads_k)
        aligned = i + seqlen_k - seqlen_q
        scores = {}
        for j in range(seqlen_k):
            if spec.window_left >= 0 and j < aligned - spec.window_left:
                continue
            if spec.window_right >= 0 and j > aligned + spec.window_right:
                continue
            score = spec.softmax_scale * (q[b, i, h] @ k[b, j, kv_head])
            if spec.softcap > 0:
                score = spec.softcap * math.tanh(score / spec.softcap)
            if slopes is not None:
                score -= slopes[b, h] * abs(aligned - j)
            scores[j] = score
        if not scores:
            continue
        lse[b, h, i] = math.log(sum(math.exp(score) for score in scores.values()))
        for j, score in scores.items():
            if keep[b, h, i, j]:
                prob = math.exp(score - lse[b, h, i]) / (1 - spec.dropout_p)
                out[b, i, h] += prob * v[b, j, kv_head]
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_loops(case):
    with jax.enable_x64(True):
        spec = inputs.spec(case)
        operands = inputs.primitive_operands(case, inputs.make(case))
        out, lse = reference.attention(*operands, spec=spec)
        assert out.dtype == lse.dtype == jnp.float64
        q, k, v, slopes, dropout_keys = operands
        keep = np.ones((case.batch, case.heads, case.seqlen_q, case.seqlen_k))
        if dropout_keys is not None:
            shape = case.seqlen_q, case.seqlen_k
            keep = dropout.keep_mask(dropout_keys, *shape, case.dropout_p)
        expected = attention_by_loops(
            *map(np.asarray, (q, k, v)),
            None if slopes is None else np.asarray(slopes, np.float64),
            np.asarray(keep),
            spec,
        )
        for what, actual, right in zip(
            ("out", "lse"), (out, lse), expected, strict=True
        ):
            closeness.assert_close_to_oracle(actual, right, right, what=what)


MASKED = tiny("masked", seqlen_q=9, seqlen_k=6, causal=True, dtype="float32")


def test_rows_that_see_no_key():
    arrays = inputs.make(MASKED)
    operands = inputs.primitive_operands(MASKED, arrays)
    results = oracle.exact(
        operands, arrays["dout"], arrays["dlse"], inputs.spec(MASKED), "float32"
    )
    masked = MASKED.seqlen_q - MASKED.seqlen_k
    assert not results["out"][:, :masked].any()
    assert np.isneginf(results["lse"][..., :masked]).all()
    assert np.isfinite(results["lse"][..., masked:]).all()
    assert not results["dq"][:, :masked].any()
    assert all(np.isfinite(results[name]).all() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_naive_rounds_every_step(dtype):
    case = tiny("rounded", seqlen_k=200, dtype=dtype)
    operands = inputs.primitive_operands(case, inputs.make(case))
    spec = inputs.spec(case)
    out, lse = jax.jit(lambda *x: reference.naive(*x, spec=spec))(*operands)
    assert out.dtype == jnp.dtype(dtype)
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(lse, lse.astype(dtype).astype(jnp.float32))

    wide_out, wide_lse = reference.attention(*operands, spec=spec)
    assert wide_out.dtype == wide_lse.dtype == jnp.float32
    rounding_once = jnp.abs(wide_out.astype(dtype).astype(jnp.float32) - wide_out)
    assert jnp.abs(out.astype(jnp.float32) - wide_out).max() > rounding_once.max()


def test_default_dtype_is_at_least_float32():
    case = tiny("half", dtype="bfloat16")
    operands = inputs.primitive_operands(case, inputs.make(case))
    out, lse = reference.attention(*operands, spec=inputs.spec(case))
    assert out.dtype == lse.dtype == jnp.float32
