"""A small GPT over bytes, its attention, and the text that it learns.

The text is the Python standard library's source, which every machine with Python has.
train_gpt.py trains the model on one device, train_sharded.py on many.
"""

import dataclasses
import functools
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_flash_attn

NUM_BYTES = 256
FLASH = {"flash": "auto", "flash-cuda": "cuda", "flash-jax": "jax"}
"""Ways to run jax_flash_attn, with its own names for them."""

JAX_NN = ("xla", "cudnn")
"""Ways to run jax.nn.dot_product_attention, under its own names."""

_HELD_OUT_EVERY = 20
_HELD_OUT_BATCHES = 8
_HELD_OUT_SEED = 1
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}

Attention = Callable[[jax.Array, jax.Array | None], jax.Array]
"""From qkv (B, S, 3, H, D) and a dropout key to (B, S, H, D)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Model and training sizes."""

    layers: int
    heads: int
    head_dim: int
    seqlen: int
    batch: int
    steps: int
    learning_rate: float
    activations: jax.typing.DTypeLike
    attention: str = "flash"
    dropout: float = 0.0
    seed: int = 0

    @property
    def width(self) -> int:
        """Features per token."""
        return self.heads * self.head_dim


PRESETS = {
    "cpu": Config(
        layers=4,
        heads=4,
        head_dim=32,
        seqlen=64,
        batch=16,
        steps=600,
        learning_rate=4e-3,
        activations=jnp.float32,
    ),
    "gpu": Config(
        layers=12,
        heads=8,
        head_dim=128,
        seqlen=2048,
        batch=16,
        steps=1000,
        learning_rate=6e-4,
        activations=jnp.bfloat16,
    ),
}


def attention_of(config: Config) -> Attention:
    """Returns the chosen attention over packed queries, keys and values."""
    if config.attention in FLASH:
        return functools.partial(_flash, config)
    if config.dropout:
        raise ValueError(f"attention {config.attention} has no dropout")
    return functools.partial(_jax_nn, config)


def _flash(config: Config, qkv: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
    return jax_flash_attn.flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0 if dropout_rng is None else config.dropout,
        causal=True,
        dropout_rng=dropout_rng,
        implementation=FLASH[config.attention],
    )


def _jax_nn(config: Config, qkv: jax.Array, _: jax.Array | None) -> jax.Array:
    q, k, v = (qkv[:, :, i] for i in range(3))
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation=config.attention
    )


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each added to its normalised input."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, dtype=config.activations, rngs=rngs)
        general = functools.partial(
            nnx.LinearGeneral, dtype=config.activations, use_bias=False, rngs=rngs
        )
        norm = functools.partial(nnx.LayerNorm, dtype=config.activations, rngs=rngs)
        width = config.width
        # Residual branches start small, so that depth does not change the scale.
        last = nnx.initializers.variance_scaling(
            0.5 / config.layers, "fan_in", "normal"
        )
        # Heads are an axis of their weights, so that devices can share heads out.
        heads = (config.heads, config.head_dim)
        self.attention_norm = norm(width)
        self.qkv = general(width, (3, *heads))
        self.out = general(heads, width, axis=(-2, -1), kernel_init=last)
        self.mlp_norm = norm(width)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, kernel_init=last)
        self.attend = attention_of(config)

    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
        """Returns the block's output for x (B, S, width)."""
        qkv = self.qkv(self.attention_norm(x))
        x = x + self.out(self.attend(qkv, dropout_rng))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """A decoder over bytes."""

    def __init__(self, config: Config) -> None:
        rngs = nnx.Rngs(config.seed)
        embed = functools.partial(
            nnx.Embed,
            dtype=config.activations,
            embedding_init=nnx.initializers.normal(0.1),
            rngs=rngs,
        )
        self.byte = embed(NUM_BYTES, config.width)
        self.position = embed(config.seqlen, config.width)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=config.activations, rngs=rngs)
        self.logits = nnx.Linear(
            config.width, NUM_BYTES, dtype=config.activations, rngs=rngs
        )

    def __call__(
        self, tokens: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Returns float32 logits (B, S, 256) for tokens (B, S)."""
        x = self.byte(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for index, block in enumerate(self.blocks):
            key = dropout_rng
            if key is not None:
                key = jax.random.fold_in(key, index)
            x = block(x, key)
        return self.logits(self.norm(x)).astype(jnp.float32)


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """Returns the standard library's source as bytes: for training, and held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    texts = [path.read_bytes() for path in files]
    held_out = np.frombuffer(b"".join(texts[::_HELD_OUT_EVERY]), np.uint8)
    del texts[::_HELD_OUT_EVERY]
    return np.frombuffer(b"".join(texts), np.uint8), held_out


def batches(text: np.ndarray, config: Config, seed: int) -> Iterator[np.ndarray]:
    """Yields batches (B, S + 1) of random windows; the seed fixes their order."""
    random = np.random.default_rng(seed)
    offsets = np.arange(config.seqlen + 1)
    while True:
        starts = random.integers(len(text) - config.seqlen, size=(config.batch, 1))
        yield text[starts + offsets].astype(np.int32)


def held_out_batches(text: np.ndarray, config: Config) -> list[np.ndarray]:
    """Returns a few batches of the held-out text, always the same ones."""
    stream = batches(text, config, _HELD_OUT_SEED)
    return list(itertools.islice(stream, _HELD_OUT_BATCHES))


def loss_of(
    model: GPT, batch: jax.Array, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns the mean cross-entropy of the next byte, in nats."""
    logits = model(batch[:, :-1], dropout_rng)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def make_optimizer(model: GPT, config: Config) -> nnx.Optimizer:
    """Returns AdamW with clipped gradients, a warm-up and a cosine decay."""
    peak = config.learning_rate
    rate = optax.warmup_cosine_decay_schedule(
        0.0, peak, max(config.steps // 20, 1), config.steps, 0.1 * peak
    )
    update = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1)
    )
    return nnx.Optimizer(model, update, wrt=nnx.Param)
