"""What one attention call computes, as a frozen value.

An `AttentionSpec` holds everything static about a call. Its fields are, name for
name, the attributes of the XLA custom call and the members of the native
`AttentionSpec` struct (csrc/launchers/attention_spec.h); a test compares the lists.
"""

import dataclasses
from typing import Literal

Packing = Literal["none", "kv", "qkv"]
"""How q, k and v arrive: three buffers, q beside a (B, S, 2, Hk, D) buffer, or one
(B, S, 3, H, D) buffer."""

Implementation = Literal["auto", "cuda", "jax"]

UNBOUNDED = -1
"""The value of `window_left` and `window_right` that means no limit on that side."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static options of one attention call, in canonical form.

    Query i sees key j where i + diagonal - window_left <= j and
    j <= i + diagonal + window_right; diagonal is Sk - Sq, or 0 when `top_left`.
    A causal mask is window_right == 0.
    """

    softmax_scale: float
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    top_left: bool = False
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    deterministic: bool = False
    packing: Packing = "none"

    @property
    def dropout(self) -> bool:
        """Whether the call drops probabilities (and takes Philox keys)."""
        return self.dropout_p > 0.0

    def diagonal(self, seqlen_q: int, seqlen_k: int) -> int:
        """The key index that query 0 is aligned with."""
        return 0 if self.top_left else seqlen_k - seqlen_q
