"""Where data lies: URIs to filesystems, files written whole or not at all, tables and lines."""

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mi_ray.config.section import holds_credentials
from mi_ray.storage import gcs, s3

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------ files
def join(uri: str, *parts: str) -> str:
    """Append to the path of a URI; a query (s3://bucket/run?endpoint_override=...) stays at its end."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path on it.

    Raises:
        ValueError: an unknown scheme, one whose package is not installed, or a URI that carries credentials, which
            would end in logs and in run.json.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    if holds_credentials(uri):
        raise ValueError(
            "the URI carries credentials; take them out: they come from the environment, "
            "an instance role or a service account"
        )
    store = _store(uri)
    return store.filesystem(uri) if store else pafs.FileSystem.from_uri(uri)


def _store(uri: str) -> ModuleType | None:
    """What speaks to the object store of a URI; None: a store without conditional writes."""
    return {"s3": s3, "gs": gcs}.get(uri.partition("://")[0])


def relative(uri: str, folder: str) -> str:
    """The path of what lies in a folder, from there."""
    return filesystem(uri)[1].removeprefix(filesystem(folder)[1] + "/")


_PASSING = ("INTERNAL_FAILURE", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "NETWORK_CONNECTION", "REQUEST_TIMEOUT")


def is_passing(error: Exception) -> bool:
    """Whether a store says that it fails for now, not that something is wrong with what was asked for."""
    return any(name in str(error) for name in _PASSING)


def _patiently(read: Callable[[], Result]) -> Result:
    """Read again after an error that passes. Arrow does so itself, but for errors whose text is longer than the range
    that was asked for, which are the rule with small files."""
    for pause in (0.2, 1.0, 3.0, 10.0, None):
        try:
            return read()
        except OSError as error:
            if pause is None or not is_passing(error):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def exists(uri: str) -> bool:
    system, path = filesystem(uri)
    return _patiently(lambda: system.get_file_info(path).type) != pafs.FileType.NotFound


def list_names(uri: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; none if it does not exist."""
    if _store(uri) is gcs:
        return gcs.list_names(uri)
    system, path = filesystem(uri)
    found = _patiently(lambda: system.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
    return sorted(info.base_name for info in found)


def list_tables(uri: str) -> list[str]:
    """Names of the Parquet files in a folder, sorted; none if it does not exist."""
    return [name for name in list_names(uri) if name.endswith(".parquet")]


def read_bytes(uri: str) -> bytes:
    system, path = filesystem(uri)

    def read() -> bytes:
        with system.open_input_stream(path) as stream:
            return stream.read()

    return _patiently(read)


def read_chunks(uri: str, size: int = 1 << 22) -> Iterator[bytes]:
    """The content of a file, `size` bytes at a time."""
    system, path = filesystem(uri)
    with _patiently(lambda: system.open_input_file(path)) as file:
        for start in range(0, file.size(), size):
            yield _patiently(lambda start=start: file.read_at(size, start))


def write_bytes(uri: str, content: bytes):
    """Write a file whole or not at all: a rename on a local disk, one put on an object store."""
    system, path = filesystem(uri)
    if not isinstance(system, pafs.LocalFileSystem):
        put(uri, content)
        return
    with _partial(Path(path), content) as partial:
        partial.replace(path)


def put(uri: str, content: bytes | BinaryIO):
    """One put of what is not on a local disk; whole or not at all on the stores that are known."""
    if store := _store(uri):
        return store.put(uri, content)
    system, path = filesystem(uri)
    with system.open_output_stream(path) as stream:
        shutil.copyfileobj(BytesIO(content) if isinstance(content, bytes) else content, stream, 1 << 22)


@contextmanager
def _partial(target: Path, content: bytes) -> Iterator[Path]:
    """The content under another name beside its target, on the disk for sure; gone at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write a file whole, unless there is one of that name: of several writers at once, one alone wins.

    A hard link does it on a local disk, a put with `If-None-Match: *` on S3, with `ifGenerationMatch=0` on Google's.

    Returns:
        Whether the file holds this content now by this call.

    Raises:
        ValueError: the store of the URI has neither.
    """
    system, path = filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        with _partial(Path(path), content) as partial:
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
        return True
    store = _store(uri)
    if store is None:
        message = f"{uri} is on no store with conditional writes; give a local folder or an s3:// or gs:// URI"
        raise ValueError(message)
    # After a refusal: it may be our own, if the answer to an earlier attempt was lost.
    return store.create(uri, content) or read_bytes(uri) == content


def delete(uri: str):
    system, path = filesystem(uri)
    system.delete_file(path)


def read_json(uri: str) -> dict:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: dict):
    write_bytes(uri, json.dumps(value, indent=2, allow_nan=False).encode())


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_table(uri: str, table: pa.Table):
    write_bytes(uri, parquet_bytes(table))


