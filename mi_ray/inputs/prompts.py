"""Reads prompt files into prompt tables, one chunk in memory at a time, and writes prompt files.

A prompt table has the columns prompt_id, prompt, category and split (the last two may be null).
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mi_ray import storage
from mi_ray.config.section import ConfigError

PROMPTS = pa.schema([(name, pa.string()) for name in ("prompt_id", "prompt", "category", "split")])

ROWS_AT_ONCE = 1 << 14
_LONGEST_LINE = 1 << 20  # bytes
_LINES_SHOWN = 5  # line numbers in a message
_EXAMPLES = 20  # kept for each kind of skipped prompt
_EXAMPLE_LENGTH = 500  # characters
_Row = tuple[int, str, str | None, str | None]  # line (from 1), prompt, category, split


def prompt_id(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a prompt's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ reading
@dataclass
class _Places:
    """The places of one kind of fault: their number, and the first ones as (line, prompt, message)."""

    count: int = 0
    first: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, line: int, prompt: str, message: str):
        self.count += 1
        if len(self.first) < _EXAMPLES:
            self.first.append((line, prompt[:_EXAMPLE_LENGTH], message))

    def skipped(self, kind: str) -> Iterator[dict]:
        """Rows {"prompt", "stage", "message"} of the first places; one row with a `count` stands for all others."""
        for _, prompt, message in self.first:
            yield {"prompt": prompt, "stage": "prompts", "message": message}
        if self.count > len(self.first):
            rest = f"{self.count - len(self.first)} more: {kind}"
            yield {"prompt": "", "stage": "prompts", "message": rest, "count": self.count - len(self.first)}


class _Seen:
    """The prompts so far, with the first line of each. They are kept in a file, so that memory does not grow."""

    def __init__(self):
        self.table = sqlite3.connect("")  # a private temporary file
        self.table.execute("PRAGMA journal_mode = OFF")
        self.table.execute("CREATE TABLE seen (id INTEGER PRIMARY KEY, line INTEGER)")

    def first_lines(self, ids: np.ndarray, lines: np.ndarray) -> np.ndarray:
        """The first line of each of the next n prompts, (n,); for a new prompt its own line."""
        before = self.table.total_changes
        order = np.argsort(ids, kind="stable")  # sorted, so that nearby places on disk are written together
        rows = zip(ids[order].tolist(), lines[order].tolist(), strict=True)
        self.table.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)
        if self.table.total_changes - before == len(ids):
            return lines
        first = "SELECT line FROM seen WHERE id = ?"
        return np.array([self.table.execute(first, (i,)).fetchone()[0] for i in ids.tolist()], np.int64)


class PromptReader:
    """Reads a prompt file, local or on an object store, once from the start to its end or to `limit`.

    .txt: one prompt a line; text after a tab is ignored. .jsonl and .parquet: column `prompt`, optional columns
    `category` and `split`. Blank lines are ignored.

    Args:
        field: config field, for messages.
        limit: number of prompts to read. Repeated prompts are dropped before, overlong prompts are skipped after.
        overlong: "truncate" leaves the prompt unchanged; the text encoder cuts it.
        broken: what to do with lines that have no prompt, are not text, or are longer than 1 MiB.
        token_count: number of tokens of a prompt, with start and end token. Without it no prompt is overlong.
        max_tokens: number of tokens that the text encoder reads.
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
    ):
        self.file, self.field, self.limit, self.duplicates = file, field, limit, duplicates
        self.on_overlong, self.on_broken = overlong, broken
        self.token_count, self.max_tokens = token_count, max_tokens
        self._where = "line"
        self._broken: dict[str, _Places] = {}  # fault -> its places
        self._repeated, self._overlong = _Places(), _Places()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The prompts, one chunk at a time, with the schema `PROMPTS`.

        Raises:
            ConfigError: at once if the file cannot be used at all; otherwise at the end, with all faults of the file.
        """
        seen, taken, kept = _Seen(), 0, 0
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

    # -------------------------------------------------------------------------------------- checks
    def _check_repeated(self, batch: pa.RecordBatch, lines: np.ndarray, seen: _Seen) -> np.ndarray:
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
            return [
                f"{_named(self._where, places)} {fault}, or set prompts.broken: skip"
                for fault, places in self._broken.items()
            ]
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
            faults.append("has no valid prompt left after skipping; correct some prompts")
        return faults

    # -------------------------------------------------------------------------------------- rows
    def _rows(self) -> Iterator[_Row]:
        suffix, size = self._look()
        read_rows = {".txt": self._text_rows, ".jsonl": self._json_rows, ".parquet": self._parquet_rows}.get(suffix)
        if read_rows is None:
            raise ValueError(f"has the unknown extension {suffix!r}; give .txt, .jsonl or .parquet")
        if not size:
            raise ValueError("is empty; give a file with prompts")
        return read_rows()

    def _look(self) -> tuple[str, int]:
        """The file's extension and size."""
        try:
            system, path = storage.filesystem(self.file)
        except ValueError as error:
            raise OSError(error) from error
        info = system.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise ValueError("does not exist; give a file with prompts")
        if info.type == pafs.FileType.Directory:
            raise ValueError("is a folder; give a file with prompts")
        return PurePosixPath(path).suffix.lower(), info.size

    def _text_rows(self) -> Iterator[_Row]:
        for number, text in self._decoded():
            yield from self._row(number, text, text.partition("\t")[0], None, None)

    def _json_rows(self) -> Iterator[_Row]:
        for number, text in self._decoded():
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError):
                self._break(number, text, 'not JSON; write one {"prompt": ...} per line')
                continue
            fields = fields if isinstance(fields, dict) else {}
            yield from self._row(number, text, fields.get("prompt"), fields.get("category"), fields.get("split"))

    def _parquet_rows(self) -> Iterator[_Row]:
        self._where = "row"
        try:
            table = storage.ParquetRows(self.file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"is not a Parquet file ({error}); write it again") from error
        kinds = {name: table.schema.field(name).type for name in PROMPTS.names[1:] if name in table.schema.names}
        if "prompt" not in kinds:
            raise ValueError(f"has no column 'prompt', only {', '.join(table.schema.names)}; rename the prompt column")
        for name, kind in kinds.items():
            if not _holds_text(kind):
                raise ValueError(f"has {kind} in column {name!r}, not text; write it as strings")
        number = 0
        for batch in table.batches(list(kinds)):
            for fields in batch.to_pylist():
                number += 1
                text = str(fields["prompt"] or "")
                yield from self._row(number, text, fields["prompt"], fields.get("category"), fields.get("split"))

    def _decoded(self) -> Iterator[tuple[int, str]]:
        """(line number, text) of the lines that are not blank."""
        blank = True
        for number, line, whole in _lines(self.file):
            if b"\0" in line:
                if self.on_broken == "error":
                    raise ValueError(f"is binary (a zero byte on line {number}); give text in UTF-8")
                self._break(number, line.decode(errors="replace"), "binary; save the file as text in UTF-8")
            elif not whole:
                shown = line[:_EXAMPLE_LENGTH].decode(errors="replace")
                self._break(number, shown, f"longer than {_LONGEST_LINE >> 20} MiB; write one prompt per line")
            else:
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    self._break(number, line.decode(errors="replace"), "not UTF-8; save the file as UTF-8")
                else:
                    if not text.strip():
                        continue
                    blank = False
                    yield number, text
                    continue
            blank = False
        if blank:
            raise ValueError("is empty; give a file with prompts")

    def _row(self, number: int, text: str, prompt: object, category: object, split: object) -> Iterator[_Row]:
        """One row, or none if the line is broken."""
        prompt = prompt.strip() if isinstance(prompt, str) else ""
        if not prompt or not _can_be_stored(prompt):
            self._break(number, text, "without a prompt; write one or remove the line")
        elif not all(value is None or isinstance(value, str) for value in (category, split)):
            self._break(number, text, "with a category or split that is not text; write it as text")
        else:
            yield number, prompt, category, split

    def _break(self, number: int, text: str, fault: str):
        shown = text.strip().encode(errors="replace").decode()
        message = f"{self._where} {number} is {fault.partition(';')[0]}"
        self._broken.setdefault(fault, _Places()).add(number, shown, message)


