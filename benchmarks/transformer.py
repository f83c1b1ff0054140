"""One transformer for every training benchmark; attention is passed in.

Plain JAX: parameters of all layers are stacked and the layers are one `lax.scan`, so
that a deep model compiles in the time of one layer. Parameters are float32, activations
bfloat16, losses float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.workloads import Workload

Objective = Literal["masked", "next", "class"]
Attend = Callable[..., jax.Array]
"""From q, k, v (B, S, H, D), and `dropout_rng` where attention drops, to out."""

Batch = dict[str, jax.Array]
"""tokens (B, S), labels, and positions (B, P) of what a masked model predicts."""

LEARNING_RATE = 1e-4
_PRNG = "rbg"  # masks of activations are large, and threefry's cost would show
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model and what it is trained for; `source` cites where the sizes are from."""

    name: str
    layers: int
    width: int
    heads: int
    seqlen: int
    vocab: int
    objective: Objective
    mlp_width: int
    pre_norm: bool = True
    num_classes: int = 0
    activations: str = "bfloat16"
    source: str = ""

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.width // self.heads

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.objective == "next"

    def attention(self, batch: int, dropout_p: float) -> Workload:
        """Returns what one layer's attention computes."""
        return Workload(
            self.name,
            batch,
            self.seqlen,
            self.heads,
            self.heads,
            self.head_dim,
            causal=self.causal,
            dropout_p=dropout_p,
            source=self.source,
        )


class State(NamedTuple):
    """What a training step carries on."""

    params: Any
    optimizer: Any
    key: jax.Array
    loss: jax.Array


def init(architecture: Architecture, seed: int | jax.Array) -> Any:
    """Returns random parameters, those of the layers stacked along the first axis."""
    width, mlp = architecture.width, architecture.mlp_width
    heads = (architecture.heads, architecture.head_dim)
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def weight(*shape: int, scale: float = 0.02) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    def norm(*lead: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones((*lead, width)), "bias": jnp.zeros((*lead, width))}

    layers = architecture.layers
    small = 0.02 / (2 * layers) ** 0.5  # of what is added to the residual stream
    return {
        "token": weight(architecture.vocab, width),
        "position": weight(architecture.seqlen, width),
        "norm": norm(),
        "class": weight(width, max(architecture.num_classes, 1)),
        "layers": {
            "query": weight(layers, width, *heads),
            "key": weight(layers, width, *heads),
            "value": weight(layers, width, *heads),
            "qkv_bias": jnp.zeros((layers, 3, *heads)),
            "out": weight(layers, *heads, width, scale=small),
            "out_bias": jnp.zeros((layers, width)),
            "attention_norm": norm(layers),
            "up": weight(layers, width, mlp),
            "up_bias": jnp.zeros((layers, mlp)),
            "down": weight(layers, mlp, width, scale=small),
            "down_bias": jnp.zeros((layers, width)),
            "mlp_norm": norm(layers),
        },
    }


_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Elementwise work is done again in the backward pass, fused into what reads it.

