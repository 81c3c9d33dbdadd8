"""How many workers may share a run, and what is said of numbers that cannot."""

import pytest

from pipeline.training.resources import Resources, sizes, span


@pytest.mark.parametrize(("workers", "expected"), [(0, (0, 0)), (4, (4, 4)), ("4", (4, 4)), ("2..8", (2, 8))])
def test_a_span_is_the_fewest_and_the_most(workers, expected):
    assert span(workers) == expected
    assert Resources(workers=workers).most == expected[1]


@pytest.mark.parametrize("workers", ["8..2", "0..4", "two", "2..", "-1", -1, "2...4", "1,2"])
def test_what_is_no_number_of_workers_is_named(workers):
    with pytest.raises(ValueError, match=r"workers .*2\.\.8"):
        Resources(workers=workers)


@pytest.mark.parametrize(
    ("workers", "micro_batches", "expected"),
    [("2..8", 8, [2, 4, 8]), ("1..6", 8, [1, 2, 4]), ("3..4", 64, [4]), (2, 8, [2]), (0, 2, [0])],
)
def test_elastic_sizes_divide_the_micro_batches(workers, micro_batches, expected):
    assert sizes(workers, micro_batches) == expected


@pytest.mark.parametrize(("workers", "micro_batches"), [("3..3", 4), ("5..7", 8), (3, 2)])
def test_workers_that_cannot_share_the_micro_batches_are_refused(workers, micro_batches):
    with pytest.raises(ValueError, match="cannot share"):
        sizes(workers, micro_batches)


@pytest.mark.parametrize(
    ("field", "value"),
    [("threads", -1), ("max_failures", -1), ("hang_seconds", 0), ("resize_seconds", -1.0), ("cache_gb", 0),
     ("device", "tpu")],
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} '?{value}"):
        Resources(**{field: value})
