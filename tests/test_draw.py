"""A draw is a function of its key: uniform, independent of its neighbours, the same forever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import draw

words = st.integers(-(2**63), 2**63 - 1)


def test_a_stored_seed_means_the_same_forever():
    why = "draws have changed: stored seeds would give other orders, crops and weights"
    assert int(draw.bits(0)) == 16294208416658607535, why  # the first number of SplitMix64 seeded with 0
    assert int(draw.bits(1)) == 10451216379200822465, why
    assert int(draw.bits(0, 0)) == 12035550249420947055, why
    assert int(draw.bits(1, 2, 3)) == 7702586659592502839, why
    assert float(draw.uniform(5)) == 0.386768045983934, why
    assert draw.permutation(8, 1).tolist() == [6, 7, 0, 5, 1, 3, 2, 4], why
    assert draw.text_bits("a") == 3405396810240292928, why


@given(st.lists(words, min_size=1, max_size=4), st.integers(1, 20))
def test_words_broadcast_as_if_drawn_one_by_one(key, n):
    together = draw.bits(*key, np.arange(n), key[0])
    assert together.dtype == np.uint64
    assert together.tolist() == [int(draw.bits(*key, i, key[0])) for i in range(n)]
    rows, columns = np.arange(n)[:, None], np.arange(3)
    table = draw.uniform(*key, rows, columns)
    assert table.shape == (n, 3)
    assert float(table[n - 1, 2]) == float(draw.uniform(*key, n - 1, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64, np.uint32])
def test_the_type_a_word_comes_in_does_not_matter(dtype):
    assert draw.bits(3, np.arange(50, dtype=dtype)).tolist() == [int(draw.bits(3, i)) for i in range(50)]


@given(st.lists(words, min_size=2, max_size=4, unique=True))
def test_the_order_and_the_number_of_words_matter(key):
    assert int(draw.bits(*key)) != int(draw.bits(*key[::-1]))
    assert int(draw.bits(*key)) != int(draw.bits(*key, 0))


def test_uniforms_fill_the_unit_interval_evenly():
    drawn = draw.uniform(17, np.arange(1_000_000))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn * 1000).astype(int), minlength=1000)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 800 < chi_square < 1200  # 999 degrees of freedom: four and a half deviations either way


def test_every_bit_is_fair_and_flips_with_every_bit_of_the_key():
    keys = np.arange(20_000)
    drawn = draw.bits(5, keys)
    ones = np.array([((drawn >> np.uint64(b)) & np.uint64(1)).mean() for b in range(64)])
    assert np.abs(ones - 0.5).max() < 0.02
    for flipped in (0, 1, 17, 40):
        changed = drawn ^ draw.bits(5, keys ^ (1 << flipped))
        rates = np.array([((changed >> np.uint64(b)) & np.uint64(1)).mean() for b in range(64)])
        assert np.abs(rates - 0.5).max() < 0.02


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbouring_keys_are_uncorrelated(axis):
    table = draw.uniform(np.arange(1000)[:, None], np.arange(1000))
    first, second = np.take(table, range(999), axis).ravel(), np.take(table, range(1, 1000), axis).ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.005


@given(st.integers(0, 3000), words)
def test_a_permutation_is_one(n, word):
    assert np.array_equal(np.sort(draw.permutation(n, word)), np.arange(n))


def test_permutations_are_drawn_evenly():
    seen = {}
    for seed in range(6000):
        key = tuple(draw.permutation(3, seed))
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 6
    assert all(850 < count < 1150 for count in seen.values())


def test_text_becomes_64_bits_whatever_it_holds():
    texts = ["", "a", "b", "ä", "\udcff", "order/rows", "order/rows "]
    bits = {draw.text_bits(text) for text in texts}
    assert len(bits) == len(texts)
    assert all(0 <= b < 2**64 for b in bits)
