import time

import cv2
import numpy as np
import pytest
import simplejpeg

from pipeline.shards.duplicates import content_hash, duplicates, perceptual_hash


def scene(seed, width=500, height=375):
    """Coarse and fine structure, as photographs have."""
    random, pixels = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for side, weight in ((4, 1.0), (16, 0.4), (90, 0.15)):
        coarse = random.normal(0, 60 * weight, (side, side, 3)).astype(np.float32)
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (pixels + 128).clip(0, 255).astype(np.uint8)


def apart(a, b):
    return (a ^ b).bit_count()


def by_hand(keys, hashes, near, earlier, radius):
    """The definition, pair by pair."""
    group = list(range(len(keys)))
    for i in range(len(keys)):
        for j in range(i):
            alike = (hashes[i] == hashes[j]).all() or (near is not None and apart(int(near[i]), int(near[j])) <= radius)
            if alike and group[i] != group[j]:
                group = [group[j] if g == group[i] else g for g in group]
    best = {}
    for i, g in enumerate(group):
        best[g] = min(best.get(g, (True, 2**64, 0)), (not earlier[i], int(keys[i]), i))
    return [best[g][2] != i and not earlier[i] for i, g in enumerate(group)]


def test_the_content_hash_tells_files_and_arrays_apart_by_content_type_and_shape():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    others = [pixels.tobytes(), pixels.reshape(4, 2, 3), pixels.view(np.int8), pixels[::-1], b""]
    assert len({content_hash(raw) for raw in (pixels, *others)}) == 6
    assert content_hash(pixels) == content_hash(np.asfortranarray(pixels))
    assert content_hash(b"abc") == content_hash(bytearray(b"abc"))
    assert len(content_hash(b"")) == 16


def test_a_look_survives_what_people_do_to_pictures_and_tells_pictures_apart():
    looks = [perceptual_hash(scene(seed)) for seed in range(40)]
    assert min(apart(a, b) for i, a in enumerate(looks) for b in looks[:i]) > 12
    for seed, look in enumerate(looks):
        picture = scene(seed)
        small = cv2.resize(picture, (160, 120), interpolation=cv2.INTER_AREA)
        assert apart(look, perceptual_hash(small)) <= 3
        assert apart(look, perceptual_hash(simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(picture, 75)))) <= 3
        assert apart(look, perceptual_hash(picture[:, ::-1])) > 12
    grey = cv2.cvtColor(scene(0), cv2.COLOR_RGB2GRAY)[..., None]
    assert apart(looks[0], perceptual_hash(grey)) <= 3
    assert 0 <= perceptual_hash(scene(0, 1, 1)) < 2**64


def test_flat_images_look_the_same_if_their_colour_is_and_like_nothing_else():
    noise = np.random.default_rng(0).integers(0, 3, (40, 50, 3), dtype=np.uint8)
    shades = [perceptual_hash(np.full((40, 50, 1), grey, np.uint8)) for grey in (0, 64, 128, 255)]
    assert perceptual_hash(np.zeros((7, 9, 3), np.uint8)) == shades[0] == perceptual_hash(noise)
    flat = [*shades, perceptual_hash(np.full((40, 50, 3), (255, 0, 0), np.uint8)), perceptual_hash(scene(0))]
    assert min(apart(a, b) for i, a in enumerate(flat) for b in flat[:i]) > 12


def test_of_equal_content_the_smallest_key_stays_and_trailing_zeros_count():
    keys = np.array([5, 3, 9, 1, 2], np.uint64)
    hashes = np.frombuffer(b"a" * 16 + b"a" * 16 + b"a" + bytes(15) + b"a" + bytes(14) + b"\1" + bytes(16), "<u8")
    assert duplicates(keys, hashes.reshape(-1, 2)).tolist() == [True, False, False, False, False]


def test_what_is_in_the_dataset_already_always_stays():
    keys, same = np.arange(4, dtype=np.uint64), np.zeros((4, 2), np.uint64)
    earlier = np.array([False, False, True, True])
    assert duplicates(keys, same, None, earlier).tolist() == [True, True, False, False]
    distinct, near = np.arange(8, dtype=np.uint64).reshape(4, 2), np.array([0, 1, 3, 2**40 - 1], np.uint64)
    assert duplicates(keys, distinct, near, earlier).tolist() == [True, True, False, False]


@pytest.mark.parametrize("radius", [0, 1, 3, 6])
def test_groups_are_those_of_the_definition(radius):
    random = np.random.default_rng(radius)
    for count in (0, 1, 2, 60, 120):
        keys = random.permutation(count).astype(np.uint64)
        hashes = random.integers(0, 9, (count, 2)).astype(np.uint64) << np.uint64(60)
        near = random.integers(0, 2**64, 6, dtype=np.uint64)[random.integers(0, 6, count)]
        for _ in range(5):
            near = near ^ (np.uint64(1) << random.integers(0, 64, count).astype(np.uint64))
        earlier = random.random(count) < 0.1
        for looks in (None, near):
            expected = by_hand(keys, hashes, looks, earlier, radius)
            assert duplicates(keys, hashes, looks, earlier, radius).tolist() == expected


def test_every_pair_within_three_bits_is_found():
    random = np.random.default_rng(0)
    one = random.integers(0, 2**64, 5000, dtype=np.uint64)
    other = one.copy()
    for bit in random.permuted(np.tile(np.arange(64, dtype=np.uint64), (5000, 1)), axis=1)[:, :3].T:
        other ^= np.uint64(1) << bit
    near, keys = np.concatenate([one, other]), np.arange(10_000, dtype=np.uint64)
    distinct = np.arange(20_000, dtype=np.uint64).reshape(-1, 2)
    assert duplicates(keys, distinct, near).tolist() == [False] * 5000 + [True] * 5000
    assert not duplicates(keys, distinct, near, radius=2).any()


def test_crowds_of_equal_and_of_similar_looks_take_no_quadratic_time():
    random, count = np.random.default_rng(0), 400_000
    near = random.integers(0, 2**64, count, dtype=np.uint64)
    near[: count // 4] = 0  # black images
    near[count // 4 : count // 2] &= np.uint64(sum(1 << bit for bit in range(64) if bit % 6 > 2))  # half the bits alike
    hashes = random.integers(0, 2**64, (count, 2), dtype=np.uint64)
    start = time.perf_counter()
    repeated = duplicates(np.arange(count, dtype=np.uint64), hashes, near)
    assert time.perf_counter() - start < 12  # 0.5 s; comparing every pair of the crowd: half a minute
    assert repeated[1 : count // 4].all()
    assert not repeated[count // 2 :].any()


def test_a_million_samples_are_sorted_in_seconds():
    hashes = np.random.default_rng(0).integers(0, 2**64, (1_000_000, 2), dtype=np.uint64)
    hashes[1::2] = hashes[::2]
    start = time.perf_counter()
    repeated = duplicates(np.arange(1_000_000, dtype=np.uint64)[::-1].copy(), hashes)
    assert time.perf_counter() - start < 10  # 0.4 s
    assert repeated.tolist() == [True, False] * 500_000


def test_a_radius_that_would_take_different_pictures_for_the_same_is_refused():
    for radius in (-1, 9):
        with pytest.raises(ValueError, match=f"radius {radius}"):
            duplicates(np.zeros(1, np.uint64), np.zeros((1, 2), np.uint64), np.zeros(1, np.uint64), radius=radius)
