"""What every JAX transform of a call must give, for any implementation.

Each check compares with the oracle of one example at a time, so it has no part in how
a transform folds, repeats or sums.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn
from tests.support import calls, closeness, inputs, oracle
from tests.support.cases import Case

COTANGENTS = ("dout", "dlse")
GRADIENTS = ("dq", "dk", "dv")

SUBSETS = tuple(
    subset
    for count in range(1, len(calls.OPERANDS) + 1)
    for subset in itertools.combinations(calls.OPERANDS, count)
)
"""Every way to map at least one operand."""

SUBSET_CHECKS = (
    "grad",
    "vmap_of_grad",
    "grad_of_vmap",
    "vmap_of_jacobian",
    "vmap_of_remat",
    "grad_of_scan",
)
"""The names of the checks that take a subset of the operands."""


def _complement(subset):
    return tuple(name for name in calls.OPERANDS if name not in subset)


_HALVES = (
    ("q",),
    ("k", "v"),
    ("q", "k"),
    ("v", "slopes"),
    ("q", "dropout_rng"),
    ("k", "slopes"),
)

PAIRWISE = frozenset(
    (check, subset)
    for check, half in zip(SUBSET_CHECKS, _HALVES, strict=True)
    for subset in (half, _complement(half))
)
"""Pairs of check and subset that hold every pair of choices: which check, and which
of the operands are in the subset."""

SUBSET_PARAMETERS = tuple(
    pytest.param(
        *pair,
        id=f"{pair[0]}-{'-'.join(pair[1])}",
        marks=() if pair in PAIRWISE else pytest.mark.long,
    )
    for pair in itertools.product(SUBSET_CHECKS, SUBSETS)
)
"""Every check with every subset, those that are not needed for pairs behind `long`."""

BASIC_CHECKS = (
    "jit",
    "eager",
    "value_and_grad",
    "grad_without_lse",
    "grad_of_lse_alone",
    "vmap_over_other_axes",
    "vmap_out_axes",
    "nested_vmap",
    "vmap_of_vjp",
    "vmapped_dropout_equals_loop",
    "scan",
    "second_derivatives_are_refused",
)
"""The names of the checks that take no argument."""

EVERYTHING = Case(
    "everything",
    "operands of every kind, each with its own batch of 2",
    batch=2,
    seqlen_q=10,
    seqlen_k=14,
    heads=4,
    heads_k=2,
    head_dim=16,
    causal=True,
    softcap=8.0,
    alibi="bh",
    dropout_p=0.3,
)


@dataclasses.dataclass(frozen=True)
class Checks:
    """The checks of one implementation in one dtype."""

    implementation: str
    dtype: str

    @functools.cached_property
    def case(self):
        return dataclasses.replace(EVERYTHING, dtype=self.dtype)

    @functools.cached_property
    def attend(self):
        return calls.attention(self.case, implementation=self.implementation)

    def examples(self, count):
        """The arrays of `count` calls, unlike each other."""
        return [inputs.make(self.case, seed) for seed in range(count)]

    # jit, grad, value_and_grad

    def jit(self):
        arrays = inputs.make(self.case)
        results = calls.jit(calls.with_gradients(self.attend))(arrays)
        self._assert_right(results, arrays)

    def eager(self):
        arrays = inputs.make(self.case)
        self._assert_right(calls.with_gradients(self.attend)(arrays), arrays)

    def value_and_grad(self):
        arrays = inputs.make(self.case)

        def loss(qkv):
            rest = (arrays[name] for name in calls.OPERANDS[3:])
            out, lse = self.attend(*qkv, *rest)
            return _weighted(out, lse, arrays), (out, lse)

        qkv = tuple(arrays[name] for name in "qkv")
        (_, results), gradients = calls.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
        self._assert_right(_named(*results, *gradients), arrays)
        alone = calls.jit(jax.grad(lambda qkv: loss(qkv)[0]))(qkv)
        self._assert_right(_named(*results, *alone), arrays)

    def grad_without_lse(self):
        """The backward that is given no cotangent of lse."""
        arrays = inputs.make(self.case)
        arrays["dlse"] = jnp.zeros_like(arrays["dlse"])
        attend = calls.attention(self.case, implementation=self.implementation)

        def loss(q, k, v):
            out, _ = attend(q, k, v, arrays["slopes"], arrays["dropout_rng"])
            return (out.astype(jnp.float32) * arrays["dout"]).sum()

        def loss_of_out(q, k, v):
            out = jax_flash_attn.flash_attn_func(
                q,
                k,
                v,
                **calls.options(self.case),
                alibi_slopes=arrays["slopes"],
                dropout_rng=arrays["dropout_rng"],
                implementation=self.implementation,
            )
            return (out.astype(jnp.float32) * arrays["dout"]).sum()

        qkv = tuple(arrays[name] for name in "qkv")
        for function in (loss, loss_of_out):
            gradients = calls.jit(jax.grad(function, argnums=(0, 1, 2)))(*qkv)
            self._assert_gradients_right(gradients, arrays)

    def grad_of_lse_alone(self):
        arrays = inputs.make(self.case)
        arrays["dout"] = jnp.zeros_like(arrays["dout"])

        def loss(q, k, v):
            _, lse = self.attend(q, k, v, arrays["slopes"], arrays["dropout_rng"])
            return (lse * arrays["dlse"]).sum()

        qkv = tuple(arrays[name] for name in "qkv")
        gradients = calls.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)
        self._assert_gradients_right(gradients, arrays)

    # Subsets of the operands

    def grad(self, subset):
        """Differentiates with respect to the subset alone; slopes have gradient 0."""
        arrays = inputs.make(self.case)
        # A key has no gradient, and without any there is nothing to check.
        names = [n for n in subset if n != "dropout_rng"] or ["q"]

        def loss(chosen):
            given = arrays | chosen
            out, lse = self.attend(*(given[name] for name in calls.OPERANDS))
            return _weighted(out, lse, arrays)

        gradients = calls.jit(jax.grad(loss))({name: arrays[name] for name in names})
        slopes = gradients.pop("slopes", np.zeros(()))
        np.testing.assert_array_equal(slopes, np.zeros_like(slopes))
        results = {f"d{name}": gradient for name, gradient in gradients.items()}
        self._assert_right(results, arrays)

    def vmap_of_grad(self, subset, in_axes=None, attend=None):
        """Maps the operands of a subset, each over the axis that `in_axes` names."""
        examples = self._examples_sharing(3, subset)
        axes = dict.fromkeys(examples[0])
        axes |= {name: (in_axes or {}).get(name, 0) for name in subset}
        run = calls.with_gradients(attend or self.attend)
        mapped = jax.vmap(run, in_axes=(axes,))
        self._assert_right(calls.jit(mapped)(_stack(examples, axes)), *examples)

    def vmap_of_remat(self, subset):
        """As `vmap_of_grad`, of a call that is computed again for its gradients."""
        self.vmap_of_grad(subset, attend=jax.checkpoint(self.attend))

    def vmap_of_jacobian(self, subset):
        """Two rows of a Jacobian for each example; in it, cotangents are mapped."""
        count, rows = 2, 2
        examples = self._examples_sharing(count, subset)
        axes = {name: 0 if name in subset else None for name in calls.OPERANDS}
        stacked = _stack([{n: e[n] for n in axes} for e in examples], axes)
        cotangents = [inputs.make(self.case, 7 + row) for row in range(rows)]

        def losses(qkv, rest):
            results = self.attend(*qkv, *rest)
            return jnp.stack([_weighted(*results, c) for c in cotangents])

        in_axes = tuple(axes[name] for name in calls.OPERANDS)
        jacobian = jax.vmap(jax.jacrev(losses), in_axes=(in_axes[:3], in_axes[3:]))
        operands = [stacked[name] for name in calls.OPERANDS]
        gradients = calls.jit(jacobian)(tuple(operands[:3]), tuple(operands[3:]))
        pairs = [
            example | {name: c[name] for name in COTANGENTS}
            for example in examples
            for c in cotangents
        ]
        flat = (x.reshape(count * rows, *x.shape[2:]) for x in gradients)
        self._assert_right(dict(zip(GRADIENTS, flat, strict=True)), *pairs)

    def grad_of_vmap(self, subset):
        """Gradients of operands that are not mapped are sums over the examples."""

        def over_examples(*operands):
            in_axes = tuple(0 if name in subset else None for name in calls.OPERANDS)
            return jax.vmap(self.attend, in_axes=in_axes)(*operands)

        self._assert_gradients_of_sum_right(over_examples, subset)

    def grad_of_scan(self, subset):
        """As `grad_of_vmap`, one example after the other."""

        def over_examples(*operands):
            given = dict(zip(calls.OPERANDS, operands, strict=True))
            mapped = {name: given.pop(name) for name in subset}

            def step(carry, one):
                now = given | one
                return carry, self.attend(*(now[name] for name in calls.OPERANDS))

            return jax.lax.scan(step, 0, mapped)[1]

        self._assert_gradients_of_sum_right(over_examples, subset)

    def _assert_gradients_of_sum_right(self, over_examples, subset):
        """Checks gradients of the summed loss of examples that share all but a subset.

        Args:
            over_examples: takes the operands, those of the subset stacked, and returns
                out and lse, stacked.
            subset: the names of operands that the examples differ in.
        """
        examples = self._examples_sharing(3, (*subset, *COTANGENTS))
        axes = {name: 0 if name in subset else None for name in calls.OPERANDS}
        stacked = _stack(examples, axes | dict.fromkeys(COTANGENTS, 0))

        def loss(q, k, v):
            rest = (stacked[name] for name in calls.OPERANDS[3:])
            return _weighted(*over_examples(q, k, v, *rest), stacked)

        qkv = tuple(stacked[name] for name in "qkv")
        gradients = calls.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)
        rights = [self._expected(arrays) for arrays in examples]
        for operand, name, gradient in zip("qkv", GRADIENTS, gradients, strict=True):
            exact, naive = (
                np.stack([right[name][n].astype(np.float64) for right in rights])
                for n in range(2)
            )
            if operand not in subset:
                exact, naive = exact.sum(0), naive.sum(0).astype(self.dtype)
            closeness.assert_close_to_oracle(gradient, exact, naive, what=name)

    # vmap

    def vmap_over_other_axes(self):
        axes = {"q": 2, "k": 1, "v": -1, "slopes": 1, "dropout_rng": 0}
        self.vmap_of_grad(calls.OPERANDS, axes)

    def vmap_out_axes(self):
        examples = self._examples_sharing(3, ("q", "dropout_rng"))
        axes = dict.fromkeys(examples[0]) | {"q": 3, "dropout_rng": 0}
        mapped = jax.vmap(
            lambda arrays: self.attend(*(arrays[name] for name in calls.OPERANDS)),
            in_axes=(axes,),
            out_axes=(2, -1),
        )
        out, lse = calls.jit(mapped)(_stack(examples, axes))
        results = {"out": jnp.moveaxis(out, 2, 0), "lse": jnp.moveaxis(lse, -1, 0)}
        self._assert_right(results, *examples)

    def nested_vmap(self):
        """The outer level maps q and slopes, the inner one k, v and the dropout key."""
        outer, inner = ("q", "slopes"), ("k", "v", "dropout_rng")
        examples = self.examples(2)

        def axes(subset):
            return {name: 0 if name in subset else None for name in examples[0]}

        mapped = jax.vmap(
            jax.vmap(calls.with_gradients(self.attend), in_axes=(axes(inner),)),
            in_axes=(axes(outer),),
        )
        stacked = _stack(examples, axes(outer + inner))
        results = calls.jit(mapped)(stacked)
        pairs = [
            examples[0]
            | {name: examples[i][name] for name in outer}
            | {name: examples[j][name] for name in inner}
            for i in range(2)
            for j in range(2)
        ]
        flat = {
            name: result.reshape(4, *result.shape[2:])
            for name, result in results.items()
        }
        self._assert_right(flat, *pairs)

    def vmap_of_vjp(self):
        """Cotangents are mapped and operands are not, as in a Jacobian."""
        examples = self._examples_sharing(3, COTANGENTS)
        arrays = examples[0]
        cotangents = tuple(
            jnp.stack([example[name] for example in examples]) for name in COTANGENTS
        )

        def run(qkv, cotangents):
            rest = (arrays[name] for name in calls.OPERANDS[3:])
            _, pullback = jax.vjp(lambda qkv: self.attend(*qkv, *rest), qkv)
            return jax.vmap(pullback)(cotangents)

        qkv = tuple(arrays[name] for name in "qkv")
        (gradients,) = calls.jit(run)(qkv, cotangents)
        self._assert_right(dict(zip(GRADIENTS, gradients, strict=True)), *examples)

    def vmapped_dropout_equals_loop(self):
        """Each example drops what it drops alone: out of uniform scores shows it."""
        seqlen = self.case.head_dim
        shape = (2, seqlen, 2, seqlen)
        q = jnp.zeros(shape, self.dtype)
        v = jnp.broadcast_to(jnp.eye(seqlen, dtype=self.dtype)[:, None], shape)
        rngs = jax.random.split(jax.random.key(5), 3)

        def dropped(rng):
            out = jax_flash_attn.flash_attn_func(
                q,
                q,
                v,
                dropout_p=0.4,
                dropout_rng=rng,
                implementation=self.implementation,
            )
            return out.swapaxes(1, 2) != 0

        mapped = calls.jit(jax.vmap(dropped))(rngs)
        assert len({np.asarray(mask).tobytes() for mask in mapped}) == 3
        for rng, mask in zip(rngs, mapped, strict=True):
            keep = jax_flash_attn.testing.dropout_keep_mask(
                rng, 0.4, 2, 2, *shape[1::2]
            )
            np.testing.assert_array_equal(mask, keep)

    # scan, checkpoint

    def scan(self):
        """Values and gradients through a loop over the examples."""
        examples = self.examples(3)
        stacked = _stack(examples, dict.fromkeys(examples[0], 0))
        rest = tuple(stacked[name] for name in calls.OPERANDS[3:])

        def run(qkv):
            def step(carry, operands):
                return carry, self.attend(*operands)

            return jax.lax.scan(step, 0, (*qkv, *rest))[1]

        def with_gradients(stacked):
            results, pullback = jax.vjp(run, tuple(stacked[name] for name in "qkv"))
            (gradients,) = pullback(tuple(stacked[name] for name in COTANGENTS))
            return _named(*results, *gradients)

        self._assert_right(calls.jit(with_gradients)(stacked), *examples)

    def checkpoint(self, names, num_forwards):
        """Remat runs the forward kernel again unless a policy keeps its results."""
        policies = jax.checkpoint_policies
        policy = (
            policies.save_only_these_names(*names)
            if names
            else policies.nothing_saveable
        )
        arrays = inputs.make(self.case)
        rest = tuple(arrays[name] for name in calls.OPERANDS[3:])

        @functools.partial(jax.checkpoint, policy=policy)
        def layer(q, k, v):
            return self.attend(q * 1, k, v, *rest)

        def loss(q, k, v):
            return _weighted(*layer(q, k, v), arrays)

        gradient = jax.grad(loss, argnums=(0, 1, 2))
        qkv = tuple(arrays[name] for name in "qkv")
        jaxpr = jax.make_jaxpr(gradient)(*qkv)
        assert count_primitive(jaxpr, "flash_attention_forward") == num_forwards
        assert count_primitive(jaxpr, "flash_attention_backward") == 1
        self._assert_gradients_right(calls.jit(gradient)(*qkv), arrays)

    # Packed operands

    def packed(self, packing):
        case = self.case
        if packing == "qkv":
            case = dataclasses.replace(case, seqlen_q=case.seqlen_k, heads_k=case.heads)
        results = calls.run(case, packing=packing, implementation=self.implementation)
        oracle.check(results, oracle.expected(case))

    def vmap_of_packed(self, packing):
        """Maps the packed buffers alone; each gradient buffer has its shape."""
        case = dataclasses.replace(self.case, seqlen_q=14, heads_k=4)
        examples = [inputs.make(case, seed) for seed in range(3)]
        shared = {
            name: examples[0][name] for name in (*calls.OPERANDS[3:], *COTANGENTS)
        }
        examples = [example | shared for example in examples]
        axes = dict.fromkeys(examples[0]) | dict.fromkeys("qkv", 0)
        attend = calls.attention(case, packing, implementation=self.implementation)
        mapped = jax.vmap(calls.with_gradients(attend), in_axes=(axes,))
        self._assert_right(
            calls.jit(mapped)(_stack(examples, axes)), *examples, case=case
        )

    # What has no rule

    def second_derivatives_are_refused(self):
        arrays = inputs.make(self.case)

        def loss(q):
            rest = (arrays[name] for name in calls.OPERANDS[1:])
            return self.attend(q, *rest)[0].astype(jnp.float32).sum()

        def slope(q):
            return jax.grad(loss)(q).astype(jnp.float32).sum()

        for differentiate in (jax.grad(slope), jax.hessian(loss)):
            with pytest.raises(NotImplementedError, match="second derivatives"):
                jax.eval_shape(differentiate, arrays["q"])

    def _examples_sharing(self, count, subset):
        """Examples that differ in the arrays of a subset alone."""
        examples = self.examples(count)
        return [
            examples[0] | {name: example[name] for name in subset}
            for example in examples
        ]

    def _expected(self, arrays, case=None):
        return oracle.of(case or self.case, arrays)

    def _assert_right(self, results, *examples, case=None):
        """Judges results, stacked where there are several examples, by the oracle."""
        rights = [self._expected(arrays, case) for arrays in examples]
        for name, result in results.items():
            exact, naive = (
                np.stack([right[name][n] for right in rights]) for n in range(2)
            )
            if len(examples) == 1:
                exact, naive = exact[0], naive[0]
            closeness.assert_close_to_oracle(result, exact, naive, what=name)

    def _assert_gradients_right(self, gradients, arrays):
        self._assert_right(dict(zip(GRADIENTS, gradients, strict=True)), arrays)


def count_primitive(jaxpr, name):
    """Returns how often a jaxpr and those inside its equations use a primitive."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        count += sum(count_primitive(x, name) for x in inner if _is_jaxpr(x))
    return count


def _is_jaxpr(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def _named(*results):
    return dict(zip(oracle.NAMES, results, strict=True))


def _weighted(out, lse, arrays):
    out = out.astype(lse.dtype) * arrays["dout"].astype(lse.dtype)
    return out.sum() + (lse * arrays["dlse"]).sum()


def _stack(examples, axes):
    """Stacks what has an axis, along it; the rest is the first example's."""
    return {
        name: value
        if axes[name] is None
        else jnp.stack([example[name] for example in examples], axis=axes[name])
        for name, value in examples[0].items()
    }
