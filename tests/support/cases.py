"""Attention problems, each named for the edge that it owns."""

import dataclasses
from typing import Literal

import numpy as np

Alibi = Literal["none", "h", "bh"]
"""No ALiBi, slopes per head, or slopes per batch entry and head."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `flash_attn_func`: shapes, dtype and keyword arguments."""

    name: str
    reason: str
    batch: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 64
    heads: int = 2
    heads_k: int = 2
    head_dim: int = 64
    dtype: str = "bfloat16"
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Alibi = "none"
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name


def _case(name, reason, seqlens=(64, 64), heads=(2, 2), **options):
    return Case(
        name,
        reason,
        seqlen_q=seqlens[0],
        seqlen_k=seqlens[1],
        heads=heads[0],
        heads_k=heads[1],
        **options,
    )


_SHAPES = (
    _case("plain", "nothing but full tiles", (128, 128)),
    _case("one_query", "a single row", (1, 130)),
    _case("one_key", "softmax of one score", (130, 1)),
    _case("one_query_one_key", "the smallest problem", (1, 1)),
    _case("no_keys", "no row sees a key", (20, 0)),
    _case("no_queries", "nothing to compute", (0, 20)),
    _case("ragged_tail", "last tiles partly filled", (197, 211)),
    _case("one_past_tile", "last tiles hold one row", (129, 129), causal=True),
    _case("long_key", "many key tiles, few queries", (17, 1300), batch=1),
    _case("long_query", "many query tiles, few keys", (1300, 17), batch=1),
    _case("gqa", "four query heads share a key head", (72, 90), (8, 2)),
    _case("gqa_odd_group", "the group is no power of two", (40, 90), (6, 2)),
    _case("mqa", "all query heads share one key head", (72, 90), (4, 1)),
)

_MASKS = (
    _case("causal", "the diagonal tile", (150, 150), causal=True),
    _case("causal_more_keys", "bottom-right diagonal", (70, 150), causal=True),
    _case("fully_masked_rows", "the first rows see no key", (150, 70), causal=True),
    _case("causal_gqa", "mask and group", (100, 130), (4, 2), causal=True),
    _case("window_narrow", "narrower than any tile", (140, 140), window_size=(5, 3)),
    _case("window_own_key", "each row sees one key", (70, 70), window_size=(0, 0)),
    _case(
        "window_two_sided", "tiles cut on both sides", (200, 230), window_size=(70, 40)
    ),
    _case("window_left_only", "bounded on the left", (150, 190), window_size=(60, -1)),
    _case(
        "window_right_only", "bounded on the right", (190, 150), window_size=(-1, 20)
    ),
    _case(
        "window_causal", "both limits", (180, 180), causal=True, window_size=(48, -1)
    ),
    _case(
        "window_masks_rows", "rows past the last key", (200, 50), window_size=(16, 0)
    ),
    _case(
        "window_wider_than_keys",
        "a bound past the end",
        (40, 60),
        window_size=(999, 999),
    ),
)

_SCORES = (
    _case("softcap", "tanh and its derivative", (90, 110), softcap=15.0),
    _case(
        "softcap_saturated",
        "derivative near zero",
        (70, 70),
        softcap=1.0,
        softmax_scale=1.0,
    ),
    _case(
        "negative_scale", "the largest product has the least weight", softmax_scale=-0.2
    ),
    _case("zero_scale", "uniform weights, no gradient to q and k", softmax_scale=0.0),
    _case("large_logits", "exp overflows without the row maximum", softmax_scale=3.0),
    _case(
        "large_logits_many_keys",
        "the row maximum rises from key tile to key tile",
        (100, 700),
        softmax_scale=3.0,
    ),
    _case("alibi_h", "slopes per head", (90, 130), (4, 2), alibi="h"),
    _case("alibi_bh", "slopes per batch entry and head", (130, 90), (4, 2), alibi="bh"),
    _case("alibi_causal", "bias and mask", (130, 130), alibi="h", causal=True),
    _case(
        "dropout",
        "the mask is the same in forward and backward",
        (150, 170),
        dropout_p=0.2,
    ),
    _case("dropout_high", "few probabilities survive", (70, 70), dropout_p=0.9),
    _case(
        "dropout_causal",
        "mask before dropout",
        (140, 140),
        (4, 2),
        causal=True,
        dropout_p=0.1,
    ),
)

