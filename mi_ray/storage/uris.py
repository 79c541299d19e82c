"""Access to data by URI: filesystems, atomic writes, tables and JSON lines."""

import ctypes
import errno
import json
import os
import shutil
import sys
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

from mi_ray.config.section import holds_credentials, split_query
from mi_ray.storage import gcs, s3

Result = TypeVar("Result")
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of Linux's renameat2
_RENAME_EXCL = 4  # of macOS's renamex_np


# ------------------------------------------------------------------------------------------ files
def join(uri: str, *parts: str) -> str:
    """Append parts to the path of a URI. A query (s3://bucket/run?endpoint_override=...) stays at the
    end; where a part holds a `?`, an empty query keeps the two apart."""
    path, query = split_query(uri) if "://" in uri else (uri, "")
    joined = "/".join([path.rstrip("/"), *parts])
    return f"{joined}?{query}" if query or ("://" in uri and "?" in joined) else joined


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path on it.

    Raises:
        ValueError: the scheme is unknown, its package is not installed, or the URI contains credentials, which would
            end up in logs and in run.json.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    if holds_credentials(uri):
        raise ValueError(
            "the URI contains credentials, which would end up in logs; remove them and use the environment, an instance"
            " role or a service account"
        )
    store = _store(uri)
    return store.filesystem(uri) if store else pafs.FileSystem.from_uri(uri)


def _store(uri: str) -> ModuleType | None:
    """The module for the object store of a URI. None: a store without conditional writes."""
    return {"s3": s3, "gs": gcs}.get(uri.partition("://")[0])


def relative(uri: str, folder: str) -> str:
    """The path of a file relative to a folder that contains it."""
    return filesystem(uri)[1].removeprefix(filesystem(folder)[1] + "/")


_TRANSIENT_ERRORS = ("INTERNAL_FAILURE", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "NETWORK_CONNECTION", "REQUEST_TIMEOUT")


def is_transient(error: Exception) -> bool:
    """Whether an error of a store is temporary, so that the same request may succeed later."""
    return any(name in str(error) for name in _TRANSIENT_ERRORS)


def _with_retries(read: Callable[[], Result]) -> Result:
    """Retry a read after a temporary error.

    Arrow retries too, but not if the text of the error is longer than the requested range, as often with small files.
    """
    for pause in (0.2, 1.0, 3.0, 10.0, None):
        try:
            return read()
        except OSError as error:
            if pause is None or not is_transient(error):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def exists(uri: str) -> bool:
    system, path = filesystem(uri)
    return _with_retries(lambda: system.get_file_info(path).type) != pafs.FileType.NotFound


def list_names(uri: str) -> list[str]:
    """Names of the files and folders in a folder, sorted. Empty if the folder does not exist."""
    if _store(uri) is gcs:
        return gcs.list_names(uri)
    system, path = filesystem(uri)
    select = pafs.FileSelector(path, allow_not_found=True)
    try:
        found = _with_retries(lambda: system.get_file_info(select))
    except FileNotFoundError:  # Arrow lists the folder first, then looks whether it exists; it was created in between
        found = _with_retries(lambda: system.get_file_info(select))
    return sorted(info.base_name for info in found)


def list_tables(uri: str) -> list[str]:
    """Names of the Parquet files in a folder, sorted. Empty if the folder does not exist."""
    return [name for name in list_names(uri) if name.endswith(".parquet")]


def read_bytes(uri: str) -> bytes:
    system, path = filesystem(uri)

    def read() -> bytes:
        with system.open_input_stream(path) as stream:
            return stream.read()

    return _with_retries(read)


def read_chunks(uri: str, size: int = 1 << 22, start: int = 0) -> Iterator[bytes]:
    """The content of a file from an offset on, `size` bytes at a time."""
    system, path = filesystem(uri)
    with _with_retries(lambda: system.open_input_file(path)) as file:
        for at in range(start, file.size(), size):
            yield _with_retries(lambda at=at: file.read_at(size, at))


def unpacked_chunks(uri: str, size: int = 1 << 22) -> Iterator[bytes]:
    """The content of a file, decompressed if its name ends in .gz, about `size` bytes at a time."""
    system, path = filesystem(uri)
    with _with_retries(lambda: system.open_input_stream(path)) as stream:  # Arrow goes by the name
        while chunk := stream.read(size):
            yield chunk


def write_bytes(uri: str, content: bytes):
    """Write a file atomically: by a rename on a local disk, by one put on an object store."""
    system, path = filesystem(uri)
    if not isinstance(system, pafs.LocalFileSystem):
        put(uri, content)
        return
    with _partial(Path(path), content) as partial:
        partial.replace(path)


def put(uri: str, content: bytes | BinaryIO):
    """Put a file on an object store, atomically on S3 and GCS."""
    if store := _store(uri):
        return store.put(uri, content)
    system, path = filesystem(uri)
    with system.open_output_stream(path) as stream:
        shutil.copyfileobj(BytesIO(content) if isinstance(content, bytes) else content, stream, 1 << 22)


@contextmanager
def _partial(target: Path, content: bytes) -> Iterator[Path]:
    """A temporary file with the content, beside its target and flushed to disk. It is removed at the end."""
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
    """Write a file atomically if none of this name exists. Of several writers at once, exactly one succeeds.

    It uses a hard link on a local disk, or a rename that replaces nothing where the file system has no hard links; a
    put with `If-None-Match: *` on S3; and `ifGenerationMatch=0` on GCS.

    Returns:
        Whether this call wrote the file.

    Raises:
        ValueError: the store of the URI has no conditional writes.
    """
    system, path = filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        with _partial(Path(path), content) as partial:
            return _place_new(partial, path)
    store = _store(uri)
    if store is None:
        message = (
            f"{uri} is on a store without conditional writes, which are needed; use a local folder, s3:// or gs://"
        )
        raise ValueError(message)
    # After a refusal, the file may still be ours, if the answer to an earlier attempt was lost.
    return store.create(uri, content) or read_bytes(uri) == content


