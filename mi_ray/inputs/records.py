"""Rows of the user's tables in text form: JSON lines, JSON arrays, CSV and TSV, each also as .gz.

Prompts and pairs are read by the same functions, so the rules for columns, missing values and faults are the same.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mi_ray import storage
from mi_ray.config.section import split_query
from mi_ray.inputs import text

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
IMAGE_COLUMNS = ("image", "jpg", "png", "file_name", "image_path", "path")
CAPTION_COLUMNS = ("caption", "prompt", "text", "txt")
PROMPT_COLUMNS = ("prompt", "caption", "text", "txt")
_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Record:
    """One row of a table in text form, with its columns or with its fault."""

    number: int  # of its first line, or of the item of a JSON array, from 1
    following: int  # number of the next row's first line or of the next item
    end: int  # offset after it, as in `text.Line`; 0 in a JSON array
    text: str  # of its line, for messages
    fields: dict | None
    fault: str = ""  # completes the sentence "the line is ...; what to do"


@dataclass(frozen=True)
class Form:
    """How the rows of a file are written."""

    kind: str  # jsonl, array, csv
    header: tuple[str, ...] = ()  # of CSV and TSV
    delimiter: str = ""

    @property
    def name(self) -> str:
        table = "TSV" if self.delimiter == "\t" else "CSV"
        return {"jsonl": "JSON lines", "array": "JSON array"}.get(self.kind, table)


# ------------------------------------------------------------------------------------------ columns
def find_columns(names: Iterable[str], wanted: str | None, usual: tuple[str, ...], option: str) -> list[str]:
    """The columns that may hold a value, in the order in which they are asked; capitals do not matter.

    Args:
        wanted: the name that the user gives; None: the usual names.
        option: the option that names a column, for the message.

    Raises:
        ValueError: there is none, or two columns have this name.
    """
    names = list(names)
    by_name = {name.strip().casefold(): name for name in reversed(names)}
    asked = [wanted] if wanted else usual
    found = [name if name in names else by_name.get(name.casefold()) for name in asked]
    found = [name for name in dict.fromkeys(found) if name is not None]
    if not found:
        there = text.excerpt(", ".join(map(str, names))) or "nothing"
        raise ValueError(f"no column {', '.join(asked)} among {there}; set {option}")
    if (count := names.count(found[0])) > 1:
        raise ValueError(f"{count} columns {found[0]}; rename all but one")
    return found


def first_value(fields: dict, columns: list[str]) -> Any:
    """The first value that is there: null and a missing column are not; blank text counts only if nothing else is."""
    values = [value for name in columns if (value := fields.get(name)) is not None]
    return next((value for value in values if not isinstance(value, str) or value.strip()), next(iter(values), None))


def as_caption(value: Any) -> tuple[str | None, str | None]:
    """A value as a caption or prompt, and a remark about it. Of a list the first is taken.

    Raises:
        ValueError: the value is neither text nor a list of texts.
    """
    remark = None
    if isinstance(value, list | tuple):
        texts = [item for item in value if isinstance(item, str) and item.strip()]
        if len(texts) > 1:
            remark = f"there is a list of {len(texts)} captions; the first is read"
        if value and not texts:
            raise ValueError(f"the caption is a list without text: {text.excerpt(value, 80)}")
        value = texts[0] if texts else None
    if value is None:
        return None, remark
    if not isinstance(value, str):
        raise ValueError(f"the caption is not text but {type(value).__name__}: {text.excerpt(value, 80)}")
    if not text.is_storable(value):
        raise ValueError("the caption is not text but contains half a surrogate pair")
    return text.clean(value), remark


# ------------------------------------------------------------------------------------------ rows
def format_of(name: str) -> str | None:
    """The format of a table in text form, by its name; None: another type."""
    path = PurePosixPath(split_query(name)[0] if "://" in name else name)
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return FORMATS.get(path.suffix.lower())


def form_of(uri: str, longest: int) -> Form:
    """How a file's rows are written, from its name and its first line.

    Raises:
        ValueError: the first line of a CSV or TSV file is not text.
    """
    lines = (line for line in text.lines(uri, longest) if line.content.strip())
    first = next(lines, None)
    content = first.content.strip() if first else b""
    kind = format_of(uri)
    if kind in ("json", "jsonl"):
        # A whole array in the first of several lines is a row: a wrong one, which must not make the file unreadable.
        row = not content.startswith(b"[") or (next(lines, None) is not None and _is_json(content))
        return Form("jsonl" if row else "array")
    header = first.decoded() if first else ""
    delimiter = "\t" if kind == "tsv" else max(_DELIMITERS, key=header.count)
    names = next(_csv_reader([header], delimiter), [])
    return Form("csv", tuple(text.clean(_unquoted(name, delimiter)) for name in names), delimiter)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def read_records(uri: str, form: Form, longest: int, start: int = 0, number: int = 1) -> Iterator[Record]:
    """The rows of a file, without its blank lines and its header.

    Args:
        longest: number of bytes of a line; a longer one is a fault.
        start: offset of the first line to read, and `number` the number of that line.
    """
    if form.kind == "array":
        yield from _items(uri)
        return
    lines = text.lines(uri, longest, start, number)
    yield from _json_lines(lines) if form.kind == "jsonl" else _csv_rows(lines, form, start == 0)


def _json_lines(lines: Iterator[text.Line]) -> Iterator[Record]:
    for line in lines:
        content, fault = text.shown_line(line)
        fields = None
        if not fault:
            if not content.strip():
                continue
            fields, fault = _parsed(content)
        yield Record(line.number, line.number + 1, line.end, content, fields, fault)


def _parsed(content: str) -> tuple[dict | None, str]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None, "not JSON; write one object per line"
    return _fields(value)


def _fields(value: Any) -> tuple[dict | None, str]:
    """The columns of a JSON value; a text alone is a prompt."""
    if isinstance(value, str):
        value = {"prompt": value}
    if isinstance(value, dict):
        return value, ""
    return None, f"a JSON {type(value).__name__}, not an object; write one object per line"


def _items(uri: str) -> Iterator[Record]:
    content = text.decode(b"".join(storage.unpacked_chunks(uri)))
    try:
        items = json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not a JSON array ({text.reason(error)}); write an array of objects") from error
    for number, item in enumerate(items, 1):
        yield Record(number, number + 1, 0, text.excerpt(item, 500), *_fields(item))


def _csv_reader(rows: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """In TSV files a single quote mark is common, so there a value ends with its line."""
    return csv.reader(rows, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)


def _unquoted(value: str, delimiter: str) -> str:
    inner = value[1:-1].replace('""', "")
    quoted = delimiter == "\t" and len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner
    return value[1:-1].replace('""', '"') if quoted else value


def _csv_rows(lines: Iterator[text.Line], form: Form, has_header: bool) -> Iterator[Record]:
    seen: list[tuple[text.Line, str]] = []  # lines of the current row, and their faults

    def contents() -> Iterator[str]:
        for line in lines:
            content, fault = text.shown_line(line)
            seen.append((line, fault))
            yield content + "\n"

    rows = _csv_reader(contents(), form.delimiter)
    while True:
        try:
            values, fault = next(rows, None), ""
            values = values and [_unquoted(value, form.delimiter) for value in values]
        except csv.Error as error:
            values, fault = [], f"not CSV ({error}); correct its quotes"
        if values is None:
            return
        of_row, seen = seen, []
        fault = next((fault for _, fault in of_row if fault), fault)
        if has_header and any(map(str.strip, values)):
            has_header = False
            continue
        if fault or any(map(str.strip, values)):
            if not fault and len(values) > len(form.header):
                fault = f"a row of {len(values)} values for {len(form.header)} columns; put quotes around its values"
            fields = None if fault else dict(zip(form.header, values, strict=False))
            first, last = of_row[0][0], of_row[-1][0]
            yield Record(first.number, last.number + 1, last.end, form.delimiter.join(values), fields, fault)