def read_prompts(
    file: str,
    field: str = "prompts.file",
    limit: int | None = None,
    duplicates: Literal["error", "drop"] = "error",
    overlong: Literal["error", "skip", "truncate"] = "error",
    broken: Literal["error", "skip"] = "error",
    token_count: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
) -> tuple[pa.Table, list[dict]]:
    """Read a prompt file into memory: (prompt table, `PromptReader.skipped`). Arguments: see `PromptReader`.

    Raises:
        ConfigError: with all faults of the file.
    """
    reader = PromptReader(file, field, limit, duplicates, overlong, broken, token_count, max_tokens)
    return pa.Table.from_batches(reader.batches(), PROMPTS), reader.skipped


def write_prompts(uri: str, rows: list[dict[str, str]]):
    """Write rows {"prompt", optional "category" and "split"} atomically. The extension chooses the format."""
    if uri.lower().endswith(".parquet"):
        storage.write_table(uri, pa.Table.from_pylist(rows, pa.schema(list(PROMPTS)[1:])))
        return
    plain = uri.lower().endswith(".txt")
    lines = (row["prompt"] if plain else json.dumps(row, ensure_ascii=False) for row in rows)
    storage.write_bytes(uri, "".join(f"{line}\n" for line in lines).encode())


def _lines(uri: str) -> Iterator[tuple[int, bytes, bool]]:
    """(number from 1, line, whether it is whole) of each line of a file. A line that is too long is cut."""
    rest, number, skipping = b"", 1, False
    for position, chunk in enumerate(storage.read_chunks(uri)):
        *lines, last = (rest + (chunk.removeprefix(b"\xef\xbb\xbf") if position == 0 else chunk)).split(b"\n")
        for line in lines:
            if not skipping:
                yield number, line[:_LONGEST_LINE], len(line) <= _LONGEST_LINE
            number, skipping = number + 1, False
        if skipping or len(last) > _LONGEST_LINE:
            if not skipping:
                yield number, last[:_LONGEST_LINE], False
            last, skipping = b"", True
        rest = last
    if rest:
        yield number, rest, True


def _can_be_stored(text: str) -> bool:
    """False if the text contains half a surrogate pair: JSON allows it, UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _batch(rows: list[_Row]) -> tuple[pa.RecordBatch, np.ndarray]:
    """Rows as a batch with the schema `PROMPTS`, and their line numbers."""
    lines, prompts, categories, splits = zip(*rows, strict=True)
    columns = [[prompt_id(prompt) for prompt in prompts], prompts, categories, splits]
    arrays = [pa.array(column, pa.string()) for column in columns]
    return pa.record_batch(arrays, schema=PROMPTS), np.array(lines, np.int64)


# ------------------------------------------------------------------------------------------ messages
def _counted(count: int, kind: str = "") -> str:
    return f"{count} {kind}prompt{'' if count == 1 else 's'}"


def _named(where: str, places: _Places) -> str:
    lines = [line for line, _, _ in places.first[:_LINES_SHOWN]]
    shown = ", ".join(map(str, lines))
    more = f" and {places.count - len(lines)} more" if places.count > len(lines) else ""
    return f"{where} {shown} is" if places.count == 1 else f"{where}s {shown}{more} are"


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")
