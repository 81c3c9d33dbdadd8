"""What a dataset holds, on one page that opens anywhere: what `inspect --html` writes."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile
from rich.filesize import decimal

from jobs.dataset_words import MEASURES, measured, mixing_warning, present_sidecars, shard_facts
from jobs.report_page import Sections, dataset_facts, images_of
from pipeline import sources, storage
from pipeline.evaluation import histograms, report
from pipeline.evaluation.markup import escaped, facts, table
from pipeline.evaluation.pictures import rgb, thumbnail
from pipeline.shards import index
from pipeline.shards.picture import FORMATS

SHOWN_CLASSES, OF_EACH, SHOWN_REJECTS = 100, 8, 200  # 1,000 thumbnails of a few kB
_ELSEWHERE = {"samples", "splits", "classes", "rejected", "bytes", "source"}  # facts this page has in other places
_READABLE = 64 << 20  # bytes of a reject, and its pixels; a thumbnail is not worth more


def page(dataset: index.Dataset, rejects: list[dict], mixed: dict[str, dict | None], source: str | None) -> str:
    """The HTML document. rejects: rows of REJECTS; mixed: `mixing` by split; source: URI where the rejects may still
    lie, for their thumbnails. ValueError: a shard is damaged, or there is no such source."""
    info = dataset.info
    head = [("samples", info["samples"]), ("classes", len(dataset.classes)), ("shards", len(info["shards"]))]
    head += [("in shards", decimal(sum(shard["bytes"] for shard in info["shards"]))), ("rejected", len(rejects))]
    warnings = [mixing_warning(split, of_split) for split, of_split in mixed.items()]
    warned = "".join(f'<p class="warning">{escaped(warning)}</p>' for warning in warnings if warning)
    sections: Sections = [("", report.headline(head) + warned)]
    if dataset.classes:
        counts = {name: split["classes"] for name, split in info["splits"].items()}
        sections.append(("Classes", histograms.class_counts(list(dataset.classes), counts)))
    sections += [
        ("Samples", _samples(dataset)),
        ("Images", _images(dataset)),
        ("Splits", _splits(info, mixed)),
        ("Rejects", _rejects(rejects, _pictures(rejects, source, info) if source else {})),
        ("Shards", facts(shard_facts(info) | {"sidecars": present_sidecars(dataset)}) + _generations(info)),
        ("Recipe", facts(info["recipe"])),
    ]
    return report.page(f"Dataset {storage.name(dataset.root)}", "What it holds, and what was left out", sections)


# ---- what it holds


def _samples(dataset: index.Dataset) -> str:
    """A strip of thumbnails for each class, of `train` where there is one; without classes one strip in all."""
    splits = dataset.info["splits"]
    split = "train" if "train" in splits else max(splits, key=lambda name: splits[name]["samples"])
    label = dataset.split(split).label
    if not dataset.classes:
        rows = _spread(np.arange(len(label)), 6 * OF_EACH)
        return _strip(split, len(label), images_of(dataset, split, rows), "wide")
    chosen = _spread(np.arange(len(dataset.classes)), SHOWN_CLASSES)
    rows = [_spread(np.flatnonzero(label == of_class), OF_EACH) for of_class in chosen]
    images = iter(images_of(dataset, split, np.concatenate(rows)))
    strips = [
        _strip(dataset.classes[of_class], splits[split]["classes"][of_class], [next(images) for _ in part])
        for of_class, part in zip(chosen, rows, strict=True)
    ]
    note = f"Up to {OF_EACH} samples of each class, spread over {split}."
    if len(chosen) < len(dataset.classes):
        note += f" {len(chosen):,} of the {len(dataset.classes):,} classes, evenly chosen."
    return f'<p class="note">{escaped(note)}</p><div class="strips">{"".join(strips)}</div>'


def _strip(name: str, count: int, images: list[np.ndarray], kind: str = "") -> str:
    pictures = "".join(thumbnail(image, f"of {name}") for image in images)
    caption = f"<figcaption><b>{escaped(name)}</b> <small>{count:,}</small></figcaption>"
    return f'<figure class="strip {kind}">{caption}<div>{pictures}</div></figure>'


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def _images(dataset: index.Dataset) -> str:
    info, says = dataset.info, measured(dataset)
    drawn = info.get("histograms", {})
    figures = [histograms.histogram(h["edges"], h["counts"], MEASURES[name], says[name]) for name, h in drawn.items()]
    found = {name: value for name, value in dataset_facts(dataset).items() if name not in _ELSEWHERE}
    found |= {MEASURES[name]: value for name, value in says.items() if name not in drawn}
    if "bytes" in info:
        found["bytes"] = {name: decimal(info["bytes"][name]) for name in ("source", "stored")}
    for name, said in (("passed", "passed through unchanged"), ("animated", "animated, first frame kept")):
        if name in info:
            found[said] = info[name]
    return (f'<div class="plots">{"".join(figures)}</div>' if figures else "") + facts(found)


def _splits(info: dict, mixed: dict[str, dict | None]) -> str:
    numbers, rows = ("entropy", "entropy_ratio", "adjacent", "adjacent_ratio", "adjacent_noise"), []
    for name, split in info["splits"].items():
        cells = [f"{mixed[name][number]:.4f}" for number in numbers] if mixed[name] else ["—"] * len(numbers)
        cells = [f"{split['samples']:,}", f"{split['shards']:,}", *cells]
        rows.append(f'<tr><td class="name">{escaped(name)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    note = (
        "How well classes are mixed in the order they are stored: the entropy of the labels inside a shard, in bits, "
        "and the share of neighbours of one class. 1 is what a random order gives, ± its standard deviation."
    )
    columns = ["split", "samples", "shards", "entropy", "of random", "neighbours", "of random", "±"]
    return f'<p class="note">{note}</p>{table(columns, rows)}'


def _generations(info: dict) -> str:
    rows = []
    for g in info["generations"]:
        cells = (g["generation"], f"{g['samples']:,}", f"{g['source']['items']:,}", g["source"]["kind"])
        rows.append(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>")
    return "<h3>Generations</h3>" + table(["generation", "samples", "items listed", "source"], rows)


# ---- what was left out


def _rejects(rejects: list[dict], pictures: dict[str, np.ndarray]) -> str:
    if not rejects:
        return '<p class="note">None.</p>'
    rows = []
    for reject in rejects[:SHOWN_REJECTS]:
        name, picture = reject["source"], pictures.get(reject["source"])
        cells = [escaped(reject[column]) for column in ("split", "reason", "detail")]
        rows.append(
            f'<tr><td class="name">{escaped(name)}</td>'
            + (
                f'<td class="thumb">{"" if picture is None else thumbnail(picture, f"of {name}")}</td>'
                if pictures
                else ""
            )
            + f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    columns = ["source", *(["picture"] if pictures else []), "split", "reason", "detail"]
    reasons = dict(Counter(reject["reason"] for reject in rejects).most_common())
    more = len(rejects) > SHOWN_REJECTS
    note = f'<p class="note">The first {SHOWN_REJECTS} of {len(rejects):,}.</p>' if more else "<p></p>"
    return facts(reasons) + note + table(columns, rows, "list")


def _pictures(rejects: list[dict], source: str, info: dict) -> dict[str, np.ndarray]:
    """{name: uint8 (h, w, 3)} of the first rejects that the source still holds and Pillow reads something of."""
    items = sources.list_items(source, info["recipe"]["labels"]).items
    wanted = pa.array([reject["source"] for reject in rejects[:SHOWN_REJECTS]], pa.string())
    items = items.filter(pc.and_(pc.is_in(items["name"], wanted), pc.less(items["size"], _READABLE)))
    seen = ((raw if isinstance(raw, np.ndarray) else _salvaged(raw)) for raw, _ in sources.read_items(source, items))
    named = zip(items["name"].to_pylist(), seen, strict=True)
    return {name: rgb(pixels) for name, pixels in named if pixels is not None}


def _salvaged(raw: bytes | OSError) -> np.ndarray | None:
    """What can be seen of a broken image, hardly larger than a thumbnail needs; None if nothing can."""
    if isinstance(raw, OSError):
        return None
    strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > _READABLE:
                return None
            image.draft("RGB", (256, 256))
            return np.asarray(image.convert("RGB"))
    except Exception:  # it was rejected for being broken, and Pillow raises nearly anything over such files
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict
