"""The attention implementations that are compared, JAX ones and PyTorch ones.

Each says whether it is there (`available`), whether it takes a workload (`supports`),
and builds a callable of q, k, v in (B, S, H, D). Nothing but jax and our own package
is imported before a contender is asked for.
"""

import abc
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.workloads import UNBOUNDED, Mode, Workload

Attention = Callable[[Any, Any, Any], Any]

DROPOUT_SEED = 0


def on_gpu() -> bool:
    """Returns whether JAX runs on a GPU here."""
    return jax.default_backend() == "gpu"


def alibi_slopes(heads: int) -> jax.Array:
    """Returns the slopes 2^(-8 (h + 1) / heads), (H,) float32 (arXiv:2108.12409)."""
    return 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)


def dropout_rng() -> jax.Array:
    """Returns the PRNG key that our own calls draw their dropout mask from."""
    return jax.random.key(DROPOUT_SEED)


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"cannot import {module}: {_first_line(error)}"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Contender(abc.ABC):
    """One implementation under one name."""

    framework: Literal["jax", "torch"] = "jax"
    module: str | None = None
    """Imported to see whether the contender is there."""
    distribution: str | None = None
    """The package whose version a run records."""
    features: frozenset[str] = frozenset()
    """Those of window, dropout, softcap, alibi and gqa that it has."""
    replays_dropout = False
    """Whether the oracle can draw the same keep mask."""
    by_default = True
    """Whether a run that names no contenders takes it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self) -> str | None:
        """Returns why the contender cannot run here, or None."""
        if not on_gpu():
            return "needs a CUDA GPU"
        return _import_failure(self.module) if self.module else None

    def supports(self, workload: Workload, mode: Mode) -> str | None:
        """Returns why the contender cannot compute a workload, or None."""
        asked = {
            "window": workload.window != UNBOUNDED,
            "dropout": workload.dropout_p > 0,
            "softcap": workload.softcap > 0,
            "alibi": workload.alibi,
            "gqa": workload.heads_k != workload.heads,
        }
        lacking = [f for f, used in asked.items() if used and f not in self.features]
        return f"has no {', '.join(lacking)}" if lacking else None

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which its programs are compiled and run."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def build(self, workload: Workload) -> Attention:
        """Returns attention as a function of q, k and v."""


class Ours(Contender):
    """jax_flash_attn; on a GPU the kernels or nothing, unless the JAX path is named."""

    module = "jax_flash_attn"
    features = frozenset({"window", "dropout", "softcap", "alibi", "gqa"})
    replays_dropout = True

    def __init__(
        self,
        name: str,
        *,
        jax_path: bool = False,
        deterministic: bool = False,
        forced: Mapping[str, str] | None = None,
    ):
        super().__init__(name)
        self.jax_path = jax_path
        self.deterministic = deterministic
        self.forced = dict(forced or {})
        """Tiles by operation, as `jax_flash_attn.testing.override_tiles` takes them."""
        self.by_default = not (jax_path or deterministic or forced)

    @property
    def implementation(self) -> str:
        """The package's name for what is asked for."""
        if self.jax_path:
            return "jax"
        return "cuda" if on_gpu() else "auto"

    def available(self) -> str | None:
        """Returns why the contender cannot run here, or None."""
        if self.forced and not on_gpu():
            return "needs a CUDA GPU"
        return _import_failure("jax_flash_attn")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Forces the tiles that are named, if any."""
        testing = importlib.import_module("jax_flash_attn.testing")
        with contextlib.ExitStack() as stack:
            for operation, tiles in self.forced.items():
                stack.enter_context(testing.override_tiles(operation, tiles))
            yield

    def build(self, workload: Workload) -> Attention:
        """Returns flash_attn_func with the workload's options bound."""
        package = importlib.import_module("jax_flash_attn")
        slopes = alibi_slopes(workload.heads) if workload.alibi else None
        rng = dropout_rng() if workload.dropout_p else None
        return functools.partial(
            package.flash_attn_func,
            dropout_p=workload.dropout_p,
            causal=workload.causal,
            window_size=workload.window,
            softcap=workload.softcap,
            alibi_slopes=slopes,
            deterministic=self.deterministic,
            dropout_rng=rng,
            implementation=self.implementation,
        )


class JaxNN(Contender):
    """jax.nn.dot_product_attention; ALiBi as a bias array made inside the call."""

    features = frozenset({"window", "alibi", "gqa"})

    def __init__(
        self,
        name: str,
        implementation: Literal["xla", "cudnn"],
        *,
        widened: bool = False,
    ):
        super().__init__(name)
        self.implementation: Literal["xla", "cudnn"] = implementation
        self.widened = widened
        """Whether all but q, k, v, out and their gradients is float32."""
        self.by_default = not widened

    def available(self) -> str | None:
        """Returns why the contender cannot run here, or None."""
        return super().available() if self.implementation == "cudnn" else None

    def build(self, workload: Workload) -> Attention:
        """Returns dot_product_attention with the workload's options bound."""
        window = _window_or_none(workload)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            dtype = q.dtype
            if self.widened:
                q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                bias=_alibi_bias(workload, q.dtype) if workload.alibi else None,
                is_causal=workload.causal,
                local_window_size=window,
                implementation=self.implementation,
            ).astype(dtype)

        return attend


