"""The dropout mask, as a pure function of (key, batch, head, query, key index).

Every implementation draws the same bits: a JAX key becomes one Philox key per batch
entry and head, and one Philox call yields the four words of four score elements.
The elements (i, j), (i, j + 8), (i + 8, j) and (i + 8, j + 8) share a counter,
because one thread of a tensor-core tile owns all four.

Only elementwise integer operations occur, so the bits are the same under jit, vmap
and any sharding.
"""

import functools

import jax
import jax.numpy as jnp

Words = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""The four 32-bit words of a Philox counter or of its output."""

ROUNDS = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

_SUBTILE = 8
"""Rows, and columns, between two elements that share a counter."""

_TILE = 2 * _SUBTILE


def philox4x32_7(counter: Words, key: tuple[jax.Array, jax.Array]) -> Words:
    """Returns the four words that Philox4x32 draws in 7 rounds.

    Args:
        counter: four uint32 arrays that broadcast against each other.
        key: two uint32 arrays that broadcast against the counter.

    Returns:
        Four uint32 arrays.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    return _philox4x32(counter, key, ROUNDS)


def philox_keys(dropout_rng: jax.Array, batch: int, heads: int) -> jax.Array:
    """Returns one Philox key for each batch entry and head.

    The words of the JAX key are folded, two at a time, into one Philox key:
    key = philox4x32_7((word0, word1, 0, 0), key)[:2], from key (0, 0).
    Entry (b, h) is philox4x32_7((b, h, 0, 0), key)[:2].

    Args:
        dropout_rng: one JAX PRNG key, typed or raw, of any implementation.
        batch: number of batch entries.
        heads: number of query heads.

    Returns:
        uint32 array of shape (batch, heads, 2).

    Raises:
        TypeError: `dropout_rng` is neither a typed key nor an array of uint32.
        ValueError: `dropout_rng` holds more or less than one key.
    """
    words = _key_words(dropout_rng)
    zero = jnp.uint32(0)
    key = (zero, zero)
    for first in range(0, len(words), 2):
        pair = words[first : first + 2]
        second = pair[1] if len(pair) == 2 else zero
        key = philox4x32_7((pair[0], second, zero, zero), key)[:2]
    b = jax.lax.broadcasted_iota(jnp.uint32, (batch, heads), 0)
    h = jax.lax.broadcasted_iota(jnp.uint32, (batch, heads), 1)
    return jnp.stack(philox4x32_7((b, h, zero, zero), key)[:2], axis=-1)


def keep_mask(
    dropout_keys: jax.Array,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    *,
    row_start: int | jax.Array = 0,
    col_start: int | jax.Array = 0,
) -> jax.Array:
    """Returns which probabilities of a rectangle of the scores are kept.

    Element (i, j) reads word 2 * (i // 8 % 2) + j // 8 % 2 of counter
    (i // 16 * 8 + i % 8, j // 16 * 8 + j % 8, 0, 0), and is kept where
    word >= min(round(dropout_p * 2**32), 2**32 - 1).

    Args:
        dropout_keys: Philox keys, as `philox_keys` makes them; (B, H, 2) uint32.
        seqlen_q: number of rows of the rectangle.
        seqlen_k: number of columns of the rectangle.
        dropout_p: probability of dropping an element.
        row_start: first query index; a Python or a traced integer.
        col_start: first key index; a Python or a traced integer.

    Returns:
        bool array of shape (B, H, seqlen_q, seqlen_k); True keeps.
    """
    row_tile, num_row_tiles, row_offset = _covering_tiles(row_start, seqlen_q)
    col_tile, num_col_tiles, col_offset = _covering_tiles(col_start, seqlen_k)
    # As many axes as the result: JAX may be told to promote no ranks.
    unit = (1,) * (dropout_keys.ndim - 1)
    counter_rows = _counters(row_tile, num_row_tiles).reshape(*unit, -1, 1)
    counter_cols = _counters(col_tile, num_col_tiles).reshape(*unit, 1, -1)
    zero = jnp.uint32(0)
    key = (dropout_keys[..., 0, None, None], dropout_keys[..., 1, None, None])
    words = philox4x32_7((counter_rows, counter_cols, zero, zero), key)

    threshold = jnp.uint32(min(round(dropout_p * 2**32), 2**32 - 1))
    keep = _spread([word >= threshold for word in words], num_row_tiles, num_col_tiles)
    keep = jax.lax.dynamic_slice_in_dim(keep, row_offset, seqlen_q, axis=-2)
    return jax.lax.dynamic_slice_in_dim(keep, col_offset, seqlen_k, axis=-1)


