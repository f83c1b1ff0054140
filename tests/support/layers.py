"""A framework's layer on our attention beside the same layer on its own."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import calls, closeness


def normal(*shape, seed=0):
    """Returns a float32 array of standard normal values, without compiling anything."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parameters(init, *arguments, seed=9):
    """Returns random parameters of the shapes that an initialiser gives."""
    random = np.random.default_rng(seed)

    def fill(struct):
        if jnp.issubdtype(struct.dtype, jnp.floating):
            scale = max(struct.shape[0], 1) ** -0.5 if struct.ndim > 1 else 0.5
            return (scale * random.standard_normal(struct.shape)).astype(np.float32)
        return np.zeros(struct.shape, struct.dtype)

    return jax.tree.map(fill, jax.eval_shape(init, *arguments))


def assert_equal(ours, theirs, arguments, dtype="float32", gradients=True):
    """Asserts that two layers give the same output and the same gradients.

    The framework's own attention is the naive computation in the dtype under test, and
    the oracle in float64.

    Args:
        ours: function of `arguments`, the layer on our attention.
        theirs: the same on the framework's own.
        arguments: pytrees of float arrays, parameters and inputs.
        dtype: what arguments are cast to.
        gradients: whether those of every argument are compared, too.
    """
    actual = _results(ours, _cast(arguments, dtype), gradients)
    naive = _results(theirs, _cast(arguments, dtype), gradients)
    with jax.enable_x64(True):
        exact = _results(theirs, _cast(arguments, "float64"), gradients)
    assert jax.tree.structure(actual) == jax.tree.structure(exact)
    for (path, x), right, yardstick in zip(
        jax.tree.leaves_with_path(actual),
        jax.tree.leaves(exact),
        jax.tree.leaves(naive),
        strict=True,
    ):
        assert x.dtype == jnp.dtype(dtype)
        what = jax.tree_util.keystr(path)
        closeness.assert_close_to_oracle(x, right, yardstick, what=what)


def _cast(arguments, dtype):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), arguments)


def _results(layer, arguments, gradients):
    def run(*arguments):
        if not gradients:
            return layer(*arguments)
        out, pullback = jax.vjp(layer, *arguments)
        dout = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype)
        return out, pullback(dout)

    return calls.jit(run)(*arguments)
