"""Calls whose operands a mesh splits: results against the oracle, and communication."""

import collections
import contextlib
import dataclasses
import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from tests.support import calls, inputs, oracle

_COLLECTIVE = re.compile(
    r" = (?P<types>.*?)\b(?P<kind>all-gather|all-reduce|all-to-all|collective-broadcast"
    r"|collective-permute|reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"\w\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Split:
    """Which mesh axes split the operands of a call.

    All but the mesh are entries of a `PartitionSpec`; `seqlen` splits the queries,
    `seqlen_k` keys and values.
    """

    mesh: tuple[tuple[str, int], ...] = (("data", 4), ("model", 2))
    batch: str | tuple[str, ...] | None = None
    heads: str | tuple[str, ...] | None = None
    heads_k: str | tuple[str, ...] | None = None
    seqlen: str | None = None
    seqlen_k: str | None = None
    head_dim: str | None = None

    def make_mesh(self, axis_type, devices):
        """Returns the mesh, over the first of the devices."""
        names, sizes = zip(*self.mesh, strict=True)
        count = math.prod(sizes)
        return Mesh(
            np.array(devices[:count]).reshape(sizes), names, (axis_type,) * len(names)
        )

    def specs(self, arrays):
        """Returns how each array of `inputs.make` is split, by name."""
        queries = Spec(self.batch, self.seqlen, self.heads, self.head_dim)
        keys = Spec(self.batch, self.seqlen_k, self.heads_k, self.head_dim)
        slopes = arrays["slopes"]
        per_entry = slopes is not None and slopes.ndim == 2
        return {
            "q": queries,
            "dout": queries,
            "k": keys,
            "v": keys,
            "dlse": Spec(self.batch, self.heads, self.seqlen),
            "slopes": Spec(self.batch, self.heads) if per_entry else Spec(self.heads),
            "dropout_rng": Spec(),
        }


def collectives(compiled):
    """Returns the kinds of communication in a compiled program."""
    return set(communicated(compiled))


def communicated(compiled):
    """Returns how many elements a compiled program communicates, by kind.

    However XLA joins them to fewer and larger collectives.
    """
    elements = collections.Counter()
    for found in _COLLECTIVE.finditer(compiled.as_text()):
        shapes = _SHAPE.findall(found["types"])
        sizes = ([int(n) for n in shape.split(",") if n] for shape in shapes)
        elements[found["kind"]] += sum(math.prod(size) for size in sizes)
    return elements


def compile_and_run(function, arguments, specs, mesh):
    """Returns the results of a jitted function of split arrays, and its collectives.

    Args:
        function: takes the arguments.
        arguments: trees of arrays.
        specs: for each leaf of the arguments, its `PartitionSpec`.
        mesh: a mesh; where it is Explicit, the function is traced inside it.
    """
    leaves, tree = jax.tree.flatten(arguments)
    placed = tree.unflatten(
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    )
    is_explicit = AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
        compiled = calls.jit(function).lower(*placed).compile()
        return compiled(*placed), collectives(compiled)


def check(case, split, mesh, packing="none", forward=(), gradients=(), **more):
    """Checks the results of a call, and what its programs communicate.

    Args:
        case: a `cases.Case`.
        split: a `Split`.
        mesh: the mesh of the split.
        packing: how the arrays are passed on.
        forward: the collectives that the forward may hold.
        gradients: those that the program of forward and backward may hold.
        **more: keyword arguments of the call.
    """
    arrays = inputs.make(case)
    specs = split.specs(arrays)
    attend = calls.attention(case, packing, **more)

    present = {name: x for name, x in arrays.items() if x is not None}
    absent = dict.fromkeys(arrays.keys() - present.keys())
    results, found = compile_and_run(
        lambda given: calls.with_gradients(attend)(given | absent),
        [present],
        {name: specs[name] for name in present},
        mesh,
    )
    assert found <= set(gradients)

    right = oracle.of(case, arrays)
    oracle.check(results, right)
    if not found:  # nor does the forward, then
        return
    operands = [arrays[name] for name in calls.OPERANDS]
    given = [specs[name] for name in calls.OPERANDS if arrays[name] is not None]
    results, found = compile_and_run(attend, operands, given, mesh)
    assert found <= set(forward)
    names = ("out", "lse")
    oracle.check(dict(zip(names, results, strict=True)), right, names)
