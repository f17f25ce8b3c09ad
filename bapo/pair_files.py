"""Files of rows, within limits: JSON lines, JSON, CSV, TSV and Parquet, plain or gzipped.

Everything here is untrusted. Sizes are checked before anything is unpacked or parsed, a row is looked
at before the next one is read, and nothing but text, numbers, lists and objects comes out.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bapo.errors import BapoError
from bapo.settings import Settings

MAX_COLUMNS = 500
MAX_ROW_CHARACTERS = 2**20
CSV_FIELD_CHARACTERS = csv.field_size_limit()  # 131,072 unless something else in the process changed it
FORMATS = "JSON lines, JSON, CSV, TSV or Parquet, plain or gzipped"
# Objects that hold the rows in one list go by these names.
WRAPPERS = ("data", "rows", "pairs", "train", "examples", "instances")
_WRAPPED = re.compile(rf'\s*\{{\s*"(?:{"|".join(WRAPPERS)})"\s*:\s*(?=\[)')


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row. `row` counts lines (JSON lines), records (CSV, Parquet) or items (JSON) from 1."""

    row: int
    column: str | None
    expected: str

    def __str__(self) -> str:
        place = f"row {self.row}" + (f", column {self.column!r}" if self.column else "")
        return f"{place}: {self.expected}"


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What a file may hold. `bytes` limits the file as it is and, once more, its unpacked text."""

    bytes: int = 32 * 2**20
    rows: int = 20_000


def read_limits(settings: Settings) -> ReadLimits:
    return ReadLimits(settings.max_upload_mb * 2**20, settings.max_pairs)


Row = tuple[int, Any]  # (row number, the parsed value, or a `Problem` where the row cannot be parsed)


def read_rows(path: Path, limits: ReadLimits) -> Iterator[Row]:
    """The rows of a file, one after another; `BapoError` where the file as a whole cannot be read."""
    data = _bytes_of(path, limits)
    if data[:4] == b"PAR1":
        rows = _parquet_rows(data, path.name, limits)
    else:
        text = _text_of(data, path.name)
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if text.lstrip()[:1] in ("[", "{") and not {".csv", ".tsv"} & set(suffixes):
            rows = _json_rows(text)
        elif {".json", ".jsonl", ".ndjson"} & set(suffixes):
            rows = _line_rows(text)
        else:
            rows = _csv_rows(text, path.name, tabs=".tsv" in suffixes)
    for count, row in enumerate(rows, start=1):
        if count > limits.rows:
            raise BapoError(f"{path.name} holds more than {limits.rows:,} rows; split it into smaller files.")
        yield row


def _bytes_of(path: Path, limits: ReadLimits) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device has no size to check
            raise BapoError(f"{path} is not a file." if path.exists() else f"{path} does not exist.")
        if path.stat().st_size > limits.bytes:
            raise BapoError(f"{path.name} is larger than {_megabytes(limits.bytes)}; split it into smaller files.")
        data = path.read_bytes()
    except OSError as error:
        raise BapoError(f"{path} cannot be read: {error.strerror}.") from error
    if data[:2] == b"\x1f\x8b":
        data = _unpacked(data, path.name, limits.bytes)
    if data[:4] == b"PK\x03\x04":
        raise BapoError(f"{path.name} is a zip archive or a spreadsheet; expected {FORMATS}.")
    return data


def _unpacked(data: bytes, name: str, limit: int) -> bytes:
    unpack = zlib.decompressobj(wbits=31)
    try:
        text = unpack.decompress(data, limit + 1)
    except zlib.error as error:
        raise BapoError(f"{name} is a damaged gzip file: {error}.") from error
    if len(text) > limit:
        raise BapoError(f"{name} unpacks to more than {_megabytes(limit)}; split it into smaller files.")
    if not unpack.eof:
        raise BapoError(f"{name} is a truncated gzip file; transfer it again.")
    return text


def _text_of(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise BapoError(
                f"{name} begins like UTF-16 text and is not (byte {error.start}); save it as UTF-8."
            ) from error
    if b"\0" in data[:4096]:
        raise BapoError(f"{name} holds NUL bytes: it is no text file. Expected {FORMATS}.")
    if not data.strip():
        raise BapoError(f"{name} is empty; expected {FORMATS}.")
    # Bytes that are not UTF-8 become lone surrogates, so that the rows that hold them can be named.
    return data.decode("utf-8-sig", errors="surrogateescape")


def _json_rows(text: str) -> Iterator[Row]:
    """Rows of a JSON list, of an object that wraps one, of a single object, or of JSON lines."""
    wrapped = _WRAPPED.match(text)
    if wrapped or text.lstrip().startswith("["):
        yield from _list_rows(text, text.index("[") + 1)
        return
    first_line = text.lstrip().split("\n", 1)[0]
    if len(text) <= MAX_ROW_CHARACTERS and not isinstance(_parsed(first_line), dict):
        whole = _parsed(text)  # one object over many lines
        if isinstance(whole, dict):
            yield 1, whole
            return
    yield from _line_rows(text)


def _list_rows(text: str, at: int) -> Iterator[Row]:
    """Items of the JSON list whose first item begins at or after `at`, parsed one at a time."""
    decoder = json.JSONDecoder()
    skip = re.compile(r"[\s,]*")
    number = 0
    while True:
        at = skip.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too
        if text[at : at + 1] == "]":
            return
        number += 1
        for window in (2**16, MAX_ROW_CHARACTERS):  # slices, so that one item cannot take all the memory
            try:
                value, length = decoder.raw_decode(text[at : at + window])
                break
            except (ValueError, RecursionError):
                if at + window >= len(text):
                    window = MAX_ROW_CHARACTERS
        else:
            yield number, Problem(number, None, "is not valid JSON; it and what follows cannot be read")
            return
        yield number, value
        at += length


def _line_rows(text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_ROW_CHARACTERS:
            yield number, Problem(number, None, f"is longer than {MAX_ROW_CHARACTERS:,} characters")
        elif (value := _parsed(line)) is None:
            yield number, Problem(number, None, 'expected a JSON object such as {"prompt": …}')
        else:
            yield number, value


def _parsed(text: str) -> Any:
    """The value of a JSON text, `None` where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _csv_rows(text: str, name: str, tabs: bool) -> Iterator[Row]:
    header_line = text.lstrip("\ufeff\r\n").split("\n", 1)[0]
    if len(header_line) > MAX_ROW_CHARACTERS:
        raise BapoError(f"{name}: its first line is longer than {MAX_ROW_CHARACTERS:,} characters. Expected {FORMATS}.")
    delimiter = "\t" if tabs else max(",;\t", key=header_line.count)
    if delimiter not in header_line:
        raise BapoError(f"{name} has only one column in its first line {header_line[:60]!r}. Expected {FORMATS}.")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] = []
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            number += 1
            expected = f"a field is longer than {CSV_FIELD_CHARACTERS:,} characters: is a quotation mark left open?"
            yield number, Problem(number, None, f"{expected} What follows cannot be read")
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            _check_columns(header, name)
            continue
        number += 1
        if len(cells) != len(header):
            yield (
                number,
                Problem(number, None, f"expected {len(header)} fields as in the first line, found {len(cells)}"),
            )
        else:
            yield number, dict(zip(header, cells, strict=True))


def _check_columns(names: list[str], file: str) -> None:
    if len(names) > MAX_COLUMNS:
        raise BapoError(f"{file} has {len(names):,} columns; expected {MAX_COLUMNS} at most.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BapoError(f"{file} has the column {twice[:60]!r} twice; name every column once.")


def _parquet_rows(data: bytes, name: str, limits: ReadLimits) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data))
        _check_columns([field.name for field in table.schema_arrow], name)
        groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
        unpacked = sum(group.total_byte_size for group in groups)
        if unpacked > limits.bytes:
            raise BapoError(f"{name} unpacks to more than {_megabytes(limits.bytes)}; split it into smaller files.")
        if table.metadata.num_rows > limits.rows:
            raise BapoError(f"{name} holds more than {limits.rows:,} rows; split it into smaller files.")
        # A dictionary page stores a long text once however often it occurs: few rows at a time where it could be long.
        batch_size = max(1, min(1000, 64 * 2**20 // max(1, unpacked)))
        number = 0
        for batch in table.iter_batches(batch_size=batch_size):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BapoError(f"{name} is a damaged Parquet file: {reason}") from error


def _megabytes(count: int) -> str:
    return f"{count >> 20} MB"