def _place_new(partial: Path, path: str) -> bool:
    """Give a complete file its name, unless there is one of this name. Returns whether it has got it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # exFAT, SMB and FUSE have no hard links
        return _rename_new(str(partial), path)
    return True


def _rename_new(source: str, target: str) -> bool:
    """Rename a file, unless the target exists; the system does both at once. Returns whether it was renamed."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(os.fsencode(source), os.fsencode(target), _RENAME_EXCL)
        else:
            failed = library.renameat2(
                _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
            )
    except AttributeError:  # another system, or an old C library
        failed, number = True, errno.ENOSYS
    else:
        number = ctypes.get_errno()
    if failed and number != errno.EEXIST:
        lacks = "its file system has neither hard links nor renames that replace nothing, of which a run needs one"
        raise OSError(number, f"{lacks} ({os.strerror(number)})")
    return not failed


def check_reachable(uri: str):
    """Check that the store of a URI answers, with one attempt of a few seconds. Local paths pass.

    Raises:
        OSError: it does not answer, or its certificate is not trusted.
        ValueError: the URI is not valid.
    """
    store = _store(uri) if "://" in uri else None
    if store:
        store.check_reachable(uri)


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
    # No partitioning: otherwise a folder named lr=1e-4 in the path would become a column.
    table = _with_retries(lambda: pq.read_table(path, columns=columns, filesystem=system, partitioning=None))
    check_plain(table.schema, table.schema.names)
    return table


def check_plain(schema: pa.Schema, columns: list[str]):
    """Check that columns have plain Arrow types. Extension types are refused: Ray's unpickles its values, so a file
    could run code.

    Raises:
        ValueError: a column has an extension type.
    """
    for name in columns:
        if _is_extended(schema.field(name).type):
            kind = schema.field(name).type
            raise ValueError(
                f"column {name!r} has the type {kind}, whose values may be code; write it with a plain Arrow type"
            )


def _is_extended(kind: pa.DataType) -> bool:
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(i).type for i in range(kind.num_fields)]
    return isinstance(kind, pa.BaseExtensionType) or any(map(_is_extended, inner))


def read_tables(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All Parquet files of a folder as one table, in the order of their names."""
    system, path = filesystem(folder)
    parts = [f"{path}/{name}" for name in list_tables(folder)]
    return pa.concat_tables([_read_parquet(system, part, columns) for part in parts])


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    return _read_parquet(*filesystem(uri), columns)


@contextmanager
def new_file(uri: str) -> Iterator[Path]:
    """The place of a file that the caller writes in pieces. It gets its name when it is complete, and never otherwise.
    Until then it is in a temporary folder beside its destination, or on this machine's disk for an object store."""
    system, path = filesystem(uri)
    local = isinstance(system, pafs.LocalFileSystem)
    if local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mi_ray-", dir=Path(path).parent if local else None) as folder:
        partial = Path(folder) / "partial"
        yield partial
        with partial.open("rb+") as file:
            if local:
                os.fsync(file.fileno())
                partial.replace(path)
            else:
                put(uri, file)


@contextmanager
def table_writer(uri: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a Parquet file in pieces, atomically."""
    with new_file(uri) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        yield writer


class ParquetRows:
    """Rows of a Parquet file by number. It reads only the row groups that contain them."""

    def __init__(self, uri: str):
        system, path = filesystem(uri)
        self.uri = uri
        self._file = _with_retries(lambda: pq.ParquetFile(system.open_input_file(path)))
        groups = range(self._file.num_row_groups)
        self._ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows start to stop (exclusive), or to the end of the file."""
        check_plain(self.schema, columns or self.schema.names)
        first, last = np.searchsorted(self._ends, [start, max(start, stop - 1)], side="right")
        groups = list(range(first, min(last + 1, len(self._ends))))
        begins = 0 if first == 0 else int(self._ends[first - 1])
        table = _with_retries(lambda: self._file.read_row_groups(groups, columns))
        return table.slice(start - begins, stop - start)

    def batches(self, columns: list[str] | None = None, size: int = 1 << 14) -> Iterator[pa.RecordBatch]:
        """All rows in order, at most `size` at a time."""
        # A reader keeps in memory what it has read, so each reader reads only a few row groups.
        groups = range(len(self._ends))
        check_plain(self.schema, columns or self.schema.names)
        for _, some in groupby(groups, lambda group: int(self._ends[group] - 1) // size):
            yield from self._file.iter_batches(size, list(some), columns)


def local_folder(uri: str) -> str:
    """The path of a folder on this machine's disk. The files of a remote folder are copied to a temporary one."""
    system, path = filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        return path
    copy = tempfile.mkdtemp(prefix="mi_ray-")
    for info in system.get_file_info(pafs.FileSelector(path)):
        if info.type == pafs.FileType.File:
            (Path(copy) / info.base_name).write_bytes(read_bytes(join(uri, info.base_name)))
    return copy


def iter_lines(uri: str) -> Iterator[dict]:
    """The lines of a .jsonl file; empty if the file is missing. Lines that are not JSON (cut by a kill) are skipped."""
    rest = b""
    for chunk in chain(read_chunks(uri), [b"\n"]) if exists(uri) else ():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read_lines(uri: str) -> list[dict]:
    """The lines of a .jsonl file as a list, see `iter_lines`."""
    return list(iter_lines(uri))