def _read_parquet(system: pafs.FileSystem, path: str, columns: list[str] | None) -> pa.Table:
    # No partitioning: a folder named lr=1e-4 on the way to the file is no column.
    table = _patiently(lambda: pq.read_table(path, columns=columns, filesystem=system, partitioning=None))
    check_plain(table.schema, table.schema.names)
    return table


def check_plain(schema: pa.Schema, columns: list[str]):
    """See that some columns are of Arrow's own types: an extension type's values are what some library makes of them,
    and Ray's unpickles them, which lets a file run code.

    Raises:
        ValueError: one is not.
    """
    for name in columns:
        if _is_extended(schema.field(name).type):
            kind = schema.field(name).type
            raise ValueError(
                f"column {name!r} is of the type {kind}, whose values may be code; write it as a plain one"
            )


def _is_extended(kind: pa.DataType) -> bool:
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(i).type for i in range(kind.num_fields)]
    return isinstance(kind, pa.BaseExtensionType) or any(map(_is_extended, inner))


def read_tables(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All parts of a folder as one table, in the order of their names."""
    system, path = filesystem(folder)
    parts = [f"{path}/{name}" for name in list_tables(folder)]
    return pa.concat_tables([_read_parquet(system, part, columns) for part in parts])


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    return _read_parquet(*filesystem(uri), columns)


@contextmanager
def table_writer(uri: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a Parquet file piece by piece, whole or not at all: until it is whole it lies under another name, or on
    this machine's disk if its place is an object store."""
    system, path = filesystem(uri)
    local = isinstance(system, pafs.LocalFileSystem)
    if local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mi_ray-", dir=Path(path).parent if local else None) as folder:
        partial = Path(folder) / "table.parquet"
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            yield writer
        with partial.open("rb+") as file:
            if local:
                os.fsync(file.fileno())
                partial.replace(path)
            else:
                put(uri, file)


class ParquetRows:
    """Rows of a Parquet file by their numbers, of which no more is read than the row groups that hold them."""

    def __init__(self, uri: str):
        system, path = filesystem(uri)
        self.uri = uri
        self._file = _patiently(lambda: pq.ParquetFile(system.open_input_file(path)))
        groups = range(self._file.num_row_groups)
        self._ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows start to stop, as many of them as there are."""
        check_plain(self.schema, columns or self.schema.names)
        first, last = np.searchsorted(self._ends, [start, max(start, stop - 1)], side="right")
        groups = list(range(first, min(last + 1, len(self._ends))))
        begins = 0 if first == 0 else int(self._ends[first - 1])
        table = _patiently(lambda: self._file.read_row_groups(groups, columns))
        return table.slice(start - begins, stop - start)

    def batches(self, columns: list[str] | None = None, size: int = 1 << 14) -> Iterator[pa.RecordBatch]:
        """All rows in order, at most `size` at a time."""
        # A reader holds on to what it has read, so each one reads some of the groups.
        groups = range(len(self._ends))
        check_plain(self.schema, columns or self.schema.names)
        for _, some in groupby(groups, lambda group: int(self._ends[group] - 1) // size):
            yield from self._file.iter_batches(size, list(some), columns)


def local_folder(uri: str) -> str:
    """The path of a folder on this machine's disk; a remote one's files are copied to a temporary folder."""
    system, path = filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        return path
    copy = tempfile.mkdtemp(prefix="mi_ray-")
    for info in system.get_file_info(pafs.FileSelector(path)):
        if info.type == pafs.FileType.File:
            (Path(copy) / info.base_name).write_bytes(read_bytes(join(uri, info.base_name)))
    return copy


def iter_lines(uri: str) -> Iterator[dict]:
    """The lines of a .jsonl file; none if it is missing. A line that a kill cut short is left out."""
    rest = b""
    for chunk in chain(read_chunks(uri), [b"\n"]) if exists(uri) else ():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read_lines(uri: str) -> list[dict]:
    """The same, all at once."""
    return list(iter_lines(uri))
