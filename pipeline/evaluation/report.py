"""What a run learned, as HTML fragments; `page` puts them into one file that opens anywhere.

    page("Digits", "run 12", [("", headline(tiles)), ("Training", curves(rows, validations)), ...])

No fragment has a script or reaches for the network, and every name a user chose is escaped.
"""

import numpy as np

from pipeline.evaluation.curves import curves
from pipeline.evaluation.markup import boxed, escaped, facts, headline, page, shown, table
from pipeline.evaluation.pictures import data_url, fit, grid, inline, png, rgb

__all__ = [
    "confusion_matrix",
    "curves",
    "facts",
    "goodput",
    "grid",
    "headline",
    "image_grid",
    "page",
    "per_class",
    "png",
    "sample_predictions",
]

# Up to here a reader can follow a row by eye; beyond, colours show the pattern and a table names the worst.
NUMBERED_CLASSES = 30
PAIRS = 20
THUMBNAIL = 128


def confusion_matrix(matrix: list[list[int]] | np.ndarray, classes: list[str]) -> str:
    """Counts of shape (classes, classes), rows true, columns predicted -> a table of numbers up to 30 classes, beyond
    that a picture and the most confused pairs. Colour is the share of the true class: blue right, red wrong.

    Raises ValueError when the shape does not fit the classes.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"a confusion matrix of shape {counts.shape} for {len(classes)} classes: pass one row a class")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    note = '<p class="note">Rows are the true class, columns the predicted one; colour is the share of the row.</p>'
    if len(classes) <= NUMBERED_CLASSES:
        return note + _numbered(counts, share, classes)
    heat = np.zeros((*counts.shape, 4), np.uint8)
    right = np.eye(len(classes), dtype=bool)
    heat[..., :3] = np.where(right[..., None], (58, 118, 245), (228, 84, 48))
    # A floor and a root, so that one confusion in a hundred is still seen; transparent suits either background.
    heat[..., 3] = np.where(counts > 0, np.round(255 * (0.3 + 0.7 * np.sqrt(share))), 0)
    # One pixel a class at least: squeezed further, a browser would leave out lines.
    size = f' style="width:{len(classes)}px;max-width:none"' if len(classes) > 576 else ""
    wrong = int(counts.sum() - counts.trace())
    alt = f"Confusion matrix of {len(classes)} classes, {wrong:,} of {int(counts.sum()):,} samples off the diagonal"
    picture = f'<div class="box"><img class="heat pixels"{size} src="{data_url(heat)}" alt="{alt}"></div>'
    return note + picture + "<h3>Most confused</h3>" + _confused_pairs(counts, share, classes)


def _numbered(counts: np.ndarray, share: np.ndarray, classes: list[str]) -> str:
    tall = ' class="tall"' if max((len(str(name)) for name in classes), default=0) > 3 else ""
    head = "".join(f'<th scope="col"{tall}><span>{escaped(name)}</span></th>' for name in classes)
    rows = []
    for i, name in enumerate(classes):
        cells = []
        for j, (count, part) in enumerate(zip(counts[i], share[i], strict=True)):
            hint = escaped(f"true {name}, predicted {classes[j]}: {count} ({part:.1%})")
            tone = "zero" if not count else "deep" if part > 0.6 else ""
            colour = f"rgb(var(--{'accent' if i == j else 'wrong'}) / {np.sqrt(part):.2f})" if count else "none"
            cells.append(f'<td class="{tone}" style="background:{colour}" title="{hint}">{count:,}</td>')
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{"".join(cells)}</tr>')
    corner = "<th>true ↓ predicted →</th>"
    return boxed(f"<tr>{corner}{head}</tr>", rows, "confusion")


def _confused_pairs(counts: np.ndarray, share: np.ndarray, classes: list[str]) -> str:
    off = counts * ~np.eye(len(classes), dtype=bool)
    worst = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    rows = [
        f'<tr><td class="name">{escaped(classes[i])}</td><td class="name">{escaped(classes[j])}</td>'
        f"<td>{off[i, j]:,}</td><td>{share[i, j]:.1%}</td></tr>"
        for i, j in zip(*np.unravel_index(worst, off.shape), strict=True)
        if off[i, j]
    ]
    if not rows:
        return '<p class="note">No sample was confused.</p>'
    return table(["true", "predicted", "samples", "of the true class"], rows)


def goodput(summary: dict) -> str:
    """What `training.ledger.summary` says of a run -> tiles, and a table of where its seconds went."""
    tiles = [
        ("goodput", f"{summary['goodput']:.1%}"),
        ("images/s, over all", f"{summary['images_per_second']:,.0f}"),
        ("images/s, training", f"{summary['rate']:,.0f}"),
        ("starts", summary["attempts"]),
        ("samples drawn again", summary["wasted_samples"]),
    ]
    if "gpu_memory_bytes" in summary:
        tiles.append(("GPU memory", f"{summary['gpu_memory_bytes'] / 1e9:.1f} GB"))
    rows = [
        f'<tr><td class="name">{escaped(kind)}</td><td>{seconds:,.1f}</td>'
        f'<td class="meter"><i style="width:{100 * seconds / summary["wall"]:.0f}%"></i></td>'
        f"<td>{seconds / summary['wall']:.1%}</td></tr>"
        for kind, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1])
    ]
    return headline(tiles) + "<h3>Where the time went</h3>" + table(["", "seconds", "", "of all"], rows)


def per_class(scores: list[dict]) -> str:
    """`score(...)["per_class"]` -> a table, the lowest F1 first, classes without one last."""
    ordered = sorted(scores, key=lambda row: (row["f1"] is None, row["f1"] or 0.0))
    rows = [
        f'<tr><td class="name">{escaped(row["name"])}</td>'
        + "".join(f"<td>{_rate(row[column])}</td>" for column in ("precision", "recall", "f1"))
        + f'<td class="meter"><i style="width:{100 * (row["f1"] or 0):.0f}%"></i></td>'
        + f"<td>{shown(row['support'])}</td></tr>"
        for row in ordered
    ]
    return table(["class", "precision", "recall", "F1", "", "samples"], rows)


def sample_predictions(
    images: list[np.ndarray],
    labels: np.ndarray,
    predicted: np.ndarray,
    confidence: np.ndarray,
    classes: list[str],
    limit: int = 24,
) -> str:
    """Two galleries of at most `limit`: wrong answers, the surest first, and right ones, the least sure first.

    images: n of uint8 (h, w), (h, w, 1) or (h, w, 3), any sizes. labels, predicted: integers (n,). confidence: floats
    (n,). Raises ValueError for differing lengths or a wrong image.
    """
    labels, predicted, confidence = np.asarray(labels), np.asarray(predicted), np.asarray(confidence, np.float64)
    if len({len(images), len(labels), len(predicted), len(confidence)}) > 1:
        lengths = (
            f"{len(images)} images, {len(labels)} labels, {len(predicted)} predicted, {len(confidence)} confidence"
        )
        raise ValueError(f"{lengths}: pass one of each a sample")
    wrong, right = np.flatnonzero(labels != predicted), np.flatnonzero(labels == predicted)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    right = right[np.argsort(confidence[right], kind="stable")]
    galleries = []
    for title, chosen, kind in (("Wrong, surest first", wrong, "wrong"), ("Right, least sure first", right, "right")):
        figures = []
        for n in chosen[:limit]:
            true, answer = classes[labels[n]], classes[predicted[n]]
            pixels = fit(rgb(images[n]), THUMBNAIL)
            # Few pixels are magnified, and should then look like pixels; a photo should not.
            look = "pixels" if max(pixels.shape) <= 64 else "photo"
            image = inline(pixels, f"true {true}, predicted {answer}", look)
            caption = f"<b>{escaped(f'{true} → {answer}')}</b> <small>{confidence[n]:.1%}</small>"
            figures.append(f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>')
        body = f'<div class="gallery">{"".join(figures)}</div>' if figures else '<p class="note">None among these.</p>'
        count = f" <small>({min(len(chosen), limit):,} of {len(chosen):,})</small>" if len(chosen) > limit else ""
        galleries.append(f"<h3>{title}{count}</h3>{body}")
    return "".join(galleries)


def image_grid(images: list[np.ndarray], caption: str, columns: int | None = None) -> str:
    """Images as `grid` takes them, in one picture with a caption. Raises ValueError as `grid` does."""
    side = max((max(np.shape(image)[:2], default=1) for image in images), default=1)
    cell = side * max(1, 64 // max(side, 1))
    figure = inline(grid(images, columns, cell=cell), caption, "sheet pixels" if side <= 64 else "sheet")
    return f"<figure>{figure}<figcaption>{escaped(caption)}</figcaption></figure>"


def _rate(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
