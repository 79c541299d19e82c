"""Reads prompt files into prompt tables, one chunk in memory at a time, and writes prompt files.

A prompt table has the columns prompt_id, prompt, category, split and details (the last three may be null).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs import prompt_sets, text
from mi_ray.inputs.places import Kinds, Places, Seen
from mi_ray.inputs.records import (
    PROMPT_COLUMNS,
    Record,
    as_caption,
    find_columns,
    first_value,
    form_of,
    format_of,
    read_records,
)

PROMPTS = pa.schema([(name, pa.string()) for name in ("prompt_id", "prompt", "category", "split", "details")])

ROWS_AT_ONCE = 1 << 14
LONGEST_LINE = 1 << 20  # bytes
_LABELS = ("category", "split", "tag", "atom_count", *prompt_sets.DETAILS)
_EXTENSIONS = ".txt, .jsonl, .json, .csv, .tsv (each also as .gz) or .parquet"
_OPTION = re.compile(r"(?:^|\s)--[a-z]{1,12}(?:\s|$)")  # of a tool's command line
_Row = tuple[int, str, str | None, str | None, str | None]  # line (from 1), prompt, category, split, details


def prompt_id(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a prompt's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ reading
class PromptReader:
    """Reads a prompt file, local or on an object store, once from the start to its end or to `limit`.

    .txt: one prompt a line; text after a tab, lines that begin with `#`, and a first line that is only the name of a
    column are ignored. .jsonl, .json, .csv, .tsv and .parquet: column `prompt`, `caption` or `text`, optional columns
    `category` and `split`, and those of `inputs.prompt_sets`. All but .parquet may be compressed as .gz. A `*` in the
    name of a .txt file means all files that match. Blank lines are ignored. The rules for encodings and characters are
    those of `inputs.text`.

    Args:
        field: config field, for messages.
        limit: number of prompts to read. Repeated prompts are dropped before, overlong prompts are skipped after.
        overlong: "truncate" leaves the prompt unchanged; the text encoder cuts it.
        broken: what to do with lines that have no prompt, are not text, or are longer than 1 MiB.
        token_count: number of tokens of a prompt, with start and end token. Without it no prompt is overlong.
        max_tokens: number of tokens that the text encoder reads.
        column: name of the prompt's column; None: a usual name.
    """

    def __init__(
        self,
        file: str,
        field: str = "prompts.file",
        limit: int | None = None,
        duplicates: Literal["error", "drop"] = "error",
        overlong: Literal["error", "skip", "truncate"] = "error",
        broken: Literal["error", "skip"] = "error",
        token_count: Callable[[str], int] | None = None,
        max_tokens: int | None = None,
        column: str | None = None,
    ):
        self.file, self.field, self.limit, self.duplicates = file, field, limit, duplicates
        self.on_overlong, self.on_broken = overlong, broken
        self.token_count, self.max_tokens = token_count, max_tokens
        self.column = column
        self._where = "line"
        self._form = ""  # what kind of file it is, and which columns are read
        self._broken, self._remarks = Kinds(), Kinds()
        self._repeated, self._overlong = Places(), Places()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The prompts, one chunk at a time, with the schema `PROMPTS`.

        Raises:
            ConfigError: at once if the file cannot be used at all; otherwise at the end, with all faults of the file.
        """
        seen, taken, kept = Seen(), 0, 0
        left = ROWS_AT_ONCE if self.limit is None else self.limit
        try:
            rows = self._rows()
            while chunk := list(islice(rows, min(ROWS_AT_ONCE, left))):
                batch, lines = _batch(chunk)
                good = self._check_repeated(batch, lines, seen)
                taken += len(batch) if self.duplicates == "error" else int(good.sum())
                left = ROWS_AT_ONCE if self.limit is None else self.limit - taken
                good &= self._check_length(batch, lines, good)
                kept += int(good.sum())
                yield batch.filter(pa.array(good))
        except OSError as error:
            fault = f"cannot be read ({error}); give a local path or an s3:// or gs:// URI"
            raise ConfigError([f"{self.field}: {self.file!r} {fault}"]) from error
        except ValueError as error:
            raise ConfigError([f"{self.field}: {self.file!r} {error}"]) from error
        if faults := self._faults(taken, kept):
            raise ConfigError([f"{self.field}: {self.file!r} {fault}" for fault in faults])

    @property
    def skipped(self) -> list[dict]:
        """The prompts left out so far: rows {"prompt", "stage", "message"}, at most 20 of each kind. If there are more,
        one row without a prompt has their number as `count`."""
        rows = []
        if self.on_broken == "skip":
            for fault, places in self._broken.items():
                rows += places.skipped(fault.partition(";")[0])
        if self.duplicates == "drop":
            rows += self._repeated.skipped("a repeated prompt")
        if self.on_overlong == "skip":
            rows += self._overlong.skipped(f"longer than the {self.max_tokens} tokens that the text encoder reads")
        return rows

    @property
    def found(self) -> list[str]:
        """What kind of file it is, then what is told of lines that are left out and of prompts that are read."""
        kinds = [*self._remarks.items(), *((fault.partition(";")[0], p) for fault, p in self._broken.items())]
        lines = [f"{p.named(self._where)} {kind}, first {_shown(p.first[0][1])}" for kind, p in kinds]
        if self.duplicates == "drop" and self._repeated.count:
            lines.append(f"{_counted(self._repeated.count, 'repeated ')} left out")
        if self.on_overlong == "skip" and self._overlong.count:
            lines.append(f"{_counted(self._overlong.count, 'overlong ')} left out")
        return [f"{self.field}: {line}" for line in (self._form, *lines)]

    # -------------------------------------------------------------------------------------- checks
    def _check_repeated(self, batch: pa.RecordBatch, lines: np.ndarray, seen: Seen) -> np.ndarray:
        """(n,) bool: the rows to keep."""
        ids = np.array([int(i, 16) for i in batch["prompt_id"].to_pylist()], np.uint64).view(np.int64)
        firsts = seen.first_lines(ids, lines)
        for row in np.flatnonzero(firsts != lines):
            message = f"{self._where} {lines[row]} repeats {self._where} {firsts[row]}"
            self._repeated.add(int(lines[row]), batch["prompt"][row].as_py(), message)
        return (firsts == lines) | (self.duplicates == "error")

    def _check_length(self, batch: pa.RecordBatch, lines: np.ndarray, among: np.ndarray) -> np.ndarray:
        good = np.ones(len(batch), bool)
        if self.token_count is None or self.on_overlong == "truncate":
            return good
        for row in np.flatnonzero(among):
            prompt = batch["prompt"][row].as_py()
            if (count := self.token_count(prompt)) > self.max_tokens:
                message = f"{count} tokens, but the text encoder reads {self.max_tokens}"
                self._overlong.add(int(lines[row]), prompt, message)
                good[row] = False
        return good

    def _faults(self, taken: int, kept: int) -> list[str]:
        """The faults of the file. A message starts with the name of the file, which is put before them."""
        if self._broken and self.on_broken == "error":
            advice = ", or set prompts.broken: skip" if kept else ""  # without a good line it would skip everything
            return [f"{places.named(self._where)} {fault}{advice}" for fault, places in self._broken.items()]
        if not taken and not self._broken:
            return ["has no prompts; give a file with prompts"]
        faults = []
        if self._repeated.count and self.duplicates == "error":
            _, prompt, message = self._repeated.first[0]
            where = message.replace(" repeats ", ", which repeats ", 1)
            faults.append(
                f"has {_counted(self._repeated.count, 'repeated ')}, first {_shown(prompt)} on {where}; remove them or"
                " set prompts.duplicates: drop"
            )
        if self._overlong.count and self.on_overlong == "error":
            line, prompt, message = self._overlong.first[0]
            faults.append(
                f"has {_counted(self._overlong.count)} longer than the {self.max_tokens} tokens that the text encoder"
                f" reads, first {self._where} {line} with {message.partition(' ')[0]} tokens: {_shown(prompt)}; shorten"
                " them or set prompts.overlong: skip, or truncate"
            )
        if not faults and not kept:
            reasons = [row["message"] for row in self.skipped[:1]]
            faults.append(f"has no valid prompt left after skipping ({reasons[0]}); correct some prompts")
        return faults

    # -------------------------------------------------------------------------------------- rows
    def _rows(self) -> Iterator[_Row]:
        name, size = self._look()
        path = PurePosixPath(name.lower())
        plain = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if plain == ".txt":
            self._form = "text, one prompt a line"
            rows = self._text_rows()
        elif format_of(name):
            rows = self._table_rows()
        elif path.suffix == ".parquet":
            rows = self._parquet_rows()
        else:
            raise ValueError(f"has the unknown extension {path.suffix!r}; give {_EXTENSIONS}")
        if not size:
            raise ValueError("is empty; give a file with prompts")
        return rows

    def _look(self) -> tuple[str, int]:
        """The path and size of the file, or of the first one that matches."""
        try:
            storage.check_reachable(self.file)
            system, _ = storage.filesystem(self.file)
        except ValueError as error:
            raise OSError(error) from error
        _, path = storage.filesystem(prompt_sets.matching(self.file)[0])
        info = system.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise ValueError("does not exist; give a file with prompts")
        if info.type == pafs.FileType.Directory:
            raise ValueError("is a folder; give a file with prompts")
        return path, info.size

    def _text_rows(self) -> Iterator[_Row]:
        blank = header = True  # whether the next line may be a header
        for line, first, labels in prompt_sets.text_lines(self.file, LONGEST_LINE):
            header |= first
            content, fault = text.shown_line(line)
            if not fault and not content.strip():
                continue
            blank = False
            prompt = text.clean(content.partition("\t")[0])
            if fault:
                self._break(line.number, content, fault)
            elif prompt.startswith("#"):
                self._remark(line.number, content, "a comment, and is left out")
            elif header and prompt.casefold() in PROMPT_COLUMNS:
                self._remark(line.number, content, "the name of a column, and is left out")
            else:
                yield from self._row(line.number, content, prompt, labels)
            header = False
        if blank:
            raise ValueError("is empty; give a file with prompts")

    def _table_rows(self) -> Iterator[_Row]:
        form = form_of(self.file, LONGEST_LINE)
        self._where = "item" if form.kind == "array" else "line"
        self._form = form.name
        if form.kind == "csv":
            self._columns(form.header)  # raises at once
        blank = True
        for record in prompt_sets.joined(read_records(self.file, form, LONGEST_LINE), form.header):
            blank = False
            if record.fields is None:
                self._break(record.number, record.text, record.fault)
                continue
            yield from self._of_fields(record)
        if blank:
            raise ValueError("has no prompts; give a file with prompts")

    def _of_fields(self, record: Record) -> Iterator[_Row]:
        fields = record.fields
        try:
            columns = self._columns(fields)
        except ValueError as error:
            self._break(record.number, record.text, f"without a prompt: it {error}")
            return
        yield from self._row(record.number, record.text, first_value(fields, columns), fields)

    def _columns(self, names: Iterable[str]) -> list[str]:
        try:
            columns = find_columns(names, self.column, PROMPT_COLUMNS, "prompts.column")
        except ValueError as error:
            raise ValueError(f"has {error}") from error
        if "`" not in self._form:
            self._form += f", prompts from {' or else '.join(f'`{text.excerpt(name, 40)}`' for name in columns)}"
        return columns

    def _parquet_rows(self) -> Iterator[_Row]:
        self._where, self._form = "row", "Parquet"
        try:
            table = storage.ParquetRows(self.file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"is not a Parquet file ({text.reason(error)}); write it again") from error
        names = table.schema.names
        columns = self._columns(names)
        for name in columns:
            if not _holds_text(kind := table.schema.field(name).type):
                raise ValueError(f"has {kind} in column {name!r}, not text; write it as strings")
        more = [name for name in names if name.casefold() in _LABELS and name not in columns]
        number = 0
        for batch in table.batches([*columns, *more]):
            for fields in batch.to_pylist():
                number += 1
                prompt = first_value(fields, columns)
                yield from self._row(number, str(prompt or ""), prompt, fields)

    def _row(self, number: int, shown: str, prompt: Any, known: dict | prompt_sets.Labels) -> Iterator[_Row]:
        """One row, or none if the line is broken. `known`: its columns, or what the name of its file says."""
        try:
            prompt, remark = as_caption(prompt)
            category, split, details = prompt_sets.labels(known) if isinstance(known, dict) else known
            category, split = _label(category), _label(split)
        except ValueError as error:
            fault = str(error).partition(":")[0].replace("the caption", "the prompt")
            self._break(number, shown, f"not usable ({fault}); write it as text")
            return
        if not prompt:
            self._break(number, shown, "without a prompt; write one or remove the line")
            return
        if remark:
            self._remark(number, shown, "with a list of prompts; the first is read")
        if _OPTION.search(prompt):
            self._remark(number, shown, "with an option such as --w 512, which is read as text")
        yield number, prompt, category, split, details

    def _break(self, number: int, shown: str, fault: str):
        if fault == text.BINARY and self.on_broken == "error":
            raise ValueError(f"is {fault.replace(';', f' (a zero byte on line {number});')}")
        self._broken.add(self._where, number, shown, fault)

    def _remark(self, number: int, shown: str, remark: str):
        self._remarks.add(self._where, number, shown, remark)


