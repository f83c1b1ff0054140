"""Fine-tunes a language model in flax linen, flash attention in place of flax's own.

    python examples/finetune_linen.py

The checkpoint comes from a model with flax's attention: one argument of the layer
changes, and every parameter keeps its name and shape. The text is this file.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jax_flash_attn.integrations.linen import attention_fn

SEQLEN = 64


class GPT(nn.Module):
    """A small decoder over bytes."""

    attention: Callable[..., jax.Array]
    width: int = 64
    heads: int = 4
    layers: int = 2
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns logits (B, S, 256) of tokens (B, S)."""
        init = nn.initializers.normal(0.1)
        position = self.param("position", init, (SEQLEN, self.width))
        x = nn.Embed(256, self.width)(tokens) + position
        for _ in range(self.layers):
            x += nn.MultiHeadDotProductAttention(
                num_heads=self.heads,
                dropout_rate=self.dropout,
                deterministic=self.dropout == 0,
                attention_fn=self.attention,
            )(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(self.width)(
                nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            )
        return nn.Dense(256)(nn.LayerNorm()(x))


def checkpoint() -> Any:
    """Returns the parameters of a model with flax's attention; yours are on disk."""
    model = GPT(nn.dot_product_attention)
    return model.init(jax.random.key(0), jnp.zeros((1, SEQLEN), jnp.int32))


def read_batch(size: int = 8) -> jax.Array:
    """Returns windows (B, S + 1) of this file's bytes."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    starts = np.linspace(0, len(text) - SEQLEN - 1, size).astype(int)
    return jnp.asarray(np.stack([text[i : i + SEQLEN + 1] for i in starts]))


def loss_of(
    model: GPT, variables: Any, batch: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Returns the mean cross-entropy of the next byte."""
    rngs = {} if key is None else {"dropout": key}
    logits = model.apply(variables, batch[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def finetune(steps: int = 20) -> list[float]:
    """Returns the loss of every step."""
    # The kernel is told to be causal, so no mask array is passed.
    model = GPT(attention_fn(causal=True), dropout=0.1)
    optimizer = optax.adamw(3e-3)
    variables, batch = checkpoint(), read_batch()
    state = optimizer.init(variables)

    @jax.jit
    def step(variables: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss_fn = functools.partial(loss_of, model)
        loss, grads = jax.value_and_grad(loss_fn)(variables, batch, key)
        updates, state = optimizer.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        variables, state, loss = step(variables, state, key)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    for index, loss in enumerate(finetune()):
        print(f"step {index:3d}  loss {loss:.3f}")
