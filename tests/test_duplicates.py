import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.duplicates import content_hash, duplicates, perceptual_hash


def naive(keys, hashes, near, earlier):
    """By the definition: groups grown until nothing joins them."""
    count = len(keys)
    group = list(range(count))
    for a, b in itertools.product(range(count), repeat=2):
        alike = hashes[a].tolist() == hashes[b].tolist()
        alike |= near is not None and bin(int(near[a]) ^ int(near[b])).count("1") <= 3
        if alike and group[a] != group[b]:
            group = [group[a] if g == group[b] else g for g in group]
    gone = np.zeros(count, bool)
    for g in set(group):
        members = sorted((i for i in range(count) if group[i] == g), key=lambda i: (not earlier[i], keys[i]))
        gone[[i for i in members[1:] if not earlier[i]]] = True
    return gone


@settings(deadline=None)
@given(st.data(), st.integers(1, 30), st.booleans())
def test_groups_and_who_stays_are_as_defined(data, count, looks):
    keys = np.array(data.draw(st.permutations(range(count))), np.uint64)
    hashes = np.array(
        [[h, 0] for h in data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))], np.uint64
    )
    base = np.array([0, 2**63 + 5, 0x123456789ABCDEF0], np.uint64)
    flips = st.tuples(st.integers(0, 2), st.sets(st.integers(0, 63), max_size=5))
    chosen = data.draw(st.lists(flips, min_size=count, max_size=count))
    near = np.array([int(base[b]) ^ sum(1 << bit for bit in bits) for b, bits in chosen], np.uint64)
    earlier = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    near = near if looks else None
    assert duplicates(keys, hashes, near, earlier).tolist() == naive(keys, hashes, near, earlier).tolist()


def test_hashes_that_end_in_zero_bytes_are_told_apart():
    hashes = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], np.uint64)
    none = np.zeros(4, bool)
    assert duplicates(np.arange(4, dtype=np.uint64), hashes, None, none).tolist() == [False, False, False, True]


def test_a_popular_look_costs_no_more_than_its_members():
    count = 1_000_000  # in pairs that would be half a trillion
    hashes = np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.uint64)
    gone = duplicates(np.arange(count, dtype=np.uint64), hashes, np.zeros(count, np.uint64), np.zeros(count, bool))
    assert gone.sum() == count - 1
    assert not gone[0]


def test_more_bits_than_can_be_found_are_refused():
    with pytest.raises(ValueError, match="radius 4"):
        duplicates(np.zeros(1, np.uint64), np.zeros((1, 2), np.uint64), None, np.zeros(1, bool), 4)


def test_the_content_hash_of_pixels_knows_their_shape():
    pixels = np.arange(12, dtype=np.uint8)
    assert content_hash(pixels.reshape(3, 4, 1)) != content_hash(pixels.reshape(4, 3, 1))
    assert content_hash(b"a") != content_hash(b"b")
    assert len(content_hash(b"")) == len(content_hash(pixels)) == 16


def scene(seed):
    random = np.random.default_rng(seed)
    return cv2.resize(random.integers(0, 256, (5, 5, 3), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)


def distance(a, b):
    return bin(perceptual_hash(a) ^ perceptual_hash(b)).count("1")


def test_images_that_look_alike_hash_alike_and_others_do_not():
    recoded = []
    for seed in range(20):
        image = scene(seed)
        small = cv2.resize(image, (80, 60), interpolation=cv2.INTER_AREA)
        coded = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR)
        assert distance(image, small) <= 3
        recoded.append(distance(image, coded))
        assert distance(image, scene(seed + 100)) > 10
    assert sorted(recoded)[16] <= 3  # most: chroma at half the resolution shifts the grey of these gaudy ones


def test_images_of_one_colour_look_alike():
    assert {perceptual_hash(np.full((9, 7, 3), value, np.uint8)) for value in (0, 100, 255)} == {0}
