import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from pipeline.evaluation.classification import score

CLASSES = ["cat", "dog", "owl"]


def arrays(seed: int, samples: int, classes: int):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, samples)
    predicted = np.where(random.random(samples) < 0.7, labels, random.integers(0, classes, samples))
    return labels, predicted, random.random(samples)


def test_the_numbers_are_those_worked_out_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 1, 0])
    result = score(labels, predicted, np.ones(6), CLASSES)
    assert result["samples"] == 6
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    cat, dog, owl = result["per_class"]
    assert cat == {"name": "cat", "precision": 2 / 3, "recall": 2 / 3, "f1": pytest.approx(2 / 3), "support": 3}
    assert dog == {"name": "dog", "precision": 2 / 3, "recall": 1.0, "f1": pytest.approx(0.8), "support": 2}
    assert owl == {"name": "owl", "precision": None, "recall": 0.0, "f1": 0.0, "support": 1}
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert result["expected_calibration_error"] == pytest.approx(1 - 4 / 6)


def test_the_interval_is_wilsons():
    correct, n, z = 81, 263, 1.959963984540054
    labels = np.zeros(n, int)
    predicted = np.r_[np.zeros(correct, int), np.ones(n - correct, int)]
    share = correct / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert score(labels, predicted, np.ones(n), CLASSES)["accuracy_ci95"] == pytest.approx(
        [centre - half, centre + half]
    )


def test_the_interval_stays_inside_zero_and_one_when_every_answer_is_right():
    low, high = score(np.zeros(10, int), np.zeros(10, int), np.ones(10), CLASSES)["accuracy_ci95"]
    assert 0.69 < low < 0.73
    assert high == 1.0


def test_calibration_error_weighs_each_bin_by_its_samples():
    # Bin (12/15, 13/15]: four at 0.85, two right -> gap 0.35. Bin (3/15, 4/15]: one at 0.25, right -> gap 0.75.
    labels = np.array([0, 0, 0, 0, 0])
    predicted = np.array([0, 0, 1, 1, 0])
    confidence = np.array([0.85, 0.85, 0.85, 0.85, 0.25])
    error = score(labels, predicted, confidence, CLASSES)["expected_calibration_error"]
    assert error == pytest.approx((4 * 0.35 + 1 * 0.75) / 5)


def test_a_bin_owns_its_upper_edge():
    # 0.2 closes the bin (2/15, 3/15] and 0.201 opens the next: in one bin together their gaps would cancel.
    labels, predicted = np.array([0, 0]), np.array([0, 1])
    error = score(labels, predicted, np.array([0.2, 0.201]), CLASSES)["expected_calibration_error"]
    assert error == pytest.approx((0.8 + 0.201) / 2)


def test_confidence_zero_and_one_fall_in_the_outer_bins():
    labels, predicted = np.array([0, 0]), np.array([1, 0])
    assert score(labels, predicted, np.array([0.0, 1.0]), CLASSES)["expected_calibration_error"] == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), samples=st.integers(1, 200), classes=st.integers(1, 12))
def test_it_agrees_with_scikit_learn_and_is_json(seed, samples, classes):
    labels, predicted, confidence = arrays(seed, samples, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = score(labels, predicted, confidence, [f"c{n}" for n in range(classes)])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    precisions = precision_score(labels, predicted, labels=range(classes), average=None, zero_division=0)
    recalls = recall_score(labels, predicted, labels=range(classes), average=None, zero_division=0)
    assert [row["precision"] or 0 for row in result["per_class"]] == pytest.approx(list(precisions))
    assert [row["recall"] or 0 for row in result["per_class"]] == pytest.approx(list(recalls))
    if classes > 1:
        assert result["confusion"] == confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    assert [row["support"] for row in result["per_class"]] == np.sum(result["confusion"], axis=1).tolist()
    low, high = result["accuracy_ci95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert 0 <= result["expected_calibration_error"] <= 1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), samples=st.integers(2, 60))
def test_the_order_of_the_samples_does_not_matter(seed, samples):
    labels, predicted, confidence = arrays(seed, samples, 3)
    shuffled = np.random.default_rng(seed).permutation(samples)
    one = score(labels, predicted, confidence, CLASSES)
    other = score(labels[shuffled], predicted[shuffled], confidence[shuffled], CLASSES)
    assert other.pop("expected_calibration_error") == pytest.approx(one.pop("expected_calibration_error"))
    assert other == one


def test_a_class_without_samples_has_null_where_nothing_can_be_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = score(np.array([0, 0]), np.array([0, 1]), np.array([0.9, 0.6]), CLASSES)
    _, dog, owl = result["per_class"]
    assert dog == {"name": "dog", "precision": 0.0, "recall": None, "f1": 0.0, "support": 0}
    assert owl == {"name": "owl", "precision": None, "recall": None, "f1": None, "support": 0}
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_integers_of_any_width_count_alike():
    labels, predicted, confidence = arrays(0, 50, 3)
    expected = score(labels, predicted, confidence, CLASSES)
    assert score(labels.astype(np.uint8), predicted.astype(np.int32), confidence, CLASSES) == expected


def test_a_softmax_one_rounding_above_one_is_forgiven():
    result = score(np.array([0]), np.array([0]), np.array([1.0000001], np.float32), CLASSES)
    assert result["expected_calibration_error"] == 0


@pytest.mark.parametrize(
    ("labels", "predicted", "confidence", "says"),
    [
        ([0, 1], [0], [0.5, 0.5], "2 labels, 1 predicted"),
        ([0, 1], [0, 1], [0.5], "1 confidence"),
        ([0, 3], [0, 1], [0.5, 0.5], r"labels\[1\] is 3"),
        ([0, 1], [0, -1], [0.5, 0.5], r"predicted\[1\] is -1"),
        ([0, 1], [0, 1], [0.5, np.nan], r"confidence\[1\] is nan"),
        ([0, 1], [0, 1], [1.5, 0.5], r"confidence\[0\] is 1.5"),
        ([0.0, 1.0], [0, 1], [0.5, 0.5], "labels is float64"),
        ([[0], [1]], [0, 1], [0.5, 0.5], r"shape \(2, 1\)"),
        ([], [], [], r"shape \(0,\)"),
    ],
)
def test_bad_input_is_refused_by_name(labels, predicted, confidence, says):
    with pytest.raises(ValueError, match=says):
        score(np.array(labels), np.array(predicted), np.array(confidence), CLASSES)
