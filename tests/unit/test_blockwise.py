"""The linear-memory JAX path, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_flash_attn import blockwise
from tests.support import cases, closeness, inputs, oracle

SMALL_TILE = 48
"""Small enough for a short sequence to take several tiles, the last one ragged."""

QUICK = (
    "one_query",
    "one_key",
    "no_keys",
    "no_queries",
    "ragged_tail",
    "fully_masked_rows",
    "window_two_sided",
    "float16_everything",
    "everything_masked_rows",
)
"""Cases that between them own every line of the file under test."""

CASES = [
    pytest.param(
        case, id=case.name, marks=() if case.name in QUICK else pytest.mark.long
    )
    for case in cases.CASES
]


def in_dtype(name, dtype):
    case = cases.BY_NAME[name]
    return dataclasses.replace(case, name=f"{name}_{dtype}", dtype=dtype)


def run(operands, dout, dlse, spec):
    out, lse = blockwise.forward(*operands, spec=spec)
    q, k, v, *rest = operands
    gradients = blockwise.backward(q, k, v, out, lse, dout, dlse, *rest, spec=spec)
    return dict(zip(oracle.NAMES, (out, lse, *gradients), strict=True))


# XLA takes longer to optimise these programs than to run them.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=(3, 4), compiler_options=FAST_COMPILE)
def run_with_tile(operands, dout, dlse, spec, max_tile):
    assert max_tile == blockwise.MAX_TILE
    return run(operands, dout, dlse, spec)


def jitted_run(*arguments):
    # The tile is an argument, so that a program traced with another is not reused.
    return run_with_tile(*arguments, blockwise.MAX_TILE)


def check(case):
    spec = inputs.spec(case)
    arrays = inputs.make(case)
    operands = inputs.primitive_operands(case, arrays)
    arguments = (operands, arrays["dout"], arrays["dlse"], spec)
    results = jitted_run(*arguments)
    exact, naive = oracle.exact(*arguments), oracle.naive(*arguments)
    for name, result in results.items():
        expected_dtype = jnp.float32 if name == "lse" else jnp.dtype(case.dtype)
        assert result.dtype == expected_dtype
        closeness.assert_close_to_oracle(result, exact[name], naive[name], what=name)


@pytest.mark.parametrize("case", CASES)
def test_tiled(case, monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", SMALL_TILE)
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        in_dtype("everything_masked_rows", "float32"),
        in_dtype("large_logits", "float32"),
    ],
    ids=str,
)
def test_tiled_in_float32(case, monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", SMALL_TILE)
    check(case)


@pytest.mark.parametrize(
    "case",
    [in_dtype("causal_gqa", "float32"), cases.BY_NAME["everything"]],
    ids=str,
)
def test_single_tile(case):
    check(case)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        case = in_dtype("causal_gqa", "float64")
        arrays = inputs.make(case)
        arguments = (
            inputs.primitive_operands(case, arrays),
            arrays["dout"],
            arrays["dlse"],
            inputs.spec(case),
        )
        results = jitted_run(*arguments)
        exact = oracle.exact(*arguments)
    for name, result in results.items():
        assert result.dtype == jnp.float64
        closeness.assert_close_to_oracle(result, exact[name], exact[name], what=name)


def test_omitted_dlse_is_zero():
    case = in_dtype("causal_gqa", "float32")
    arrays = inputs.make(case)
    operands = inputs.primitive_operands(case, arrays)
    dlse = jnp.zeros_like(arrays["dlse"])
    omitted = jitted_run(operands, arrays["dout"], None, inputs.spec(case))
    zero = jitted_run(operands, arrays["dout"], dlse, inputs.spec(case))
    for name in oracle.NAMES:
        np.testing.assert_array_equal(omitted[name], zero[name])


@functools.partial(jax.jit, static_argnums=3, compiler_options=FAST_COMPILE)
def run_mapped(operands, dout, dlse, spec):
    return jax.vmap(run, in_axes=(0, 0, 0, None))(operands, dout, dlse, spec)


def test_vmap_equals_loop(monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", SMALL_TILE)
    case = in_dtype("everything_masked_rows", "float32")
    spec = inputs.spec(case)
    examples = []
    for seed in range(2):
        arrays = inputs.make(case, seed)
        operands = inputs.primitive_operands(case, arrays)
        examples.append((operands, arrays["dout"], arrays["dlse"]))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *examples)
    mapped = run_mapped(*stacked, spec)
    for n, example in enumerate(examples):
        looped = jitted_run(*example, spec)
        for name in oracle.NAMES:
            closeness.assert_close_to_oracle(
                mapped[name][n], looped[name], looped[name], what=name
            )


def test_shard_map_with_varying_axes_checked(monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", SMALL_TILE)
    case = in_dtype("everything_masked_rows", "float32")
    spec = inputs.spec(case)
    arrays = inputs.make(case)
    operands = inputs.primitive_operands(case, arrays)
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("batch",), auto, devices=jax.devices()[:2])
    batch = PartitionSpec("batch")
    sharded = jax.jit(
        jax.shard_map(
            functools.partial(run, spec=spec),
            mesh=mesh,
            in_specs=(batch, batch, batch),
            out_specs=batch,
        )
    )(operands, arrays["dout"], arrays["dlse"])
    whole = jitted_run(operands, arrays["dout"], arrays["dlse"], spec)
    for name in oracle.NAMES:
        closeness.assert_close_to_oracle(
            sharded[name], whole[name], whole[name], what=name
        )


@pytest.mark.long
@pytest.mark.parametrize("case", cases.random_cases(30, seed=0), ids=str)
def test_random(case, monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", SMALL_TILE)
    check(case)