def _spread(keep: list[jax.Array], num_row_tiles: int, num_col_tiles: int) -> jax.Array:
    """Brings the four decisions of each counter to their four elements.

    They travel as the bits of one integer: a concatenation of the four would make
    XLA compute Philox anew for every element of the result.
    """
    packed = functools.reduce(
        jnp.bitwise_or,
        [bit.astype(jnp.uint8) << jnp.uint8(n) for n, bit in enumerate(keep)],
    )
    lead = packed.shape[:-2]
    packed = packed.reshape(
        *lead, num_row_tiles, 1, _SUBTILE, num_col_tiles, 1, _SUBTILE
    )
    unit = (1,) * (len(lead) + 1)
    word = jax.lax.iota(jnp.uint8, 4).reshape(*unit, 2, 1, 1, 2, 1)
    bits = (packed >> word) & jnp.uint8(1)
    shape = (*lead, num_row_tiles * _TILE, num_col_tiles * _TILE)
    return bits.astype(jnp.bool_).reshape(shape)


def _philox4x32(counter: Words, key: tuple[jax.Array, jax.Array], rounds: int) -> Words:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for index in range(rounds):
        if index > 0:
            k0 = k0 + jnp.uint32(_WEYL[0])
            k1 = k1 + jnp.uint32(_WEYL[1])
        high0, low0 = _wide_product(c0, _MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _wide_product(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """High and low words of a * b, from 16-bit halves: JAX may lack 64-bit types."""
    half = jnp.uint32(16)
    mask = jnp.uint32(0xFFFF)
    b_high, b_low = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    a_high, a_low = a >> half, a & mask
    middle = a_high * b_low + ((a_low * b_low) >> half)
    carry = a_low * b_high + (middle & mask)
    high = a_high * b_high + (middle >> half) + (carry >> half)
    return high, a * jnp.uint32(b)


def _key_words(dropout_rng: jax.Array) -> list[jax.Array]:
    dtype = getattr(dropout_rng, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"dropout_rng must be a JAX PRNG key, got {type(dropout_rng).__name__}"
        )
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        num_keys_shape = dropout_rng.shape
        data = jax.random.key_data(dropout_rng)
    elif dtype == jnp.uint32:
        num_keys_shape = dropout_rng.shape[:-1]
        data = jnp.asarray(dropout_rng)
    else:
        raise TypeError(f"dropout_rng must be a JAX PRNG key, got dtype {dtype}")
    if num_keys_shape != () or data.ndim == 0:
        raise ValueError(
            "dropout_rng must be a single JAX PRNG key, "
            f"got shape {dropout_rng.shape} of dtype {dtype}"
        )
    words = data.reshape(-1)
    return [words[index] for index in range(words.shape[0])]


def _covering_tiles(
    start: int | jax.Array, length: int
) -> tuple[jax.Array, int, int | jax.Array]:
    """First tile, number of tiles and offset of `length` indices from `start`."""
    if isinstance(start, int):
        offset = start % _TILE
        num_tiles = -(-(offset + length) // _TILE)
        return jnp.uint32(start // _TILE), num_tiles, offset
    # A traced start may lie anywhere in its tile: one more tile covers them all.
    num_tiles = -(-length // _TILE) + 1
    start = start.astype(jnp.uint32)
    tile = jnp.uint32(_TILE)
    return start // tile, num_tiles, start % tile


def _counters(first_tile: jax.Array, num_tiles: int) -> jax.Array:
    index = jax.lax.iota(jnp.uint32, num_tiles * _SUBTILE)
    return first_tile * jnp.uint32(_SUBTILE) + index
