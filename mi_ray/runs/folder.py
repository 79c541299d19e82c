"""The contents of a run folder: one config, parts committed exactly once, events. And the message for a full disk."""

import errno
import json
import os
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from mi_ray import storage
from mi_ray.config.paths import hashed_fields
from mi_ray.config.section import ConfigError, flatten


def check_writable(uri: str):
    """Check that a folder can be written to and that its store honours conditional writes, with every kind of request
    that a run makes: conditional and plain puts, Arrow's own (for checkpoints), reads, lists and deletes.

    If a local folder does not exist, it is not made: its nearest existing parent is checked.

    Raises:
        OSError: the folder cannot be made or written to, or two drivers could both get the lease there.
    """
    if "://" not in uri:
        folder = Path(uri).absolute()
        uri = str(next(there for there in (folder, *folder.parents) if there.exists()))
    probe = storage.join(uri, f".probe-{uuid.uuid4().hex}")
    first, second = storage.create_bytes(probe, b"1"), storage.create_bytes(probe, b"2")
    if first:
        storage.write_bytes(probe, b"3")
        kept = storage.read_bytes(probe)
    storage.delete(probe)
    if not first or second:
        raise OSError("its store does not honour conditional writes, which prevent two drivers in one run")
    if kept != b"3":
        raise OSError("its store does not give back what was written last")
    if "://" in uri:
        _try_as_arrow(storage.join(uri, f".probe-{uuid.uuid4().hex}"))


def _try_as_arrow(folder: str):
    """Write, list and delete a folder as Ray Train does with its checkpoints.

    Raises:
        OSError: the store refuses a request, or does not list what was written.
    """
    system, path = storage.filesystem(folder)
    with system.open_output_stream(f"{path}/file") as stream:
        stream.write(b"1")
    listed = storage.list_names(folder)
    with suppress(FileNotFoundError):  # of GCS, at the end, for a folder that is only in the names of its files
        system.delete_dir(path)
    if listed != ["file"]:
        raise OSError("its store does not list what was written")


