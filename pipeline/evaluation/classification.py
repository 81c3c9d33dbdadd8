"""How good a classifier's answers are, from arrays of labels, answers and confidences."""

import numpy as np

BINS = 15


def score(labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, classes: list[str]) -> dict:
    """Everything the report and the gate ask of a classifier, ready for `json.dumps`.

    labels, predicted: integers of shape (n,), n >= 1, indices into `classes`. confidence: floats of shape (n,), the
    probability given to `predicted`, in [0, 1].

    Returns samples, accuracy, accuracy_ci95 [low, high] (Wilson 1927), macro_f1, per_class [{name, precision, recall,
    f1, support}], confusion (rows true, columns predicted) and expected_calibration_error (Guo et al. 2017, 15 bins).
    What a class leaves undefined is None: recall without samples, precision when it is never predicted, F1 when
    neither. macro_f1 is the mean of the F1 values that are defined, which is scikit-learn's own choice of classes.

    Raises ValueError for arrays that are empty, of differing length or of the wrong kind, for a label or an answer
    outside `classes`, and for a confidence outside [0, 1] or NaN.
    """
    from scipy.stats import binomtest
    from sklearn.metrics import precision_recall_fscore_support

    labels, predicted = _indices("labels", labels, classes), _indices("predicted", predicted, classes)
    confidence = _probabilities(confidence)
    if not len(labels) == len(predicted) == len(confidence):
        lengths = f"{len(labels)} labels, {len(predicted)} predicted, {len(confidence)} confidence"
        raise ValueError(f"{lengths}: pass one of each a sample")

    every = np.arange(len(classes))
    # Counted here: scikit-learn's confusion_matrix warns when there is but one class.
    confusion = np.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2)
    correct = labels == predicted
    interval = binomtest(int(correct.sum()), len(labels)).proportion_ci(0.95, method="wilson")
    columns = precision_recall_fscore_support(labels, predicted, labels=every, average=None, zero_division=np.nan)
    table = [
        {
            "name": str(name),
            "precision": _defined(precision),
            "recall": _defined(recall),
            "f1": _defined(f1),
            "support": int(support),
        }
        for name, precision, recall, f1, support in zip(classes, *columns, strict=True)
    ]
    return {
        "samples": len(labels),
        "accuracy": float(correct.mean()),
        "accuracy_ci95": [float(interval.low), float(interval.high)],
        "macro_f1": float(np.nanmean(columns[2])),
        "per_class": table,
        "confusion": confusion.reshape(len(classes), -1).tolist(),
        "expected_calibration_error": _calibration_error(correct, confidence),
    }


def _calibration_error(correct: np.ndarray, confidence: np.ndarray) -> float:
    """Guo et al. 2017, equation 3: the mean gap between confidence and accuracy, bins (0, 1/15], (1/15, 2/15] ..."""
    which = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    gaps = np.bincount(which, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(correct))


def _indices(name: str, values: np.ndarray, classes: list[str]) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}: pass integers of shape (n,), n >= 1")
    outside = np.flatnonzero((values < 0) | (values >= len(classes)))
    if len(outside):
        at = outside[0]
        raise ValueError(f"{name}[{at}] is {values[at]}, outside the {len(classes)} classes 0 to {len(classes) - 1}")
    # Signed and wide, so that uint8 labels and int64 answers compare and count alike.
    return values.astype(np.int64)


def _probabilities(confidence: np.ndarray) -> np.ndarray:
    confidence = np.asarray(confidence)
    if confidence.ndim != 1 or confidence.dtype.kind not in "fiu":
        raise ValueError(f"confidence is {confidence.dtype} of shape {confidence.shape}: pass floats of shape (n,)")
    confidence = confidence.astype(np.float64)
    # A float32 softmax can land a rounding step above 1; anything further is not a probability.
    outside = np.flatnonzero(~((confidence >= 0) & (confidence <= 1 + 1e-6)))
    if len(outside):
        at = outside[0]
        raise ValueError(f"confidence[{at}] is {confidence[at]}: pass probabilities, from 0 to 1")
    return np.minimum(confidence, 1.0)


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
