"""Fine-tunes a language model in flax nnx, flash attention in place of flax's own.

    python examples/finetune_nnx.py

The checkpoint comes from a model with flax's attention: one argument of the layer
changes, and every parameter keeps its name and shape. The text is this file.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_flash_attn.integrations.nnx import attention_fn

SEQLEN, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nnx.Module):
    """Attention and a perceptron, each added to its normalised input."""

    def __init__(self, attention: Callable[..., jax.Array], dropout: float) -> None:
        rngs = nnx.Rngs(0)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            dropout_rate=dropout,
            deterministic=dropout == 0,
            decode=False,
            attention_fn=attention,
            rngs=rngs,
            keep_rngs=False,
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Returns the block's output for x (B, S, width)."""
        x += self.attend(self.norms[0](x), rngs=rngs)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class GPT(nnx.Module):
    """A small decoder over bytes."""

    def __init__(
        self, attention: Callable[..., jax.Array], dropout: float = 0.0
    ) -> None:
        rngs = nnx.Rngs(1)
        self.byte = nnx.Embed(256, WIDTH, rngs=rngs)
        self.position = nnx.Embed(SEQLEN, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(attention, dropout) for _ in range(LAYERS)])
        self.logits = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns logits (B, S, 256) of tokens (B, S)."""
        x = self.byte(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, rngs)
        return self.logits(x)


def checkpoint() -> nnx.State:
    """Returns the parameters of a model with flax's attention; yours are on disk."""
    return nnx.state(GPT(nnx.dot_product_attention), nnx.Param)


def read_batch(size: int = 8) -> jax.Array:
    """Returns windows (B, S + 1) of this file's bytes."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    starts = np.linspace(0, len(text) - SEQLEN - 1, size).astype(int)
    return jnp.asarray(np.stack([text[i : i + SEQLEN + 1] for i in starts]))


def loss_of(model: GPT, batch: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Returns the mean cross-entropy of the next byte."""
    logits = model(batch[:, :-1], rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def train_step(
    model: GPT, optimizer: nnx.Optimizer, batch: jax.Array, rngs: nnx.Rngs
) -> jax.Array:
    """Updates the model in place and returns the loss before the update."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch, rngs)
    optimizer.update(model, grads)
    return loss


def finetune(steps: int = 20) -> list[float]:
    """Returns the loss of every step."""
    # The kernel is told to be causal, so neither mask nor is_causal is passed.
    model = GPT(attention_fn(causal=True), dropout=0.1)
    nnx.update(model, checkpoint())
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    batch, rngs = read_batch(), nnx.Rngs(dropout=2)
    return [float(train_step(model, optimizer, batch, rngs)) for _ in range(steps)]


if __name__ == "__main__":
    for index, loss in enumerate(finetune()):
        print(f"step {index:3d}  loss {loss:.3f}")
