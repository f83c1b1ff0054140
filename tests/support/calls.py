"""A case as calls of the public functions, with every result by name."""

import jax
import jax.numpy as jnp

import jax_flash_attn
from jax_flash_attn import _ffi
from tests.support import inputs, oracle

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""Options of `jax.jit` for programs that take longer to optimise than to run."""


OPERANDS = ("q", "k", "v", "slopes", "dropout_rng")
"""The names of the arrays that a function of `attention` takes, in order."""


def jit(function):
    """Returns `jax.jit` of a function, left unoptimised on the CPU."""
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options=FAST_COMPILE if on_cpu else None)


def options(case):
    """Returns the static keyword arguments of a case's call."""
    return {
        "dropout_p": case.dropout_p,
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
    }


def attention(case, packing="none", **more):
    """Returns a function of q, k, v, slopes and dropout_rng that gives (out, lse).

    Args:
        case: a `cases.Case`.
        packing: how the arrays are passed on: "none", "kv" or "qkv".
        **more: keyword arguments of the call that a case does not have.
    """

    def attend(q, k, v, slopes=None, dropout_rng=None):
        static = dict(options(case), return_lse=True, **more)
        arrays = {"alibi_slopes": slopes, "dropout_rng": dropout_rng}
        if packing == "qkv":
            qkv = jnp.stack([q, k, v], axis=2)
            return jax_flash_attn.flash_attn_qkvpacked_func(qkv, **static, **arrays)
        if packing == "kv":
            kv = jnp.stack([k, v], axis=2)
            return jax_flash_attn.flash_attn_kvpacked_func(q, kv, **static, **arrays)
        return jax_flash_attn.flash_attn_func(q, k, v, **static, **arrays)

    return attend


def with_gradients(attend):
    """Returns a function of an `inputs.make` dict that gives the results by name."""

    def run(arrays):
        def of_qkv(q, k, v):
            return attend(q, k, v, arrays["slopes"], arrays["dropout_rng"])

        qkv = (arrays["q"], arrays["k"], arrays["v"])
        (out, lse), pullback = jax.vjp(of_qkv, *qkv)
        gradients = pullback((arrays["dout"], arrays["dlse"]))
        return dict(zip(oracle.NAMES, (out, lse, *gradients), strict=True))

    return run


def run(case, seed=0, packing="none", **more):
    """Returns out, lse, dq, dk and dv of a case's call, by name."""
    attend = attention(case, packing, **more)
    return jit(with_gradients(attend))(inputs.make(case, seed))


def compile_kernels(case):
    """Compiles the kernels of a case's call, which a later call then finds ready.

    Returns how many they are, none where plain JAX serves the case.
    """
    shapes = jax.eval_shape(lambda: inputs.make(case))
    q, k, v, slopes, dropout_rng = (shapes[name] for name in OPERANDS)
    found = jax_flash_attn.explain(
        q,
        k,
        v,
        **options(case),
        alibi_slopes=slopes if slopes is None else jnp.zeros(slopes.shape),
        dropout_rng=dropout_rng if dropout_rng is None else jax.random.key(0),
    )
    if found.implementation != "cuda":
        return 0
    fields = _ffi.attributes(found.spec)
    target = (case.dtype, found.padded_head_dim, found.architecture)
    return sum(
        len(_ffi.native.compile(operation, fields, *target, seqlen_q=q.shape[1]))
        for operation in ("forward", "backward")
    )
