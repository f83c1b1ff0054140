"""One call's program with gradients, split in each of the ways there are.

Fresh processes build them, too, so everything needed is made here.
"""

import contextlib
import dataclasses

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from tests.support import calls, inputs
from tests.support.cases import Case
from tests.support.partitioning import Split

CASE = Case(
    "program",
    "two batch entries and a group of heads for each device",
    batch=8,
    seqlen_q=10,
    seqlen_k=10,
    heads=4,
    heads_k=2,
    head_dim=16,
    dtype="float32",
    causal=True,
)
RESULTS = ("out", "dq", "dk", "dv")
WAYS = ("one_device", "shard_map", "explicit", "auto")

_SPLIT = Split(batch="data", heads="model", heads_k="model")
_SPEC = Spec("data", None, "model")


def arrays(dtype=CASE.dtype):
    """Returns the case's arrays; lse has no cotangent."""
    made = inputs.make(dataclasses.replace(CASE, dtype=dtype))
    return made | {"dlse": jax.numpy.zeros_like(made["dlse"])}


def mesh_of(way):
    """Returns the mesh of a way, or None for one device."""
    if way == "one_device":
        return None
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    return _SPLIT.make_mesh(kind, jax.devices("cpu"))


def build(way, dtype=CASE.dtype):
    """Returns the jitted program and its operands, where they belong.

    Also returns a context manager to trace, export and call it in.
    """

    def run(q, k, v, dout):
        out, pullback = jax.vjp(lambda *x: calls.attention(CASE)(*x)[0], q, k, v)
        return (out, *pullback(dout))

    mesh = mesh_of(way)
    given = arrays(dtype)
    operands = [given[name] for name in ("q", "k", "v", "dout")]
    context = contextlib.nullcontext()
    if mesh is not None:
        operands = jax.device_put(operands, NamedSharding(mesh, _SPEC))
    if way == "explicit":
        context = jax.set_mesh(mesh)
    if way == "shard_map":
        specs = (_SPEC,) * 4
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs)
    return jax.jit(run, compiler_options=calls.FAST_COMPILE), operands, context
