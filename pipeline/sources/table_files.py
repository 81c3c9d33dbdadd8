"""Columns of Parquet, CSV and JSONL files, local or in a store; of Parquet, what is not asked for is not read."""

import contextlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.sources import listing

KINDS = (".parquet", ".csv", ".jsonl")
_BUFFER = 8 << 20  # bytes a read: a column of images is streamed, however large a row group is
_ROWS = 32  # images decoded at a time
_ABSENT = FileNotFoundError, PermissionError, storage.StorageError


def schema(path: str) -> pa.Schema:
    """Its columns; those of a CSV file are all text. ValueError: damaged, or not of its kind."""
    with _opened(path) as file:
        if path.endswith(".parquet"):
            return pq.ParquetFile(file).schema_arrow
        if path.endswith(".csv"):
            return pa.schema([(name, pa.string()) for name in pa.csv.open_csv(file).schema.names])
        return pa.json.read_json(file, pa.json.ReadOptions(block_size=_BUFFER)).schema


def read(path: str, columns: list[str]) -> tuple[pa.Table, list[int]]:
    """(these columns; rows in each row group). Of Parquet, `a.b` is the field b of the struct a. ValueError."""
    with _opened(path) as file:
        if path.endswith(".parquet"):
            opened = pq.ParquetFile(file, pre_buffer=True)
            _require(path, columns, opened.schema_arrow.names)
            groups = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            return opened.read(columns), groups
        if path.endswith(".csv"):
            _require(path, columns, schema(path).names)
            convert = pa.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()),
                                            null_values=[""], strings_can_be_null=True)  # fmt: skip
            with pa.csv.open_csv(file, pa.csv.ReadOptions(block_size=_BUFFER), convert_options=convert) as rows:
                table = rows.read_all()
        else:
            table = pa.json.read_json(file, pa.json.ReadOptions(block_size=_BUFFER))
            _require(path, columns, table.column_names)
            table = table.select(dict.fromkeys(c if c in table.column_names else c.partition(".")[0] for c in columns))
        return table, [table.num_rows]


def _require(path: str, columns: list[str], names: list[str]) -> None:
    if missing := [column for column in columns if column not in names and column.partition(".")[0] not in names]:
        raise ValueError(f"{path} has no column {missing[0]!r}, which others have: its columns are {', '.join(names)}")


def row_groups(path: str, column: str) -> tuple[list[int], list[int]]:
    """(first row of each row group and, last, the number of rows; stored bytes of the column in each)."""
    with _opened(path) as file:
        footer = pq.ParquetFile(file).metadata
        starts, sizes = [0], []
        for i in range(footer.num_row_groups):
            group = footer.row_group(i)
            starts.append(starts[-1] + group.num_rows)
            leaves = (group.column(c) for c in range(group.num_columns))
            sizes.append(
                sum(c.total_compressed_size for c in leaves if f"{c.path_in_schema}.".startswith(f"{column}."))
            )
        return starts, sizes


def values(path: str, column: str, group: int, rows: list[int]) -> list[bytes | dict | None]:
    """What the column holds in these rows, rising, of one row group.

    Held in memory: those and the page being decoded, which may be of 1,024 rows as pyarrow and pandas write them."""
    found: list = []
    with _opened(path) as file:
        opened, at = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False), 0  # or it fetches the whole group
        for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=[column]):
            while len(found) < len(rows) and rows[len(found)] < at + len(batch):
                found.append(batch.column(column)[rows[len(found)] - at].as_py())
            if len(found) == len(rows):
                return found
            at += len(batch)
    raise ValueError(f"{path} has {at} rows in row group {group}, row {rows[-1]} of it is wanted: did it change?")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pa.NativeFile]:
    """The file for pyarrow, whose complaints come out as ValueErrors that name it."""
    try:
        with pa.PythonFile(_Ranges(path), "r") if storage.is_remote(path) else pa.OSFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:  # of a damaged file pyarrow raises either
        if isinstance(error, _ABSENT):
            raise
        raise ValueError(f"{path} cannot be read: {error}") from None


class _Ranges(io.RawIOBase):
    """A remote file that fetches just what it is asked for, with the retries and errors of storage."""

    def __init__(self, path: str):
        self.path, self.size, self.at = path, listing.file_at(path).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self.size, self.at + size)
        start, self.at = self.at, max(self.at, end)
        return storage.read_range(self.path, start, self.at)
