"""Prompt files to prompt tables, and the plan of shards that a run generates.

A prompt table has the columns prompt_id, prompt, category and split (the last two may be null).
"""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mi_ray import storage
from mi_ray.config import ConfigError

PROMPTS = pa.schema([(name, pa.string()) for name in ("prompt_id", "prompt", "category", "split")])

_ROWS_AT_ONCE = 1 << 16
_LINES_SHOWN = 5
_Row = tuple[int, str, str | None, str | None]  # line (from 1), prompt, category, split
_Broken = dict[str, list[int]]  # what is wrong -> the lines where it is


def prompt_id(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a prompt's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ reading
def read_prompts(
    file: str,
    field: str = "prompts.file",
    limit: int | None = None,
    duplicates: Literal["error", "drop"] = "error",
    overlong: Literal["error", "skip", "truncate"] = "error",
    token_count: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
) -> tuple[pa.Table, list[dict]]:
    """Read a prompt file, local or on an object store.

    .txt: one prompt a line, what follows a tab is ignored. .jsonl and .parquet: column `prompt`, and if you like
    `category` and `split`. Blank lines are ignored.

    Args:
        field: of the config, which messages name.
        limit: take the first so many; repeated prompts are dropped before, overlong ones skipped after.
        overlong: "truncate" leaves the prompt as it is; the text encoder cuts it.
        token_count: tokens of a prompt, with those of start and end; without it no prompt is overlong.
        max_tokens: that the text encoder reads.

    Returns:
        The prompt table, and a row {"prompt", "stage", "message"} for each prompt that was skipped.

    Raises:
        ConfigError: with every fault of the file.
    """
    table, where = _read(file, field)
    firsts = table.group_by("prompt_id").aggregate([("line", "min")])["line_min"].combine_chunks()
    if duplicates == "drop":
        table = table.filter(pc.is_in(table["line"], value_set=firsts))
    table = table.slice(0, limit)
    faults = []
    repeated = table.filter(pc.invert(pc.is_in(table["line"], value_set=firsts)))
    if len(repeated):
        again = repeated.slice(0, 1).to_pylist()[0]
        before = pc.min(table.filter(pc.equal(table["prompt_id"], again["prompt_id"]))["line"])
        faults.append(
            f"{field}: {file!r} repeats {_counted(len(repeated))}, first {_shown(again['prompt'])} on {where}"
            f" {again['line']}, which is {where} {before} again; remove what repeats or set prompts.duplicates: drop"
        )
    skipped = []
    if token_count and overlong != "truncate":
        lengths = pa.array([token_count(prompt.as_py()) for prompt in table["prompt"]], pa.int64())
        too_long = pc.greater(lengths, max_tokens)
        longer = table.append_column("tokens", lengths).filter(too_long)
        if overlong == "skip":
            table = table.filter(pc.invert(too_long))
            skipped = [_skipped(row, max_tokens) for row in longer.to_pylist()]
        elif len(longer):
            first = longer.slice(0, 1).to_pylist()[0]
            faults.append(
                f"{field}: {file!r} holds {_counted(len(longer))} longer than the {max_tokens} tokens that the text"
                f" encoder reads, first {where} {first['line']} with {first['tokens']}: {_shown(first['prompt'])};"
                " shorten what is too long or set prompts.overlong: skip, or truncate"
            )
    if not faults and not len(table):
        faults.append(f"{field}: {file!r} keeps no prompt once overlong ones are skipped; shorten some")
    if faults:
        raise ConfigError(faults)
    return table.select(PROMPTS.names), skipped


def _read(file: str, field: str) -> tuple[pa.Table, str]:
    """All rows with their line as a further column, and what the file calls a line."""
    content, suffix = _content(file, field)
    read_rows = {".txt": _text_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}.get(suffix)
    if read_rows is None:
        raise ConfigError([f"{field}: {file!r} has the unknown extension {suffix!r}; give .txt, .jsonl or .parquet"])
    if not content.strip():
        raise ConfigError([f"{field}: {file!r} is empty; give a file with prompts"])
    where = "row" if read_rows is _parquet_rows else "line"
    if where == "line" and b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise ConfigError([f"{field}: {file!r} is binary (a zero byte on line {line}); give text in UTF-8"])
    broken: _Broken = defaultdict(list)
    try:
        table = _table(read_rows(content, broken))
    except ValueError as error:
        raise ConfigError([f"{field}: {file!r} {error}"]) from error
    if broken:
        raise ConfigError([f"{field}: {file!r} {_places(where, lines)} {fault}" for fault, lines in broken.items()])
    if not len(table):
        raise ConfigError([f"{field}: {file!r} holds no prompt; give a file with prompts"])
    return table, where


def _content(file: str, field: str) -> tuple[bytes, str]:
    try:
        system, path = storage.filesystem(file)
        kind = system.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            raise ConfigError([f"{field}: {file!r} does not exist; give a file with prompts"])
        if kind == pafs.FileType.Directory:
            raise ConfigError([f"{field}: {file!r} is a folder; give a file with prompts"])
        return storage.read_bytes(file), PurePosixPath(path).suffix.lower()
    except (OSError, ValueError) as error:
        raise ConfigError([f"{field}: {file!r} cannot be read ({error}); give a local path or an s3:// URI"]) from error


def _decoded(content: bytes, broken: _Broken) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    for number, raw in enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), start=1):
        try:
            text = raw.decode()
            if text.strip():
                yield number, text
        except UnicodeDecodeError:
            broken["not UTF-8; save the file as UTF-8"].append(number)


