"""Numbers by step -> plots as inline SVG that follow the page's colours, light or dark."""

import io
import re
from collections.abc import Iterator, Mapping
from numbers import Real

import numpy as np

from pipeline.evaluation.markup import escaped, printable

AXES = ("samples", "step", "epoch")
# Matplotlib knows no CSS variables: it draws in these stand-ins, and each is replaced in the SVG it writes.
STAND_INS = {
    "#010203": "var(--ink)",
    "#010204": "var(--line)",
    "#010205": "var(--bad)",
    **{f"#0203{n:02x}": f"var(--series-{n})" for n in range(6)},
}
INK, LINE, BAD, *SERIES = STAND_INS
BUCKETS = 500
# Beyond this a sum or an axis range overflows; such a value is marked like NaN.
LARGEST = 1e30

Series = tuple[str, np.ndarray, np.ndarray, bool]


def curves(rows: list[Mapping], validations: list[Mapping]) -> str:
    """Training and validation numbers against samples seen -> an HTML fragment, one plot a panel.

    rows, validations: mappings with "samples" and whatever numbers there are. Keys with "loss" in their name share a
    panel, so do keys with "acc" or "top"; each other key has a small one of its own. Training is drawn raw (faint) and
    smoothed, validation as points. NaN, infinity and None are marked on the axis and counted, never joined up.

    Raises KeyError for a row without "samples".
    """
    panels: dict[str, list[Series]] = {}
    for source, is_validation in ((rows, False), (validations, True)):
        for key in _numeric_keys(source):
            x, y = _column(source, key)
            panels.setdefault(_panel(key), []).append((key, x, y, is_validation))
    if not panels:
        return '<p class="note">No steps were recorded.</p>'
    wide = [name for name in ("loss", "accuracy") if name in panels]
    small = [name for name in panels if name not in wide]
    body = "".join(_figure(name, panels[name], small=False) for name in wide)
    rest = "".join(_figure(name, panels[name], small=True) for name in small)
    return (f'<div class="plots">{body}</div>' if body else "") + (
        f'<div class="plots small">{rest}</div>' if rest else ""
    )


def _panel(key: str) -> str:
    lower = key.lower()
    return "loss" if "loss" in lower else "accuracy" if "acc" in lower or "top" in lower else key


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _numeric_keys(rows: list[Mapping]) -> list[str]:
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in AXES and _is_number(v)))


def _column(rows: list[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the rows that have this key, by samples; what cannot be drawn is NaN."""
    pairs = sorted(((row["samples"], row[key]) for row in rows if key in row), key=lambda pair: pair[0])
    x = np.array([x for x, _ in pairs], np.float64)
    y = np.array([float(y) if _is_number(y) else np.nan for _, y in pairs])
    return x, np.where(np.abs(y) < LARGEST, y, np.nan)


def _figure(name: str, series: list[Series], small: bool) -> str:
    numbers = [f"{_label(key, is_val)} {y[-1]:.4g}" for key, _, y, is_val in series]
    newest = escaped(", ".join(numbers) if numbers[1:] else numbers[0].removeprefix(f"{name} "))
    broken = sum(int(np.isnan(y).sum()) for _, _, y, _ in series)
    note = f' <span class="bad">× {broken:,} not finite</span>' if broken else ""
    label = f"{escaped(name)}: {newest}"
    svg = _svg(series, small, salt=label).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return (
        f'<figure class="plot"><figcaption><b>{escaped(name)}</b>{note} '
        f"<small>{newest}</small></figcaption>{svg}</figure>"
    )


def _label(key: str, is_validation: bool) -> str:
    return f"validation {key}" if is_validation else key


def _svg(series: list[Series], small: bool, salt: str) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # hashsalt: ids are the same in every run, and differ between the plots of a page.
    # fonttype none: letters stay text, in the reader's font. parse_math: a metric may be named "$x$".
    settings = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": LINE,
        "font.size": 10,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(3.6, 2.0) if small else (5.0, 2.9), layout="constrained")
        figure.patch.set_visible(False)
        _draw(figure.add_subplot(), series)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue())


def _draw(axes, series: list[Series]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("samples seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6, integer=True)
    seen = np.concatenate([x for _, x, _, _ in series])
    axes.set_xlim(0, max(1, seen.max() * (1.02 if len(np.unique(seen)) > 1 else 2)))
    for colour, (key, x, y, is_validation) in zip(_colours(), series, strict=False):
        label = printable(_label(key, is_validation))
        finite = np.isfinite(y)
        if is_validation:
            axes.plot(x[finite], y[finite], "o:", color=colour, markersize=4, linewidth=1, label=label, clip_on=False)
        else:
            _draw_training(axes, x, y, colour, label)
        broken, _ = _thinned(x[~finite], x[~finite])
        axes.plot(
            broken, np.full(len(broken), 0.02), "x", color=BAD, markersize=4, transform=axes.get_xaxis_transform()
        )
    values = np.concatenate([y[np.isfinite(y)] for _, _, y, _ in series])
    # A loss that fell a long way, or one spike, would flatten all the rest; a cosine schedule stays linear.
    if len(values) and values.min() > 1e-12 and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if values.max() < 1e3 * values.min() else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if len(series) > 1 and len(values):
        axes.legend(frameon=False, loc="best")


def _colours() -> Iterator[str]:
    while True:
        yield from SERIES


def _draw_training(axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """Raw values faint, with their gaps; over them the running mean of a fortieth of the run."""
    from scipy.ndimage import uniform_filter1d

    finite = np.isfinite(y)
    known_x, known_y = x[finite], y[finite]
    window = len(known_y) // 40
    if window < 2:
        # So few that each is a point: one step, or one between two gaps, has no line to be seen by.
        dots = "o-" if len(known_y) < 40 else "-"
        axes.plot(x, y, dots, color=colour, linewidth=1.4, markersize=3, label=label, clip_on=False)
        return
    axes.plot(*_thinned(x, y), color=colour, linewidth=0.8, alpha=0.3)
    smooth = uniform_filter1d(known_y, window, mode="nearest")
    keep = np.unique(np.linspace(0, len(smooth) - 1, BUCKETS).astype(int))
    axes.plot(known_x[keep], smooth[keep], color=colour, linewidth=1.6, label=label)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest of each bucket, and its gaps: a million steps draw as fast as a thousand, spikes kept."""
    if len(x) <= 2 * BUCKETS:
        return x, y
    keep = set()
    for part in np.array_split(np.arange(len(x)), BUCKETS):
        known = part[np.isfinite(y[part])]
        if len(known) < len(part):
            keep.add(part[0] if not len(known) else part[~np.isfinite(y[part])][0])
        if len(known):
            keep.update((known[y[known].argmin()], known[y[known].argmax()]))
    order = np.array(sorted(keep))
    return x[order], y[order]


def _inline(svg: str) -> str:
    """A stand-alone SVG file -> an element of the page: its colours, its width, nothing that points outside."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    head, rest = svg.split(">", 1)
    viewbox = re.search(r'viewBox="[^"]*"', head).group()
    for stand_in, colour in STAND_INS.items():
        rest = rest.replace(stand_in, colour)
    used = set(re.findall(r"#(\w+)", rest))
    rest = re.sub(r' id="([\w.]+)"', lambda match: match.group() if match.group(1) in used else "", rest)
    return f"<svg {viewbox}>{rest}".strip()
