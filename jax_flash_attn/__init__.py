"""FlashAttention for JAX: exact attention in linear memory, with its own CUDA kernels.

README.md shows how to use it; `explain` tells what a call would run.
"""

from jax_flash_attn import testing
from jax_flash_attn._version import __version__
from jax_flash_attn._vjp import LSE_NAME, OUT_NAME
from jax_flash_attn.attention import (
    dot_product_attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from jax_flash_attn.explain import Explanation, explain

__all__ = [
    "LSE_NAME",
    "OUT_NAME",
    "Explanation",
    "__version__",
    "dot_product_attention",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "testing",
]