@contextmanager
def full_disk_as_config_error(run_dir: str) -> Iterator[None]:
    """Report a full disk as one message, if this process or an actor (whose error Ray wraps) meets it.

    Raises:
        ConfigError: in place of an error that a full disk caused.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        advice = "free some space and run the same command again: it continues the run"
        raise ConfigError([f"run_dir: the disk of {run_dir!r} is full; {advice}"]) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_run_dir(run_dir: str, results: dict, model_commit: str | None):
    """Check that the folder can be written to, and that a run in it has the same config and model.

    Args:
        results: the fields that the results depend on, stored as `config` in run.json.
        model_commit: commit of a model from the hub, or digest of a model folder, stored as `model_commit` in run.json.

    Raises:
        ConfigError: with the fields that differ.
    """
    uri = storage.join(run_dir, "run.json")
    try:
        storage.check_reachable(run_dir)
        known = storage.exists(uri)
        check_writable(run_dir)
    except (OSError, ValueError) as error:
        message = f"run_dir: {run_dir!r} cannot be used ({error}); correct it or use another --run-dir"
        raise ConfigError([message]) from error
    if not known:
        return
    content = storage.read_json(uri)
    before, now = flatten(content["config"]), flatten(results)
    stored, given = hashed_fields(content["config"]), hashed_fields(results)
    if differing := [key for key in stored | given if stored.get(key) != given.get(key)]:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing)
        raise ConfigError(
            [
                f"run_dir: {run_dir!r} holds a run with another config: {changes}; change it back or use another"
                " --run-dir"
            ]
        )
    commit = content.get("model_commit")
    if commit and commit != model_commit:
        field = "model.path" if "model.path" in now else "model"
        if now[field].startswith("/"):
            fault = f"{now[field]!r} has other weights than at the start of this run; restore them"
        else:
            began = f"this run started with commit {commit} of the model, but now it is {model_commit}"
            fault = f"{began}; remove the revision"
        raise ConfigError([f"{field}: {fault}, or use another --run-dir"])


# ------------------------------------------------------------------------------------------ commits
MANIFEST = "_manifest.json"  # starts with an underscore: programs that read the folder as one table skip it
COMMITS = "_commits"


def commit(folder: str, name: str, table: pa.Table, receipt: dict) -> dict:
    """Add a part to a folder exactly once: first the table, then its receipt `_commits/<part>.json`.

    A part without a receipt does not count. Neither file is ever replaced: a second writer gets the first receipt.

    Args:
        receipt: facts about the part, so that readers need not open it.

    Returns:
        The receipt that is stored.
    """
    if not storage.create_bytes(storage.join(folder, name), storage.parquet_bytes(table)):
        receipt = receipt | _counts(folder, name)
    marker = storage.join(folder, COMMITS, f"{name}.json")
    storage.create_bytes(marker, json.dumps(receipt | {"name": name, "time": round(time.time(), 3)}).encode())
    return storage.read_json(marker)


def committed(folder: str, name: str) -> dict | None:
    """The receipt of a part. None if the part is not committed."""
    marker = storage.join(folder, COMMITS, f"{name}.json")
    return storage.read_json(marker) if storage.exists(marker) else None


def _counts(folder: str, name: str) -> dict[str, int]:
    table = storage.read_table(storage.join(folder, name), ["error"])
    return {"rows": len(table), "errors": len(table) - table["error"].null_count}


def adopt_parts(folder: str, names: list[str]) -> list[str]:
    """Commit complete parts without a receipt (a kill came between the two writes). Returns their names."""
    present = set(storage.list_names(folder)) & set(missing_parts(folder, names))
    for name in present:
        facts = _counts(folder, name) | {"name": name, "adopted": True, "time": round(time.time(), 3)}
        storage.create_bytes(storage.join(folder, COMMITS, f"{name}.json"), json.dumps(facts).encode())
    return sorted(present)


def missing_parts(folder: str, names: list[str]) -> list[str]:
    """The planned parts that are not committed yet."""
    present = set(storage.list_names(storage.join(folder, COMMITS)))
    return [name for name in names if f"{name}.json" not in present]


def remove_parts(folder: str, names: Collection[str]):
    """Remove parts from a folder. The receipt goes first, so that a kill leaves no receipt without a part."""
    committed = set(storage.list_names(storage.join(folder, COMMITS)))
    for name in names:
        if f"{name}.json" in committed:
            storage.delete(storage.join(folder, COMMITS, f"{name}.json"))
        storage.delete(storage.join(folder, name))


# ------------------------------------------------------------------------------------------ events
_pending: dict[str, list[bytes]] = {}  # {URI of an events.jsonl: lines not yet written to its object store}
_written_at: dict[str, float] = {}
EVENTS_EVERY = 10.0  # seconds; each time the whole file is written again


def log_event(run_dir: str, event: str, **facts: str | int | float | bool | None):
    """Append a line to events.jsonl: the event, its time and its facts. Only the holder of the lease may call it.

    Object stores have no append, so the frequent `shard_written` is delayed by up to `EVENTS_EVERY` seconds there. A
    kill loses no event: missing ones are made again from the receipts (`stages.shards.write_missing`).
    """
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}).encode() + b"\n"
    uri = storage.join(run_dir, "events.jsonl")
    system, path = storage.filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        with Path(path).open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):  # a kill has cut the last line
                line = b"\n" + line
            file.write(line)
        return
    waiting = _pending.setdefault(uri, [])
    waiting.append(line)
    if event == "shard_written" and time.monotonic() - _written_at.get(uri, 0.0) < EVENTS_EVERY:
        return
    before = storage.read_bytes(uri) if storage.exists(uri) else b""
    storage.write_bytes(uri, before + b"".join(waiting))
    waiting.clear()
    _written_at[uri] = time.monotonic()


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
