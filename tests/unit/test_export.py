"""Exported programs: what a fresh process computes, and what kernels get."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_flash_attn import _support, flash_attn_func
from tests.support import jax_child, oracle, programs

pytestmark = pytest.mark.core

CUSTOM_CALLS = [
    export.DisabledSafetyCheck.custom_call(f"flash_attention_{name}")
    for name in ("forward", "backward")
]

CALL_ALL = """
import jax
import numpy as np
from jax import export
from tests.support import partitioning, programs

ways = {ways!r}
for way in ways:
    program = export.deserialize(open({folder!r} + "/" + way, "rb").read())
    mesh = programs.mesh_of(way)
    _, operands, context = programs.build(way)
    with context:
        compiled = jax.jit(program.call).lower(*operands).compile()
        results = compiled(*operands)
    answer[way] = sorted(partitioning.collectives(compiled))
    np.savez({folder!r} + "/" + way + ".npz", *results)
"""


def exported(way, dtype=programs.CASE.dtype, **options):
    case = dataclasses.replace(programs.CASE, dtype=dtype)
    program, operands, context = programs.build(way, case)
    with context:
        return export.export(program, **options)(*operands)


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """What each program communicates in a fresh process, and the folder of results."""
    folder = tmp_path_factory.mktemp("exported")
    for way in programs.WAYS:
        (folder / way).write_bytes(exported(way).serialize())
    source = CALL_ALL.format(ways=programs.WAYS, folder=str(folder))
    return jax_child.run(source), folder


@pytest.mark.parametrize("way", programs.WAYS)
def test_fresh_process_computes_what_was_exported(way, called):
    _, folder = called
    stored = np.load(folder / f"{way}.npz")
    results = dict(zip(programs.RESULTS, stored.values(), strict=True))
    right = oracle.of(programs.CASE, programs.arrays())
    oracle.check(results, right, programs.RESULTS)


@pytest.mark.parametrize("way", ["one_device", "shard_map", "explicit"])
def test_what_is_exported_split_stays_split(way, called):
    communication, _ = called
    assert communication[way] == []


def lowered_for_cuda(way):
    options = {"platforms": ["cuda"], "disabled_checks": CUSTOM_CALLS}
    program = exported(way, "bfloat16", **options)
    text = str(program.mlir_module())
    return [line for line in text.splitlines() if "@flash_attention_forward" in line]


@pytest.mark.parametrize(
    ("way", "part"),
    [
        ("one_device", "8x10x4x16"),
        ("shard_map", "2x10x2x16"),
        ("explicit", "2x10x2x16"),
    ],
)
def test_kernels_of_exported_programs_get_parts(way, part):
    """Without a GPU here, the calls are there for the one that runs it."""
    (call,) = lowered_for_cuda(way)
    assert f"tensor<{part}xbf16>" in call


def test_kernels_of_automatic_sharding_get_all_and_that_is_said(monkeypatch):
    monkeypatch.setattr(_support, "_warned", set())
    with pytest.warns(UserWarning, match="Explicit mesh axes, or use shard_map"):
        (call,) = lowered_for_cuda("auto")
    assert "tensor<8x10x4x16xbf16>" in call


def test_gradients_with_a_symbolic_batch():
    """Exported programs may leave it open, and then have no parts of key heads."""
    (batch,) = export.symbolic_shape("b")
    q = jax.ShapeDtypeStruct((batch, 1024, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((batch, 1024, 2, 64), jnp.bfloat16)

    def loss(q, k, v):
        return flash_attn_func(q, k, v, causal=True).astype(jnp.float32).sum()

    program = export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
        platforms=["cuda"],
        disabled_checks=CUSTOM_CALLS,
    )(q, k, k)
    assert "flash_attention_backward" in program.mlir_module()
    assert [x.shape for x in program.out_avals] == [q.shape, k.shape, k.shape]
