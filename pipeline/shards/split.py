"""Which samples are held out: a hash of the key decides, so that a sample keeps its side when the source grows."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import draw

_VALIDATION = draw.text_bits("validation split")


def of_keys(key_bits: np.ndarray, val_fraction: float) -> np.ndarray:
    """True where a sample goes to `val`. key_bits: uint64 (n,), from the keys; returns bool (n,).

    No seed: a build with another seed shuffles anew but holds out the same samples.
    """
    return draw.uniform(_VALIDATION, key_bits) < val_fraction


def assign(named: pa.ChunkedArray, key_bits: np.ndarray, val_fraction: float) -> dict[str, np.ndarray]:
    """{split: its rows, int64 rising}. named: string (n,), what the source calls each sample's split, null if it
    does not say; key_bits: uint64 (n,).

    Unnamed samples are `train`; a source without a `val` of its own gives up `val_fraction` of `train` for one.
    """
    encoded = pc.fill_null(named, "train").combine_chunks().dictionary_encode()
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    rows = {name: np.flatnonzero(codes == code) for code, name in enumerate(names)}
    if val_fraction and "train" in rows and "val" not in rows:
        held_out = of_keys(key_bits[rows["train"]], val_fraction)
        rows["train"], rows["val"] = rows["train"][~held_out], rows["train"][held_out]
    return {name: rows[name] for name in sorted(rows) if len(rows[name])}


def resolved(items: pa.Table, key_bits: np.ndarray, val_fraction: float) -> pa.Table:
    """`items` with a split for each, as `assign` gives it: a part of them then keeps the splits of the whole."""
    names = np.empty(len(items), object)
    for name, rows in assign(items["split"], key_bits, val_fraction).items():
        names[rows] = name
    return items.set_column(items.column_names.index("split"), "split", pa.array(names, pa.string()))
