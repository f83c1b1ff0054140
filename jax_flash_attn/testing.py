"""What tests, yours and ours, ask of a call."""

import contextlib
from collections.abc import Iterator

import jax

from jax_flash_attn import _arguments, _ffi, dropout


def dropout_keep_mask(
    dropout_rng: jax.Array,
    dropout_p: float,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
) -> jax.Array:
    """Returns the mask of the probabilities that a call with this key keeps.

    keep[b, h, i, j] is a function of the key, b, h, i and j alone.

    Args:
        dropout_rng: The PRNG key passed to the call.
        dropout_p: The share that is dropped, as passed to the call.
        batch: Batch of the call.
        heads: Query heads of the call.
        seqlen_q: Queries of the call.
        seqlen_k: Keys of the call.

    Returns:
        (batch, heads, seqlen_q, seqlen_k) bool, True where kept.

    Raises:
        ValueError: dropout_p is not in (0, 1), or a length is negative.
        TypeError: dropout_rng is not a PRNG key, or a length not an int that is known
            when the program is traced.

    Source: Philox4x32 with 7 rounds, Salmon et al. 2011 (docs/numerics.md).
    """
    p = _arguments.dropout_p(dropout_p, dropout_rng)
    batch = _arguments.length(batch, "batch")
    heads = _arguments.length(heads, "heads")
    seqlen_q = _arguments.length(seqlen_q, "seqlen_q")
    seqlen_k = _arguments.length(seqlen_k, "seqlen_k")
    keys = _arguments.dropout_keys(dropout_rng, p, batch, heads)
    if keys is None:
        raise ValueError("dropout_p must be above 0: nothing is dropped at 0.")
    return dropout.keep_mask(keys, seqlen_q, seqlen_k, p)


@contextlib.contextmanager
def override_tiles(operation: str, tiles: str) -> Iterator[None]:
    """Runs every call of an operation with the given kernels inside the context.

    Contexts nest: what one leaves is in force again as it was when it was entered.
    Programs that were compiled before take part: tiles are chosen when a call runs.
    But whether the backward of few heads splits their queries into parts is decided
    when a program is lowered, and it doesn't inside the context: what was lowered
    before with such parts, as `explain` says, is refused by "sm90head".

    Args:
        operation: "forward" or "backward".
        tiles: A kernel family, "sm80", "sm90" or for the backward "sm90split",
            "sm90head" or "sm90cluster", or one and the numbers of a row of its table,
            "sm80:128,64,4,4,2" (csrc/launchers/sm80_tiles.cc, sm90_tiles.cc).

    Yields:
        Nothing.

    Raises:
        ValueError: the operation, the family or the numbers are not of that form.
        TypeError: operation or tiles is not a str.
        RuntimeError: the native module is not there.

    Source: csrc/launchers/tile_override.h.
    """
    if _ffi.native is None:
        raise RuntimeError(_ffi.native_missing)
    if not _arguments.text(tiles, "tiles"):
        raise ValueError(
            "tiles must name a kernel family, such as 'sm80', got '': call without "
            "override_tiles for the tables' choice."
        )
    operation = _arguments.text(operation, "operation")
    replaced = _ffi.native.override_tiles(operation, tiles)
    try:
        yield
    finally:
        _ffi.native.override_tiles(operation, replaced)
