"""Named attention shapes and what each one costs.

Every FLOP and byte that a figure or a roof is made of is counted here. Self-attention
only: queries and keys have the same length.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

Mode = Literal["fwd", "bwd", "both"]
MODES: tuple[Mode, ...] = ("fwd", "bwd", "both")

UNBOUNDED = (-1, -1)
GRID_TOKENS = 16384
GRID_WIDTH = 2048

_SMOKE_PREFIX = "smoke"
_BACKWARD_FLOPS = 2.5  # five products of the forward's size, the forward has two
_LSE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention shape with its options, in flash-attn's terms.

    `window` is (left, right) in keys, -1 for no limit; `source` cites the paper or the
    model that the shape is taken from.
    """

    name: str
    batch: int
    seqlen: int
    heads: int
    heads_k: int
    head_dim: int
    causal: bool = False
    window: tuple[int, int] = UNBOUNDED
    dropout_p: float = 0.0
    softcap: float = 0.0
    alibi: bool = False
    source: str = ""

    @property
    def visible(self) -> tuple[int, int]:
        """The window with the causal mask in it, (left, right), -1 for no limit."""
        return (self.window[0], 0) if self.causal else self.window

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """Shape of q, out and their gradients."""
        return self.batch, self.seqlen, self.heads, self.head_dim

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """Shape of k, v and their gradients."""
        return self.batch, self.seqlen, self.heads_k, self.head_dim


def score_pairs(workload: Workload) -> float:
    """Returns how many (query, key) pairs one head computes.

    S^2, half of it under a causal mask (the convention of the FlashAttention papers,
    which leaves out the diagonal's half), the exact count under a window.
    """
    seqlen = workload.seqlen
    if workload.window == UNBOUNDED:
        return seqlen**2 / 2 if workload.causal else float(seqlen**2)
    left, right = (seqlen if side < 0 else side for side in workload.visible)
    return float(
        sum(min(seqlen - 1, i + right) - max(0, i - left) + 1 for i in range(seqlen))
    )


def flops(workload: Workload, mode: Mode) -> float:
    """Returns the floating-point operations of one call.

    4 B H D pairs forward, 2.5 times that backward, the sum for both. What the forward
    recomputes for the backward, and softmax, is not counted.
    """
    forward = (
        4.0
        * workload.batch
        * workload.heads
        * workload.head_dim
        * score_pairs(workload)
    )
    shares = {"fwd": 1.0, "bwd": _BACKWARD_FLOPS, "both": 1.0 + _BACKWARD_FLOPS}
    return forward * shares[mode]


def least_bytes(workload: Workload, mode: Mode, itemsize: int = 2) -> int:
    """Returns the bytes that any implementation has to move.

    Forward: q, k, v, out and lse, each once. Backward: those, and dout, dq, dk, dv.
    Both: the sum, since out and lse are written by one kernel and read by another.
    """
    tokens = workload.batch * workload.seqlen
    query = tokens * workload.heads * workload.head_dim * itemsize
    key = tokens * workload.heads_k * workload.head_dim * itemsize
    lse = tokens * workload.heads * _LSE_BYTES
    forward = 2 * query + 2 * key + lse
    backward = 4 * query + 4 * key + lse
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[mode]


def _square(
    kind: str, head_dim: int, seqlen: int, *, causal: bool, source: str, **fields: Any
) -> Workload:
    """A call of GRID_TOKENS tokens, GRID_WIDTH wide, or nearly so."""
    heads = GRID_WIDTH // head_dim
    return Workload(
        name=f"{kind}_s{seqlen}",
        batch=GRID_TOKENS // seqlen,
        seqlen=seqlen,
        heads=heads,
        heads_k=heads,
        head_dim=head_dim,
        causal=causal,
        source=source,
        **fields,
    )


def _by_mask(
    head_dim: int, seqlens: Sequence[int], source: str
) -> tuple[Workload, ...]:
    return tuple(
        _square(f"d{head_dim}_{mask}", head_dim, n, causal=causal, source=source)
        for mask, causal in (("full", False), ("causal", True))
        for n in seqlens
    )


def _grid() -> tuple[Workload, ...]:
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    source = "FlashAttention-3, arXiv:2407.08608, section 4.1"
    return tuple(
        workload
        for head_dim in (64, 128, 256)
        for workload in _by_mask(head_dim, lengths, source)
    )


def _other_widths() -> tuple[Workload, ...]:
    return (
        *_by_mask(96, (4096,), "Phi-3-mini's heads, arXiv:2404.14219"),
        *_by_mask(192, (4096,), "DeepSeek-V2's query heads, arXiv:2405.04434"),
    )