def read_prompts(
    file: str,
    field: str = "prompts.file",
    limit: int | None = None,
    duplicates: Literal["error", "drop"] = "error",
    overlong: Literal["error", "skip", "truncate"] = "error",
    broken: Literal["error", "skip"] = "error",
    token_count: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    column: str | None = None,
) -> tuple[pa.Table, list[dict]]:
    """Read a prompt file into memory: (prompt table, `PromptReader.skipped`). Arguments: see `PromptReader`.

    Raises:
        ConfigError: with all faults of the file.
    """
    reader = PromptReader(file, field, limit, duplicates, overlong, broken, token_count, max_tokens, column)
    return pa.Table.from_batches(reader.batches(), PROMPTS), reader.skipped


def write_prompts(uri: str, rows: list[dict[str, str]]):
    """Write rows {"prompt", optional "category" and "split"} atomically. The extension chooses the format."""
    if uri.lower().endswith(".parquet"):
        storage.write_table(uri, pa.Table.from_pylist(rows, pa.schema(list(PROMPTS)[1:4])))
        return
    plain = uri.lower().endswith(".txt")
    lines = (row["prompt"] if plain else json.dumps(row, ensure_ascii=False) for row in rows)
    storage.write_bytes(uri, "".join(f"{line}\n" for line in lines).encode())


def _label(value: Any) -> str | None:
    """A category or split as text; numbers, such as the class labels of Hugging Face datasets, become text.

    Raises:
        ValueError: it is something else.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str) and text.is_storable(value):
        return text.clean(value)
    if isinstance(value, int | float):
        return str(value)
    raise ValueError("the category or split is neither text nor a number")


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _batch(rows: list[_Row]) -> tuple[pa.RecordBatch, np.ndarray]:
    """Rows as a batch with the schema `PROMPTS`, and their line numbers."""
    lines, prompts, *labels = zip(*rows, strict=True)
    columns = [[prompt_id(prompt) for prompt in prompts], prompts, *labels]
    arrays = [pa.array(column, pa.string()) for column in columns]
    return pa.record_batch(arrays, schema=PROMPTS), np.array(lines, np.int64)


# ------------------------------------------------------------------------------------------ messages
def _counted(count: int, kind: str = "") -> str:
    return f"{count} {kind}prompt{'' if count == 1 else 's'}"


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")
