"""Programs that XLA splits over two GPUs: the kernels run on parts of the operands."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from tests.support import partitioning
from tests.support.cases import Case
from tests.support.partitioning import Split

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

CASE = Case(
    "partitioned",
    "a batch and heads for two devices",
    batch=4,
    seqlen_q=150,
    seqlen_k=170,
    heads=4,
    heads_k=2,
    causal=True,
    alibi="bh",
    dropout_p=0.2,
)
PAIR = (("axis", 2),)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
@pytest.mark.parametrize(
    ("heads_k", "split", "gradients"),
    [
        pytest.param(2, Split(PAIR, batch="axis"), set(), id="batch"),
        pytest.param(2, Split(PAIR, heads="axis", heads_k="axis"), set(), id="heads"),
        pytest.param(1, Split(PAIR, heads="axis"), {"all-reduce"}, id="mqa"),
    ],
)
def test_mesh(heads_k, split, gradients, axis_type):
    case = dataclasses.replace(CASE, heads_k=heads_k)
    mesh = split.make_mesh(axis_type, jax.devices("cuda"))
    partitioning.check(case, split, mesh, gradients=gradients, implementation="cuda")
