"""A small run of every kernel and feature, to be watched by compute-sanitizer.

    compute-sanitizer --tool memcheck python3 tests/stress/sanitizer.py
    compute-sanitizer --tool racecheck python3 tests/stress/sanitizer.py
    compute-sanitizer --tool racecheck python3 tests/stress/sanitizer.py 'fused|sm90:'

The last one makes only the calls in whose names it finds the expression.
Prints one line for each call, whose results are checked too; exits with 1 if any is
wrong. The oracle runs on the CPU, so that the sanitizer sees little but our kernels.
"""

import dataclasses
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.append(str(Path(__file__).resolve().parents[2]))

from jax_flash_attn import testing
from tests.support import calls, devices, kernel_cases, oracle, tile_table
from tests.support.cases import Case

PLAIN = Case("plain", "", batch=1, seqlen_q=150, seqlen_k=170, heads=2, heads_k=2)

EVERYTHING = {
    "heads": 4,
    "causal": True,
    "window_size": (90, -1),
    "softcap": 10.0,
    "alibi": "bh",
    "dropout_p": 0.2,
}

CASES = (
    *(
        dataclasses.replace(PLAIN, name=f"plain_{head_dim}", head_dim=head_dim)
        for head_dim in (40, 64, 128, 256)
    ),
    *(
        dataclasses.replace(
            PLAIN, name=f"everything_{head_dim}", head_dim=head_dim, **EVERYTHING
        )
        for head_dim in (40, 64, 128, 256)
    ),
    *(
        dataclasses.replace(PLAIN, name=f"gqa_{d}", head_dim=d, heads=6, causal=True)
        for d in (104, 200)
    ),
    dataclasses.replace(PLAIN, name="float16", dtype="float16", causal=True),
    dataclasses.replace(PLAIN, name="causal", causal=True),
    dataclasses.replace(PLAIN, name="window", window_size=(40, 20)),
    dataclasses.replace(PLAIN, name="softcap", softcap=10.0),
    dataclasses.replace(PLAIN, name="alibi", alibi="h"),
    dataclasses.replace(PLAIN, name="dropout", dropout_p=0.2),
    dataclasses.replace(PLAIN, name="gqa", heads=6),
    dataclasses.replace(PLAIN, name="mqa", heads=4, heads_k=1),
    dataclasses.replace(PLAIN, name="key_parts", seqlen_q=300, heads=16, heads_k=2),
    dataclasses.replace(PLAIN, name="query_parts", seqlen_q=400, causal=True),
    dataclasses.replace(PLAIN, name="query_parts_full", seqlen_q=400),
    dataclasses.replace(PLAIN, name="masked_rows", seqlen_k=60, causal=True),
    dataclasses.replace(PLAIN, name="one_query", seqlen_q=1),
    dataclasses.replace(PLAIN, name="one_key", seqlen_k=1),
)

MANY_HEADS = dataclasses.replace(PLAIN, name="many_ctas", heads=8, heads_k=8)

MANY_CTAS = (
    dataclasses.replace(MANY_HEADS, batch=10, seqlen_q=400, seqlen_k=400),
    dataclasses.replace(
        MANY_HEADS,
        name="many_ctas_causal",
        batch=6,
        seqlen_q=780,
        seqlen_k=800,
        causal=True,
    ),
)
"""Enough for warps that serve the rows of other heads, see tests/gpu."""


WHOLE_HEADS = (
    dataclasses.replace(MANY_CTAS[0], name="whole_heads", batch=18),
    dataclasses.replace(
        MANY_CTAS[1], name="whole_heads_causal", batch=18, seqlen_q=300, seqlen_k=330
    ),
)
"""More than there are CTAs that take whole heads."""


CHOSEN = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")


def check(name: str, case: Case, **options) -> bool | None:
    """Runs one call forward and backward and prints whether it is right."""
    if not CHOSEN.search(name):
        return None
    start = time.monotonic()
    try:
        results = calls.run(case, implementation="cuda", **options)
        oracle.check(results, oracle.expected(case))
    except AssertionError as error:
        print(f"{name:<40} WRONG: {error}", flush=True)
        return False
    print(f"{name:<40} ok in {time.monotonic() - start:.1f} s", flush=True)
    return True


def main() -> int:
    """Returns the exit status."""
    right = [check(case.name, case) for case in CASES]
    for case in CASES[:8]:
        right.append(check(f"{case.name}_deterministic", case, deterministic=True))
    square = {"seqlen_q": 170, "heads_k": 4, **EVERYTHING}
    packed = dataclasses.replace(PLAIN, name="packed", head_dim=40, **square)
    # Several query tiles for each CTA that stays on its multiprocessor.
    many = dataclasses.replace(PLAIN, name="many_tiles", batch=6, seqlen_q=700, heads=8)
    for masked in (False, True):
        right.append(
            check(f"many_tiles_{masked}", dataclasses.replace(many, causal=masked))
        )
    for packing in ("kv", "qkv"):
        right.append(check(f"{packing}_packed", packed, packing=packing))
    if devices.has_family("sm90"):
        with testing.override_tiles("backward", "sm80"):
            for case in CASES:
                right.append(check(f"{case.name}_sm80_backward", case))
        with testing.override_tiles("backward", "sm90"):
            for case in (*CASES, *MANY_CTAS):
                # Wider heads, and softcap beside dropout, are for the split form.
                if case.head_dim <= (96 if case.softcap else 128):
                    right.append(check(f"{case.name}_fused", case))
                if case.head_dim <= 64:
                    name = f"{case.name}_fused_in_order"
                    right.append(check(name, case, deterministic=True))
        with testing.override_tiles("backward", "sm90head"):
            for case in (*CASES, *WHOLE_HEADS):
                if kernel_cases.fits_head(case):
                    right.append(check(f"{case.name}_head", case))
        with testing.override_tiles("backward", "sm90cluster"):
            for case in CASES:
                for head_dim in (136, 256):
                    name = f"{case.name}_{head_dim}_cluster"
                    wide = dataclasses.replace(case, head_dim=head_dim)
                    right.append(check(name, wide))
    for row in tile_table.rows():
        if not devices.has_family(row.family):
            continue
        case = dataclasses.replace(PLAIN, name=str(row), head_dim=row.max_head_dim)
        with testing.override_tiles(row.operation, row.text):
            right.append(check(case.name, case))
    right = [result for result in right if result is not None]
    print(f"{sum(right)} of {len(right)} calls are right")
    return 0 if right and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