def _row(number: int, prompt: object, category: object, split: object, broken: _Broken) -> Iterator[_Row]:
    """One row, or none where something is broken."""
    prompt = prompt.strip() if isinstance(prompt, str) else ""
    if not prompt or any("\ud800" <= c <= "\udfff" for c in prompt):  # a surrogate: JSON can say it, UTF-8 cannot
        broken["without a prompt; write one or remove the line"].append(number)
    elif not all(value is None or isinstance(value, str) for value in (category, split)):
        broken["with a category or split that is no text; put it in quotes or leave it out"].append(number)
    else:
        yield number, prompt, category, split


def _text_rows(content: bytes, broken: _Broken) -> Iterator[_Row]:
    for number, text in _decoded(content, broken):
        yield from _row(number, text.partition("\t")[0], None, None, broken)


def _json_rows(content: bytes, broken: _Broken) -> Iterator[_Row]:
    for number, text in _decoded(content, broken):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            broken['not JSON; give one {"prompt": ...} a line'].append(number)
            continue
        fields = fields if isinstance(fields, dict) else {}
        yield from _row(number, fields.get("prompt"), fields.get("category"), fields.get("split"), broken)


def _parquet_rows(content: bytes, broken: _Broken) -> Iterator[_Row]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        raise ValueError(f"is no Parquet file ({error}); write it again") from error
    kinds = {name: file.schema_arrow.field(name).type for name in PROMPTS.names[1:] if name in file.schema_arrow.names}
    if "prompt" not in kinds:
        raise ValueError(
            f"has no column 'prompt' among {', '.join(file.schema_arrow.names)}; rename the one that is it"
        )
    for name, kind in kinds.items():
        if not _holds_text(kind):
            raise ValueError(f"has in column {name!r} {kind}, not text; write it as strings")
    number = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(kinds)):
        for fields in batch.to_pylist():
            number += 1
            yield from _row(number, fields["prompt"], fields.get("category"), fields.get("split"), broken)


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _table(rows: Iterator[_Row]) -> pa.Table:
    schema = PROMPTS.append(pa.field("line", pa.int64()))
    batches = []
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):  # no more Python objects at a time than these
        lines, prompts, categories, splits = zip(*chunk, strict=True)
        columns = [[prompt_id(prompt) for prompt in prompts], prompts, categories, splits, lines]
        batches.append(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema))
    return pa.Table.from_batches(batches, schema)


# ------------------------------------------------------------------------------------------ messages
def _counted(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def _places(where: str, lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:_LINES_SHOWN]))
    more = f" and {len(lines) - _LINES_SHOWN} more" if len(lines) > _LINES_SHOWN else ""
    return f"{where} {shown} is" if len(lines) == 1 else f"{where}s {shown}{more} are"


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def _skipped(row: dict, max_tokens: int) -> dict:
    message = f"{row['tokens']} tokens; the text encoder reads {max_tokens}"
    return {"prompt": row["prompt"], "stage": "prompts", "message": message}


# ------------------------------------------------------------------------------------------ plan
@dataclass(frozen=True)
class Shard:
    """Prompts whose candidates are written together, as one file `name`."""

    index: int
    name: str
    prompt_ids: list[str]
    prompts: list[str]
    categories: list[str | None]
    splits: list[str | None]


def plan_shards(table: pa.Table, prompts_per_shard: int, key: str) -> list[Shard]:
    """Cut a prompt table into shards, in its order; a shard's name is fixed by its place, `key` and its prompt ids."""
    shards = []
    for index, start in enumerate(range(0, len(table), prompts_per_shard)):
        ids, *columns = (column.to_pylist() for column in table.slice(start, prompts_per_shard).select(PROMPTS.names))
        digest = hashlib.sha256("\n".join([key, *ids]).encode()).hexdigest()[:12]
        shards.append(Shard(index, f"part-{index:05d}-{digest}.parquet", ids, *columns))
    return shards


def holdout(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Split a prompt table into what trains and what is held out, about `share` of it and at least one prompt each.

    A hash of (seed, prompt id) decides, so a prompt keeps its side when others come or go.

    Raises:
        ConfigError: there are fewer than two prompts.
    """
    if len(table) < 2:
        raise ConfigError(["evaluation.file: a single prompt cannot be split; give a file, or more prompts"])
    digests = (hashlib.sha256(f"{seed}:{i.as_py()}".encode()).digest()[:8] for i in table["prompt_id"])
    draws = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
    count = np.clip((draws < share).sum(), 1, len(table) - 1)
    held_out = np.zeros(len(table), bool)
    held_out[np.argsort(draws, kind="stable")[:count]] = True
    return table.filter(pa.array(~held_out)), table.filter(pa.array(held_out))