_HEAD_DIMS = tuple(
    _case(
        f"head_dim_{head_dim}",
        "padded or split inside the kernel",
        (70, 100),
        head_dim=head_dim,
        causal=True,
    )
    for head_dim in (8, 24, 32, 40, 72, 80, 96, 112, 128, 160, 192, 224, 256)
)

_EVERYTHING = {
    "heads": (4, 2),
    "head_dim": 72,
    "causal": True,
    "window_size": (90, -1),
    "softcap": 20.0,
    "alibi": "bh",
    "dropout_p": 0.15,
}

_TOGETHER = (
    _case(
        "many_tiles",
        "more query tiles than CTAs run at once",
        (300, 300),
        (32, 8),
        batch=4,
        causal=True,
    ),
    _case("float16", "the other dtype", (130, 150), dtype="float16"),
    _case(
        "float16_everything", "all at once", (150, 170), dtype="float16", **_EVERYTHING
    ),
    _case("everything", "all options at once", (150, 170), **_EVERYTHING),
    _case("everything_masked_rows", "rows with no key too", (170, 60), **_EVERYTHING),
)

CASES = _SHAPES + _MASKS + _SCORES + _HEAD_DIMS + _TOGETHER

BY_NAME = {case.name: case for case in CASES}

_RANDOM_HEAD_DIMS = (5, 8, 16, 24, 33, 40, 64, 80, 96, 128, 136, 160, 192, 256)


def random_cases(count, seed):
    """Returns `count` cases drawn over the whole argument space, small in size."""
    rng = np.random.default_rng(seed)
    return tuple(_random_case(rng, f"random_{seed}_{n}") for n in range(count))


def _random_case(rng, name):
    heads_k = int(rng.integers(1, 4))
    case = Case(
        name,
        "drawn at random",
        batch=int(rng.integers(1, 4)),
        seqlen_q=int(rng.integers(1, 300)),
        seqlen_k=int(rng.integers(1, 300)),
        heads=heads_k * int(rng.integers(1, 5)),
        heads_k=heads_k,
        head_dim=int(rng.choice(_RANDOM_HEAD_DIMS)),
        dtype=str(rng.choice(("bfloat16", "float16"))),
        softmax_scale=None if rng.integers(2) else float(rng.normal(0, 0.2)),
        causal=bool(rng.integers(2)),
        window_size=(_random_limit(rng), _random_limit(rng)),
        softcap=0.0 if rng.integers(2) else float(rng.uniform(1, 30)),
        alibi=str(rng.choice(("none", "h", "bh"))),
        dropout_p=float(rng.choice((0.0, 0.1, 0.5))),
    )
    # A lone key has the score gradient dprobs - delta = 0. With dropout, delta carries
    # the rounding of out, and the plain computation nothing to compare that with.
    if visible(case).sum(axis=1).max(initial=0) <= 1:
        case = dataclasses.replace(case, dropout_p=0.0)
    return case


def _random_limit(rng):
    return -1 if rng.integers(2) else int(rng.integers(0, 300))


def visible(case):
    """Returns which keys a case's queries see; (Sq, Sk)."""
    left, right = case.window_size
    right = 0 if case.causal else right
    offset = np.arange(case.seqlen_k) - np.arange(case.seqlen_q)[:, None]
    offset -= case.seqlen_k - case.seqlen_q
    seen = np.full(offset.shape, True)
    if left >= 0:
        seen &= offset >= -left
    if right >= 0:
        seen &= offset <= right
    return seen
