"""Counts by bin and by class, as a line of text and as HTML fragments whose bars are plain boxes."""

import itertools
from collections.abc import Mapping

import numpy as np

from pipeline.evaluation.markup import escaped, shown, table

BARS, TICKS = 64, 8  # more do not fit the width of a phone
LISTED_CLASSES = 30  # up to here a table holds every class; beyond, the ends of it
ENDS = 10
_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(edges: np.ndarray, counts: np.ndarray, bars: int = 24) -> str:
    """Counts as at most `bars` block letters, from the first bin that holds something to the last.

    edges: rising numbers (bins + 1,), evenly spaced or not; counts: integers (bins,). ValueError: other shapes.
    """
    _, counts = _cut(edges, counts, bars)
    heights = np.ceil(counts / max(counts.max(initial=0), 1) * len(_BLOCKS)).astype(int)
    return "".join(_BLOCKS[height - 1] if height else " " for height in heights)


def histogram(edges: np.ndarray, counts: np.ndarray, name: str, says: str) -> str:
    """One figure, `name` and `says` above it: bars of equal width, each a bin or a few neighbouring ones; arguments as
    `sparkline` takes them."""
    edges, counts = _cut(edges, counts, BARS)
    caption = _caption(name, says)
    if len(counts) < 2:  # one bar would say nothing
        return f'<figure class="plot">{caption}</figure>'
    spans = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)]
    hints = [f"{span}: {count:,}" for span, count in zip(spans, counts, strict=True)]
    ticks = ""
    for n in range(0, len(edges), -(-len(counts) // TICKS)):
        last = ' class="end"' if n == len(counts) else ""
        ticks += f'<span{last} style="left:{100 * n / len(counts):.1f}%">{edges[n]:g}</span>'
    bars = _bars(counts, hints, f"{name}: {says}")
    return f'<figure class="plot">{caption}{bars}<div class="ticks">{ticks}</div></figure>'


def class_counts(classes: list[str], splits: Mapping[str, list[int]]) -> str:
    """Samples by class, splits: {name: counts (classes,)} -> a table of all up to 30 classes, in their order; beyond
    that the sizes as bars, largest first, and tables of the ten largest and the ten smallest."""
    total = np.sum([np.asarray(counts) for counts in splits.values()], axis=0, dtype=np.int64)
    if len(classes) <= LISTED_CLASSES:
        return _class_table(classes, splits, total, range(len(classes)))
    order = np.argsort(-total, kind="stable")
    groups = np.array_split(order, min(len(order), 2 * BARS))
    heights = np.array([total[group].mean() for group in groups])
    hints = [
        f"{classes[group[0]]}: {total[group[0]]:,}"
        + (f" to {classes[group[-1]]}: {total[group[-1]]:,}" if len(group) > 1 else "")
        for group in groups
    ]
    says = f"largest {total.max():,}, median {shown(float(np.median(total)))}, smallest {total.min():,}"
    bars = _bars(heights, hints, f"Samples by class: {says}")
    figure = f'<figure class="plot">{_caption("samples by class, largest first", says)}{bars}</figure>'
    ends = (("Largest", order[:ENDS]), ("Smallest", order[::-1][:ENDS]))
    tables = (f"<div><h3>{head}</h3>{_class_table(classes, splits, total, rows)}</div>" for head, rows in ends)
    return f'{figure}<div class="plots">{"".join(tables)}</div>'


def _class_table(classes: list[str], splits: Mapping[str, list[int]], total: np.ndarray, labels) -> str:
    rows = [
        f'<tr><td class="name">{escaped(classes[label])}</td>'
        + "".join(f"<td>{counts[label]:,}</td>" for counts in splits.values())
        + f"<td>{total[label]:,}</td>"
        + f'<td class="meter"><i style="width:{100 * total[label] / max(total.max(), 1):.1f}%"></i></td></tr>'
        for label in labels
    ]
    return table(["class", *splits, "all", ""], rows)


def _cut(edges: np.ndarray, counts: np.ndarray, bars: int) -> tuple[np.ndarray, np.ndarray]:
    """Without the empty bins at both ends, neighbours added up until at most `bars` are left."""
    edges, counts = np.asarray(edges, np.float64), np.asarray(counts, np.int64)
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,):
        raise ValueError(f"edges of shape {edges.shape}, counts of {counts.shape}: pass one edge more than bins")
    held = np.flatnonzero(counts)
    if not len(held):
        return edges[:1], counts[:0]
    first, end = held[0], held[-1] + 1
    starts = np.arange(first, end, -(-(end - first) // bars))
    return edges[np.append(starts, end)], np.add.reduceat(counts[:end], starts)


def _bars(heights: np.ndarray, hints: list[str], label: str) -> str:
    top = max(heights.max(initial=0), 1)
    # A floor, so that one image in a million is still seen.
    boxes = "".join(
        f'<i style="height:{100 * max(height / top, 0.012) if height else 0:.1f}%" title="{escaped(hint)}"></i>'
        for height, hint in zip(heights, hints, strict=True)
    )
    return f'<div class="bars" role="img" aria-label="{escaped(label)}">{boxes}</div>'


def _caption(name: str, says: str) -> str:
    return f"<figcaption><b>{escaped(name)}</b> <small>{escaped(says)}</small></figcaption>"
