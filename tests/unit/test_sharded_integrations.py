"""What the integrations share, over a mesh: results, and what is communicated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from jax_flash_attn.integrations._options import Options
from tests.support import inputs, oracle, partitioning
from tests.support.partitioning import Split
from tests.support.programs import CASE

pytestmark = pytest.mark.core

BATCH = (4, 2)
MESH = (("data", 4), ("model", 2))

EVERYTHING = dataclasses.replace(CASE, alibi="h", dropout_p=0.3)

SUM, GATHER = {"all-reduce"}, {"all-gather"}

DENSE = {
    "kernel": {},
    "bias_and_mask": {
        "bias": jnp.zeros((1, 2, 1, 10, 10)),
        "mask": jnp.ones((4, 1, 1, 1, 10), bool),
    },
}
"""Arrays that change nothing."""


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize("dense", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize(
    ("case", "spec"),
    [
        pytest.param(CASE, Spec(None, "model"), id="inner"),
        pytest.param(EVERYTHING, Spec("data", "model"), id="both"),
        pytest.param(CASE, Spec("data", None, None, "model"), id="outer_and_heads"),
    ],
)
def test_batch_axes_stay_apart(case, spec, dense, axis_type):
    """And dropout draws what it draws for the one axis that they would merge into."""
    assert check(case, BATCH, spec, spec, dense, axis_type) == set()


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize(
    ("heads", "heads_k", "mesh", "communication"),
    [
        pytest.param(6, 3, MESH, SUM | GATHER, id="three_groups_over_two"),
        pytest.param(
            8,
            2,
            (("data", 2), ("model", 4)),
            SUM | GATHER,
            id="two_groups_over_four",
        ),
        pytest.param(4, 1, MESH, SUM, id="one_group_over_two"),
    ],
)
def test_query_heads_split_beside_whole_key_heads(
    heads, heads_k, mesh, communication, axis_type
):
    """With a dense array: there the types of an Explicit mesh follow every step."""
    case = dataclasses.replace(EVERYTHING, heads=heads, heads_k=heads_k)
    queries, keys = Spec("data", None, "model"), Spec("data")
    dense = {"mask": jnp.ones((8, 1, 1, 10), bool)}
    found = check(case, (8,), queries, keys, dense, axis_type, mesh)
    assert found <= communication


def check(case, batch, queries, keys, dense, axis_type, mesh=MESH):
    """Checks results against the oracle; returns what is communicated."""
    arrays = inputs.make(case)
    options = Options(
        causal=True,
        alibi_slopes=None if arrays["slopes"] is None else tuple(arrays["slopes"]),
    )

    def with_gradients(q, k, v, dout):
        def attend(q, k, v):
            return options.attend(
                q,
                k,
                v,
                **dense,
                dropout_p=case.dropout_p,
                dropout_rng=arrays["dropout_rng"],
            )

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    operands = [
        arrays[name].reshape(*batch, *arrays[name].shape[1:])
        for name in ("q", "k", "v", "dout")
    ]
    results, found = partitioning.compile_and_run(
        with_gradients,
        operands,
        [queries, keys, keys, queries],
        Split(mesh).make_mesh(axis_type, jax.devices("cpu")),
    )
    names = ("out", "dq", "dk", "dv")
    merged = (np.asarray(x).reshape(case.batch, *x.shape[-3:]) for x in results)
    without_dlse = arrays | {"dlse": jnp.zeros_like(arrays["dlse"])}
    right = oracle.of(case, without_dlse)
    oracle.check(dict(zip(names, merged, strict=True)), right, names)
    return found