Storing its float32 steps for every layer would take more memory and more time.
"""


@_recomputed
def _norm(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(variance + _EPSILON)
    return (scaled * weights["scale"] + weights["bias"]).astype(x.dtype)


def _dropout(x: jax.Array, p: float, key: jax.Array) -> jax.Array:
    if p == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - p, x.shape)
    return jnp.where(keep, x / (1 - p), 0).astype(x.dtype)


def _attention(
    x: jax.Array, layer: Any, attend: Attend, p: float, key: jax.Array
) -> jax.Array:
    # Three products, so that no contender pays for slicing a packed one.
    q, k, v = (
        jnp.einsum("bsw,whd->bshd", x, layer[name]) + layer["qkv_bias"][index]
        for index, name in enumerate(("query", "key", "value"))
    )
    out = attend(q, k, v, dropout_rng=key) if p else attend(q, k, v)
    return jnp.einsum("bshd,hdw->bsw", out, layer["out"]) + layer["out_bias"]


_gelu = _recomputed(jax.nn.gelu)


def _mlp(x: jax.Array, layer: Any) -> jax.Array:
    hidden = _gelu(x @ layer["up"] + layer["up_bias"])
    return hidden @ layer["down"] + layer["down_bias"]


def features(
    architecture: Architecture,
    params: Any,
    tokens: jax.Array,
    attend: Attend,
    dropout_p: float,
    key: jax.Array,
) -> jax.Array:
    """Returns the last layer's activations, (B, S, width).

    Args:
        architecture: of the model.
        params: as `init` makes them.
        tokens: (B, S) integers.
        attend: attention of q, k and v.
        dropout_p: of attention, of both branches and of the embeddings.
        key: what dropout draws from.
    """
    dtype = jnp.dtype(architecture.activations)
    pre_norm = architecture.pre_norm
    x = (params["token"][tokens] + params["position"]).astype(dtype)
    if not pre_norm:
        x = _norm(x, params["norm"])
    x = _dropout(x, dropout_p, jax.random.fold_in(key, architecture.layers))

    def block(x: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
        layer, index = scanned
        layer = jax.tree.map(lambda weight: weight.astype(dtype), layer)
        keys = jax.random.split(jax.random.fold_in(key, index), 3)

        def attention(x: jax.Array) -> jax.Array:
            return _attention(x, layer, attend, dropout_p, keys[0])

        def mlp(x: jax.Array) -> jax.Array:
            return _mlp(x, layer)

        branches = (("attention_norm", attention), ("mlp_norm", mlp))
        for drop_key, (name, branch) in zip(keys[1:], branches, strict=True):
            y = branch(_norm(x, layer[name]) if pre_norm else x)
            x = x + _dropout(y, dropout_p, drop_key)
            x = x if pre_norm else _norm(x, layer[name])
        return x, None

    indices = jnp.arange(architecture.layers)
    x, _ = jax.lax.scan(block, x, (params["layers"], indices))
    return _norm(x, params["norm"]) if pre_norm else x


def logits_of(
    architecture: Architecture,
    params: Any,
    batch: Batch,
    attend: Attend,
    dropout_p: float,
    key: jax.Array,
) -> jax.Array:
    """Returns float32 logits of what the objective predicts."""
    x = features(architecture, params, batch["tokens"], attend, dropout_p, key)
    if architecture.objective == "class":
        return x.astype(jnp.float32).mean(1) @ params["class"]
    if architecture.objective == "masked":
        x = jnp.take_along_axis(x, batch["positions"][..., None], axis=1)
    table = params["token"].astype(x.dtype)
    # Float32 logits would make the two products of the backward pass float32 as well.
    return jnp.einsum("bsw,vw->bsv", x, table).astype(jnp.float32)


def loss_of(
    architecture: Architecture,
    params: Any,
    batch: Batch,
    attend: Attend,
    dropout_p: float,
    key: jax.Array,
) -> jax.Array:
    """Returns the mean cross-entropy, in nats."""
    logits = logits_of(architecture, params, batch, attend, dropout_p, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean()


def start(
    architecture: Architecture, optimizer: optax.GradientTransformation, seed: int
) -> State:
    """Returns the state before the first step; alike for alike seeds."""
    return starting(architecture, optimizer)(seed)


def starting(
    architecture: Architecture, optimizer: optax.GradientTransformation
) -> Callable[[int], State]:
    """Returns a function from a seed to the state before the first step."""

    @jax.jit
    def make(seed: jax.Array) -> State:
        params = init(architecture, seed)
        key = jax.random.key(seed, impl=_PRNG)
        return State(params, optimizer.init(params), key, jnp.zeros(()))

    return make


def training_step(
    architecture: Architecture,
    attend: Attend,
    optimizer: optax.GradientTransformation,
    dropout_p: float,
) -> Callable[[State, Batch], State]:
    """Returns a function from a state and a batch to the next state."""

    def step(state: State, batch: Batch) -> State:
        key, drop_key = jax.random.split(state.key)

        def loss_fn(params: Any) -> jax.Array:
            return loss_of(architecture, params, batch, attend, dropout_p, drop_key)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, memory = optimizer.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), memory, key, loss)

    return step


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_batch(architecture: Architecture, size: int, seed: int = 0) -> Batch:
    """Returns a batch of random tokens, for timing."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape, vocab = (size, architecture.seqlen), architecture.vocab
    tokens = jax.random.randint(keys[0], shape, 0, vocab)
    if architecture.objective == "next":
        return {"tokens": tokens, "labels": jnp.roll(tokens, -1, axis=1)}
    if architecture.objective == "class":
        labels = jax.random.randint(keys[1], (size,), 0, architecture.num_classes)
        return {"tokens": tokens, "labels": labels}
    # BERT predicts 15% of the tokens.
    predicted = (size, max(architecture.seqlen * 15 // 100, 1))
    positions = jax.random.randint(keys[1], predicted, 0, architecture.seqlen)
    labels = jax.random.randint(keys[2], predicted, 0, vocab)
    return {"tokens": tokens, "positions": positions, "labels": labels}