class JaxXlaDropout(Contender):
    """The steps of jax.nn's xla implementation, with the dropout that it lacks.

    Float32 scores and softmax, probabilities rounded to the input dtype, then dropped.
    """

    features = frozenset({"dropout"})
    by_default = False

    def available(self) -> str | None:
        """Returns why the contender cannot run here, or None."""
        return None

    def supports(self, workload: Workload, mode: Mode) -> str | None:
        """Returns why the contender cannot compute a workload, or None."""
        if workload.dropout_p == 0:
            return "is jax-xla without dropout"
        return super().supports(workload, mode)

    def build(self, workload: Workload) -> Attention:
        """Returns attention with the workload's options bound."""
        keep_p = 1 - workload.dropout_p
        rng = dropout_rng()

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, dropout_rng: Any = rng
        ) -> jax.Array:
            scores = jnp.einsum(
                "bqhd,bkhd->bhqk",
                q,
                k,
                # As jax.nn: products of the input dtype in the backward, too.
                precision=_PRODUCTS.get(q.dtype.name),
                preferred_element_type=jnp.float32,
            )
            scores *= workload.head_dim**-0.5
            if workload.causal:
                visible = jnp.tri(workload.seqlen, dtype=bool)
                scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
            probs = jax.nn.softmax(scores).astype(v.dtype)
            if workload.dropout_p:
                keep = jax.random.bernoulli(dropout_rng, keep_p, probs.shape)
                probs = jnp.where(keep, probs / keep_p, 0).astype(v.dtype)
            return jnp.einsum("bhqk,bkhd->bqhd", probs, v)

        return attend


class JaxCudnnDropout(Contender):
    """cuDNN with its own dropout, by the function that jax.nn calls.

    It is not public: jax.nn's has no dropout. Its seed is a constant of the program,
    so that every layer and step draws the same mask: enough to time attention alone. In
    a training step jax 0.11.2 ends the process ("Check failed:
    local_device_ordinal.has_value()" in XLA's cuda_dnn.cc).
    """

    module = "jax._src.cudnn.fused_attention_stablehlo"
    features = frozenset({"dropout"})
    by_default = False

    def supports(self, workload: Workload, mode: Mode) -> str | None:
        """Returns why the contender cannot compute a workload, or None."""
        if workload.dropout_p == 0:
            return "is jax-cudnn without dropout"
        return super().supports(workload, mode)

    def build(self, workload: Workload) -> Attention:
        """Returns cuDNN's attention with the workload's options bound."""
        cudnn = importlib.import_module(self.module)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, dropout_rng: Any = None
        ) -> jax.Array:
            masks = cudnn.MaskType
            return cudnn.dot_product_attention(
                q,
                k,
                v,
                scale=workload.head_dim**-0.5,
                mask_type=masks.CAUSAL if workload.causal else masks.NO_MASK,
                seed=DROPOUT_SEED,
                dropout_rate=workload.dropout_p,
            )

        return attend


_PRODUCTS = {
    "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    "float16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
}


def _window_or_none(workload: Workload) -> tuple[int, int] | None:
    """The visible keys left and right of a query, or None without a window."""
    if workload.window == UNBOUNDED:
        return None
    left, right = (workload.seqlen if w < 0 else w for w in workload.visible)
    return left, right


def _alibi_bias(workload: Workload, dtype: Any) -> jax.Array:
    position = jnp.arange(workload.seqlen, dtype=jnp.float32)
    distance = jnp.abs(position[:, None] - position[None, :])
    slopes = alibi_slopes(workload.heads)
    return (-slopes[None, :, None, None] * distance).astype(dtype)


class FlaxLinen(Contender):
    """flax linen's dot_product_attention: the textbook's steps, dropout included."""

    module = "flax.linen"
    distribution = "flax"
    features = frozenset({"dropout"})
    by_default = False

    def available(self) -> str | None:
        """Returns why the contender cannot run here, or None."""
        return _import_failure("flax.linen")

    def build(self, workload: Workload) -> Attention:
        """Returns dot_product_attention with the workload's options bound."""
        nn = importlib.import_module("flax.linen")
        rng = dropout_rng() if workload.dropout_p else None

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, dropout_rng: Any = rng
        ) -> jax.Array:
            # The mask is made inside the call, where XLA may fuse it.
            ones = jnp.ones((1, workload.seqlen), jnp.bool_)
            return nn.dot_product_attention(
                q,
                k,
                v,
                mask=nn.make_causal_mask(ones) if workload.causal else None,
                broadcast_dropout=False,
                dropout_rng=dropout_rng,
                dropout_rate=workload.dropout_p,
                deterministic=workload.dropout_p == 0,
            )

        return attend


