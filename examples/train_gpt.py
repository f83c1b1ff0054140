"""Trains a small GPT on the Python standard library's source text, byte by byte.

    python examples/train_gpt.py --preset cpu
    python examples/train_gpt.py --preset gpu --attention flash
    python examples/train_gpt.py --compare runs/flash runs/xla

Every machine with Python has the text. A run writes loss.csv, loss.png and sample.txt
into its folder and prints the loss on files that it never saw. The same seed gives
the same batches, so that runs with different attention can be laid over each other.
"""

import argparse
import csv
import dataclasses
import functools
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_flash_attn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
        norm = functools.partial(nnx.LayerNorm, dtype=config.activations, rngs=rngs)
        width = config.width
        # Residual branches start small, so that depth does not change the scale.
        last = nnx.initializers.variance_scaling(
            0.5 / config.layers, "fan_in", "normal"
        )
        self.attention_norm = norm(width)
        self.qkv = linear(width, 3 * width, use_bias=False)
        self.out = linear(width, width, use_bias=False, kernel_init=last)
        self.mlp_norm = norm(width)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, kernel_init=last)
        self.attend = attention_of(config)
        self.packed = (3, config.heads, config.head_dim)

    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None) -> jax.Array:
        """Returns the block's output for x (B, S, width)."""
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], *self.packed)
        x = x + self.out(self.attend(qkv, dropout_rng).reshape(x.shape))
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


def loss_of(
    model: GPT, batch: jax.Array, dropout_rng: jax.Array | None = None
) -> jax.Array:
    """Returns the mean cross-entropy of the next byte, in nats."""
    logits = model(batch[:, :-1], dropout_rng)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@functools.partial(nnx.jit, static_argnames="dropout")
def train_step(
    model: GPT,
    optimizer: nnx.Optimizer,
    batch: jax.Array,
    key: jax.Array,
    dropout: bool,
) -> jax.Array:
    """Updates the model in place and returns the loss before the update."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch, key if dropout else None)
    optimizer.update(model, grads)
    return loss


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


def train(config: Config, text: np.ndarray) -> tuple[GPT, list[float]]:
    """Returns the trained model and the loss of every step."""
    model = GPT(config)
    optimizer = make_optimizer(model, config)
    key = jax.random.key(config.seed)
    losses: list[jax.Array] = []
    stream = batches(text, config, config.seed)
    with tqdm(range(config.steps), desc=config.attention) as progress:
        for step, batch in zip(progress, stream, strict=False):
            step_key = jax.random.fold_in(key, step)
            losses.append(
                train_step(model, optimizer, batch, step_key, config.dropout > 0)
            )
            if step % 10 == 9:
                # Reading a loss waits for the device, so not at every step.
                progress.set_postfix(loss=f"{float(losses[-1]):.3f}")
    return model, [float(loss) for loss in losses]


def held_out_loss(model: GPT, config: Config, text: np.ndarray) -> float:
    """Returns the mean loss over a few fixed batches of the held-out text."""
    stream = batches(text, config, _HELD_OUT_SEED)
    evaluate = nnx.jit(loss_of)
    losses = [evaluate(model, next(stream)) for _ in range(_HELD_OUT_BATCHES)]
    return float(jnp.mean(jnp.stack(losses)))


def generate(model: GPT, prompt: np.ndarray, num_bytes: int, seed: int) -> bytes:
    """Returns bytes sampled one by one after a prompt that fills the context.

    The whole window is computed again for each byte: simple, with no cache.
    """

    @nnx.jit
    def sample(model: GPT, window: jax.Array) -> jax.Array:
        def step(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            byte = jax.random.categorical(key, model(window[None])[0, -1])
            byte = byte.astype(window.dtype)
            return jnp.append(window[1:], byte), byte

        keys = jax.random.split(jax.random.key(seed), num_bytes)
        return jax.lax.scan(step, window, keys)[1]

    return bytes(np.asarray(sample(model, prompt.astype(np.int32)), np.uint8))


def plot_losses(curves: dict[str, Sequence[float]], path: Path) -> None:
    """Writes loss curves as a PNG, thin lines over each other."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        axis.plot(losses, label=name, lw=0.9)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per byte")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_results(
    out: Path, name: str, losses: Sequence[float], prompt: bytes, sample: bytes
) -> None:
    """Writes loss.csv, loss.png and sample.txt."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(enumerate(losses))
    plot_losses({name: losses}, out / "loss.png")
    text = (prompt + b"\n--- sampled from here ---\n" + sample).decode(errors="replace")
    (out / "sample.txt").write_text(text)


def compare(first: Path, second: Path, out: Path) -> float:
    """Overlays two runs' losses in compare.png.

    Returns:
        The largest relative difference of the losses of one step.
    """
    curves = {}
    for folder in (first, second):
        with (folder / "loss.csv").open(newline="") as file:
            curves[folder.name] = [float(row["loss"]) for row in csv.DictReader(file)]
    out.mkdir(parents=True, exist_ok=True)
    plot_losses(curves, out / "compare.png")
    a, b = (np.asarray(losses) for losses in curves.values())
    return float(np.max(np.abs(a - b) / np.abs(b)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small GPT.")
    add = parser.add_argument
    add("--attention", choices=(*FLASH, *JAX_NN), default="flash")
    add("--preset", choices=PRESETS, default="cpu")
    add("--steps", type=int, help="default: the preset's")
    add("--seed", type=int, default=0)
    add("--dropout", type=float, default=0.0, help="of attention; flash only")
    add("--out", type=Path, help="folder to write to; default: runs/ATTENTION")
    add("--sample-bytes", type=int, default=400)
    add("--compare", type=Path, nargs=2, metavar="RUN", help="overlay two runs")
    options = parser.parse_args()
    if options.dropout and options.attention in JAX_NN:
        parser.error(f"--attention {options.attention} has no dropout")
    return options


def main() -> None:
    options = _parse()
    out = options.out or Path("runs", "" if options.compare else options.attention)
    if options.compare:
        difference = compare(*options.compare, out)
        print(f"largest relative difference of the losses: {difference:.2e}")
        return
    preset = PRESETS[options.preset]
    config = dataclasses.replace(
        preset,
        steps=options.steps or preset.steps,
        attention=options.attention,
        dropout=options.dropout,
        seed=options.seed,
    )
    start = time.monotonic()
    text, held_out = read_text()
    model, losses = train(config, text)
    final = held_out_loss(model, config, held_out)
    prompt = held_out[: config.seqlen]
    sample = generate(model, prompt, options.sample_bytes, config.seed)
    write_results(out, config.attention, losses, prompt.tobytes(), sample)
    seconds = time.monotonic() - start
    print(f"held-out loss {final:.3f} nats per byte after {config.steps} steps")
    print(f"{seconds:.0f} s; {out}/loss.csv, loss.png and sample.txt")


if __name__ == "__main__":
    main()
