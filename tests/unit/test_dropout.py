"""The dropout mask: Philox's published words, the fold of a key, the counter layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn import dropout

WORD = 2**32 - 1


def philox(counter, key, rounds):
    """Philox4x32 in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


# Random123's kat_vectors.
PUBLISHED = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def as_words(values):
    return tuple(jnp.uint32(value) for value in values)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_ten_rounds_give_the_published_words(counter, key, words):
    drawn = dropout._philox4x32(as_words(counter), as_words(key), rounds=10)
    assert tuple(map(int, drawn)) == words
    assert philox(counter, key, rounds=10) == words


def test_seven_rounds_match_python_integers():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, (6, 20), dtype=np.uint32)
    values[:, 0], values[:, 1] = 0, WORD
    drawn = dropout.philox4x32_7(tuple(values[:4]), tuple(values[4:]))
    for n in range(values.shape[1]):
        counter, key = values[:4, n].tolist(), values[4:, n].tolist()
        assert tuple(int(word[n]) for word in drawn) == philox(counter, key, 7)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_fold_every_word_of_the_jax_key(impl):
    rng = jax.random.key(7, impl=impl)
    folded = (0, 0)
    words = jax.random.key_data(rng).tolist()
    for first in range(0, len(words), 2):
        folded = philox((*words[first : first + 2], 0, 0), folded, 7)[:2]
    keys = np.asarray(dropout.philox_keys(rng, 2, 3))
    assert keys.dtype == np.uint32
    for b in range(2):
        for h in range(3):
            assert tuple(keys[b, h]) == philox((b, h, 0, 0), folded, 7)[:2]


def test_raw_key_equals_typed_key():
    raw = jax.random.key_data(jax.random.key(3))
    np.testing.assert_array_equal(
        dropout.philox_keys(raw, 2, 2), dropout.philox_keys(jax.random.key(3), 2, 2)
    )


def test_vmap_over_keys_equals_loop():
    rngs = jax.random.split(jax.random.key(0), 3)
    mapped = jax.vmap(lambda rng: dropout.philox_keys(rng, 2, 2))(rngs)
    looped = jnp.stack([dropout.philox_keys(rng, 2, 2) for rng in rngs])
    np.testing.assert_array_equal(mapped, looped)


@pytest.mark.parametrize(
    ("rng", "error"),
    [
        (0, TypeError),
        (np.zeros(2, np.float32), TypeError),
        (np.uint32(0), ValueError),
        (np.zeros((3, 2), np.uint32), ValueError),
    ],
    ids=["int", "float", "scalar", "several_keys"],
)
def test_anything_but_one_key_is_an_error(rng, error):
    with pytest.raises(error, match="dropout_rng"):
        dropout.philox_keys(rng, 1, 1)


def test_several_typed_keys_are_an_error():
    with pytest.raises(ValueError, match="dropout_rng"):
        dropout.philox_keys(jax.random.split(jax.random.key(0)), 1, 1)


SEQLEN_Q, SEQLEN_K, DROPOUT_P = 41, 50, 0.3


@pytest.fixture(scope="module")
def keys():
    return dropout.philox_keys(jax.random.key(1), 2, 2)


@pytest.fixture(scope="module")
def mask(keys):
    return np.asarray(dropout.keep_mask(keys, SEQLEN_Q, SEQLEN_K, DROPOUT_P))


def test_mask_reads_the_word_of_each_element(keys, mask):
    threshold = round(DROPOUT_P * 2**32)
    assert mask.shape == (2, 2, SEQLEN_Q, SEQLEN_K)
    key = np.asarray(keys)[1, 0].tolist()
    for i in range(SEQLEN_Q):
        for j in range(SEQLEN_K):
            counter = (i // 16 * 8 + i % 8, j // 16 * 8 + j % 8, 0, 0)
            word = philox(counter, key, 7)[2 * (i // 8 % 2) + j // 8 % 2]
            assert mask[1, 0, i, j] == (word >= threshold)


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("start", [(0, 0), (16, 32), (5, 9), (31, 15)])
def test_any_rectangle_is_a_slice_of_the_whole(keys, mask, start, traced):
    row_start, col_start = start
    rows, cols = 10, 18
    if traced:
        row_start, col_start = jnp.int32(row_start), jnp.int32(col_start)
    tile = dropout.keep_mask(
        keys, rows, cols, DROPOUT_P, row_start=row_start, col_start=col_start
    )
    row, col = start
    np.testing.assert_array_equal(tile, mask[..., row : row + rows, col : col + cols])


def test_share_of_dropped_elements(keys):
    keep = np.asarray(dropout.keep_mask(keys, 256, 256, DROPOUT_P))
    deviation = np.sqrt(DROPOUT_P * (1 - DROPOUT_P) / keep.size)
    assert abs((~keep).mean() - DROPOUT_P) < 5 * deviation


def test_extreme_probabilities(keys):
    assert np.asarray(dropout.keep_mask(keys, 16, 16, 0.0)).all()
    assert not np.asarray(dropout.keep_mask(keys, 16, 16, 1.0)).any()
