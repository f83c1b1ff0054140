"""Fine-tunes a language model in Haiku, flash attention in place of Haiku's own.

    python examples/finetune_haiku.py

The checkpoint comes from a model with `hk.MultiHeadAttention`: another class takes its
place, and every parameter keeps its name and shape. The text is this file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_flash_attn.integrations.haiku import MultiHeadAttention

SEQLEN, WIDTH, HEADS, LAYERS = 64, 64, 4, 2

Attend = Callable[[jax.Array], jax.Array]


def _attention(layer: type[hk.MultiHeadAttention], **options: Any) -> Any:
    w_init = hk.initializers.VarianceScaling(1 / LAYERS)
    return layer(HEADS, WIDTH // HEADS, w_init=w_init, name="attention", **options)


def own(x: jax.Array) -> jax.Array:
    """Attention as Haiku has it, with a causal mask array."""
    mask = jnp.tril(jnp.ones((1, 1, SEQLEN, SEQLEN)))
    return _attention(hk.MultiHeadAttention)(x, x, x, mask=mask)


def flash(x: jax.Array) -> jax.Array:
    """The same on flash attention, which is told to be causal, and with dropout."""
    return _attention(MultiHeadAttention, causal=True)(x, x, x, dropout_rate=0.1)


def make_model(attend: Attend) -> hk.Transformed:
    """Returns a small decoder over bytes: from tokens (B, S) to logits (B, S, 256)."""

    def norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    def forward(tokens: jax.Array) -> jax.Array:
        x = hk.Embed(256, WIDTH)(tokens)
        init = hk.initializers.RandomNormal(0.1)
        x += hk.get_parameter("position", (SEQLEN, WIDTH), init=init)
        for _ in range(LAYERS):
            x += attend(norm(x))
            x += hk.nets.MLP([4 * WIDTH, WIDTH], activation=jax.nn.gelu)(norm(x))
        return hk.Linear(256)(norm(x))

    return hk.transform(forward)


def checkpoint() -> hk.Params:
    """Returns the parameters of a model with Haiku's attention; yours are on disk."""
    tokens = jnp.zeros((1, SEQLEN), jnp.int32)
    return make_model(own).init(jax.random.key(0), tokens)


def read_batch(size: int = 8) -> jax.Array:
    """Returns windows (B, S + 1) of this file's bytes."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    starts = np.linspace(0, len(text) - SEQLEN - 1, size).astype(int)
    return jnp.asarray(np.stack([text[i : i + SEQLEN + 1] for i in starts]))


def loss_of(
    model: hk.Transformed, params: hk.Params, batch: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns the mean cross-entropy of the next byte."""
    logits = model.apply(params, key, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def finetune(steps: int = 20) -> list[float]:
    """Returns the loss of every step."""
    model, optimizer = make_model(flash), optax.adamw(3e-3)
    params, batch = checkpoint(), read_batch()
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of, 1)(model, params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        params, state, loss = step(params, state, key)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    for index, loss in enumerate(finetune()):
        print(f"step {index:3d}  loss {loss:.3f}")