class FlashMha(Contender):
    """The two ports of FlashAttention-3 whose entry point is `flash_mha`."""

    features = frozenset({"window", "gqa"})

    def __init__(self, name: str, module: str, distribution: str, head_dims: set[int]):
        super().__init__(name)
        self.module = module
        self.distribution = distribution
        self.head_dims = head_dims

    def supports(self, workload: Workload, mode: Mode) -> str | None:
        """Returns why the contender cannot compute a workload, or None."""
        if workload.head_dim not in self.head_dims:
            return f"has no head_dim {workload.head_dim}"
        return super().supports(workload, mode)

    def build(self, workload: Workload) -> Attention:
        """Returns flash_mha with the workload's options bound."""
        assert self.module is not None
        return functools.partial(
            importlib.import_module(self.module).flash_mha,
            is_causal=workload.causal,
            window_size=_window_or_none(workload) or UNBOUNDED,
        )


class Fa4Jax(Contender):
    """FlashAttention-4's CuTe kernels."""

    module = "fa4_jax"
    distribution = "fa4-jax"
    features = frozenset({"window", "gqa"})

    def build(self, workload: Workload) -> Attention:
        """Returns flash_attn with the workload's options bound."""
        return functools.partial(
            importlib.import_module("fa4_jax").flash_attn,
            causal=workload.causal,
            window_size=_window_or_none(workload),
            backend="cute",
        )


class Tokamax(Contender):
    """tokamax's Mosaic GPU kernels."""

    module = "tokamax"
    distribution = "tokamax"
    features = frozenset({"window", "softcap", "gqa"})

    def build(self, workload: Workload) -> Attention:
        """Returns dot_product_attention with the workload's options bound."""
        return functools.partial(
            importlib.import_module("tokamax").dot_product_attention,
            is_causal=workload.causal,
            local_window_size=_window_or_none(workload),
            logits_soft_cap=workload.softcap or None,
            implementation="mosaic",
        )


class TorchSdpa(Contender):
    """PyTorch's scaled_dot_product_attention with one backend allowed."""

    framework: Literal["jax", "torch"] = "torch"
    module = "torch"
    distribution = "torch"
    features = frozenset({"dropout", "gqa"})

    def __init__(self, name: str, backend: str):
        super().__init__(name)
        self.backend = backend

    def available(self) -> str | None:
        """Returns why the contender cannot run here, or None."""
        reason = super().available()
        if reason is None and not importlib.import_module("torch").cuda.is_available():
            return "torch sees no CUDA GPU"
        return reason

    def build(self, workload: Workload) -> Attention:
        """Returns attention over torch tensors in (B, S, H, D), as (B, H, S, D) views.

        The views cost nothing: the kernels read strides.
        """
        torch = importlib.import_module("torch")
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def attend(q: Any, k: Any, v: Any) -> Any:
            with self._backend_only():
                return sdpa(
                    *(x.transpose(1, 2) for x in (q, k, v)),
                    dropout_p=workload.dropout_p,
                    is_causal=workload.causal,
                    enable_gqa=workload.heads_k != workload.heads,
                ).transpose(1, 2)

        return attend

    @contextlib.contextmanager
    def _backend_only(self) -> Iterator[None]:
        attention = importlib.import_module("torch.nn.attention")
        backend = getattr(attention.SDPBackend, self.backend)
        with attention.sdpa_kernel(backend):
            yield


def contenders() -> dict[str, Contender]:
    """Returns every contender by name, ours first."""
    every = (
        Ours("ours"),
        Ours("ours-deterministic", deterministic=True),
        Ours("ours-jax", jax_path=True),
        Ours("ours-sm80", forced={"forward": "sm80", "backward": "sm80"}),
        JaxNN("jax-cudnn", "cudnn"),
        JaxNN("jax-xla", "xla"),
        JaxNN("jax-xla-float32", "xla", widened=True),
        JaxXlaDropout("jax-xla-dropout"),
        JaxCudnnDropout("jax-cudnn-dropout"),
        FlaxLinen("flax"),
        FlashMha("dew-fa3", "dew_flash_attn", "dew-flash-attn-cu13", {64, 128, 256}),
        FlashMha("flash-attn3-jax", "flash_attn3_jax", "flash-attn3-jax", {128}),
        Fa4Jax("fa4-jax"),
        Tokamax("tokamax"),
        TorchSdpa("torch-cudnn", "CUDNN_ATTENTION"),
        TorchSdpa("torch-flash", "FLASH_ATTENTION"),
    )
    return {contender.name: contender for contender in every}
