"""A stack of attention layers, as a function of how one layer attends.

Each layer adds what it attends to: the smallest network whose gradients pass through
every layer. The oracle is the same stack over the reference.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn import reference
from tests.support import closeness, inputs

NUM_LAYERS = 3
NAMES = ("out", "dx", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Queries of the first layer, keys and values of all layers (L, B, Sk, Hk, D)."""

    x: jax.Array
    k: jax.Array
    v: jax.Array
    dout: jax.Array

    @property
    def every(self):
        """The arrays, in the order in which `with_gradients` takes them."""
        return self.x, self.k, self.v, self.dout


@functools.cache
def make(case, seed=0):
    """Returns the arrays of a case's network; they have the same batch throughout."""
    examples = [inputs.make(case, seed + n) for n in range(NUM_LAYERS)]
    k, v = (jnp.stack([example[name] for example in examples]) for name in "kv")
    return Arrays(examples[0]["q"], k, v, examples[0]["dout"])


def network(attend, wrap=lambda layer: layer):
    """Returns a function of x, k and v: a scan over layers.

    Args:
        attend: takes q, k and v and returns out.
        wrap: a transform of one layer.
    """

    @wrap
    def layer(x, k, v):
        return x + attend(x, k, v)

    def run(x, k, v):
        return jax.lax.scan(lambda x, kv: (layer(x, *kv), None), x, (k, v))[0]

    return run


def with_gradients(run):
    """Returns a function of x, k, v and dout that gives (out, dx, dk, dv)."""

    def all_results(x, k, v, dout):
        out, pullback = jax.vjp(run, x, k, v)
        return (out, *pullback(dout))

    return all_results


@functools.cache
def _right(case, seed):
    spec = inputs.spec(case)

    def compute(dtype):
        def attend(q, k, v):
            return reference.attention(q, k, v, None, None, spec=spec, dtype=dtype)[0]

        operands = (x.astype(dtype) for x in make(case, seed).every)
        results = jax.jit(with_gradients(network(attend)))(*operands)
        return [np.asarray(x) for x in results]

    with jax.enable_x64(True):
        exact = compute("float64")
    return exact, compute(case.dtype)


def check(case, results, seed=0, names=NAMES):
    """Asserts that (out, dx, dk, dv), or those named, are right."""
    exact, naive = _right(case, seed)
    for name, result in zip(names, results, strict=True):
        n = NAMES.index(name)
        closeness.assert_close_to_oracle(result, exact[n], naive[n], what=name)