def _features() -> tuple[Workload, ...]:
    short = ((128, 2048), (64, 2048))
    options: dict[str, tuple[dict, str, tuple[tuple[int, int], ...]]] = {
        "dropout": (
            {"dropout_p": 0.1},
            "GPT-2's attn_pdrop; Radford et al. 2019",
            short,
        ),
        "alibi": ({"alibi": True}, "ALiBi, arXiv:2108.12409", short),
        "window": (
            {"window": (1024, -1)},
            "Gemma 3's local layers, arXiv:2503.19786",
            (*short, (128, 16384)),
        ),
        "softcap": (
            {"softcap": 30.0},
            "Grok-1's attention logits, xai-org/grok-1",
            short,
        ),
    }
    return tuple(
        _square(f"{feature}_d{d}", d, n, causal=True, source=source, **fields)
        for feature, (fields, source, sizes) in options.items()
        for d, n in sizes
    )


def _models() -> tuple[Workload, ...]:
    llama = "Llama 3 8B, arXiv:2407.21783, table 3"
    bert = "BERT-large, arXiv:1810.04805"
    gpt2 = "GPT-2 124M, Radford et al. 2019"
    return (
        Workload("gqa_llama3_s2048", 8, 2048, 32, 8, 128, causal=True, source=llama),
        Workload("gqa_llama3_s8192", 2, 8192, 32, 8, 128, causal=True, source=llama),
        Workload("bert_large", 32, 512, 16, 16, 64, source=bert),
        Workload("bert_large_dropout", 32, 512, 16, 16, 64, dropout_p=0.1, source=bert),
        Workload("gpt2", 16, 1024, 12, 12, 64, causal=True, source=gpt2),
        Workload(
            "gpt2_dropout", 16, 1024, 12, 12, 64, True, dropout_p=0.1, source=gpt2
        ),
    )


def _one_sequence() -> tuple[Workload, ...]:
    llama = "Llama 3 {}, arXiv:2407.21783, table 3, heads split over {} GPUs"
    large, small = llama.format("70B", 8), llama.format("8B", 2)
    llama2 = "Llama 2 7B, arXiv:2307.09288, heads split over two GPUs"
    opt = "OPT-1.3B, arXiv:2205.01068, table 1"
    gemma = "Gemma 7B, arXiv:2403.08295, table 1, heads split over two GPUs"
    return (
        Workload("one_llama3_70b_s4096", 1, 4096, 8, 1, 128, causal=True, source=large),
        Workload("one_llama3_70b_s8192", 1, 8192, 8, 1, 128, causal=True, source=large),
        Workload("one_llama3_8b_s2048", 1, 2048, 16, 4, 128, causal=True, source=small),
        Workload("one_llama3_8b_s4096", 1, 4096, 16, 4, 128, causal=True, source=small),
        Workload("one_opt_s1024", 1, 1024, 32, 32, 64, causal=True, source=opt),
        Workload("one_llama2_s1024", 1, 1024, 16, 16, 128, causal=True, source=llama2),
        Workload("one_llama2_s2048", 1, 2048, 16, 16, 128, causal=True, source=llama2),
        Workload("one_llama2_s4096", 1, 4096, 16, 16, 128, causal=True, source=llama2),
        Workload("one_gemma_s1024", 1, 1024, 8, 8, 256, causal=True, source=gemma),
        Workload("one_gemma_s2048", 1, 2048, 8, 8, 256, causal=True, source=gemma),
    )


def _smoke() -> tuple[Workload, ...]:
    source = "none: small enough to try the harness on a CPU"
    return (
        Workload(f"{_SMOKE_PREFIX}_full", 1, 128, 2, 2, 64, source=source),
        Workload(f"{_SMOKE_PREFIX}_causal", 1, 128, 4, 2, 64, True, source=source),
        Workload(
            f"{_SMOKE_PREFIX}_features",
            2,
            64,
            2,
            2,
            64,
            True,
            window=(32, -1),
            dropout_p=0.1,
            softcap=30.0,
            alibi=True,
            source=source,
        ),
    )


WORKLOADS = (
    *_grid(),
    *_other_widths(),
    *_features(),
    *_models(),
    *_one_sequence(),
    *_smoke(),
)


def select(pattern: str | None) -> tuple[Workload, ...]:
    """Returns the workloads whose name matches a regular expression.

    Args:
        pattern: searched for in the name; None takes all but the smoke workloads.

    Raises:
        ValueError: nothing matches.
    """
    if pattern is None:
        return tuple(w for w in WORKLOADS if not w.name.startswith(_SMOKE_PREFIX))
    chosen = tuple(w for w in WORKLOADS if re.search(pattern, w.name))
    if not chosen:
        raise ValueError(f"no workload's name matches {pattern!r}")
    return chosen
