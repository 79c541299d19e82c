"""What makes a folder a run's: one config, parts committed exactly once, events, and word of a full disk."""

import errno
import json
import os
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from mi_ray import storage
from mi_ray.config.paths import counted
from mi_ray.config.section import ConfigError, flatten


def check_writable(uri: str):
    """Write and delete a small file, and see that the store keeps a second writer from it.

    A folder on a disk that does not exist yet is not made: what would hold it is tried.

    Raises:
        OSError: the folder cannot be made or written to, or two drivers could both win there.
    """
    if "://" not in uri:
        folder = Path(uri).absolute()
        uri = str(next(there for there in (folder, *folder.parents) if there.exists()))
    probe = storage.join(uri, f".probe-{uuid.uuid4().hex}")
    first, second = storage.create_bytes(probe, b"1"), storage.create_bytes(probe, b"2")
    storage.delete(probe)
    if not first or second:
        raise OSError("its store does not honour conditional writes, which keep two drivers apart")


@contextmanager
def full_disk_told(run_dir: str) -> Iterator[None]:
    """Tell of a full disk in one message, whether this process met it or an actor, whose error Ray has wrapped.

    Raises:
        ConfigError: instead of what a full disk is behind.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        advice = "make room and give the same command again: it goes on from what is written"
        raise ConfigError([f"run_dir: the disk of {run_dir!r} is full; {advice}"]) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_run_dir(run_dir: str, results: dict, model_commit: str | None):
    """See that the folder can be written to, and that what it holds was made by the same config and model.

    Args:
        results: what the results depend on, as run.json holds it under `config`.
        model_commit: of a model from the hub, or the digest of a folder's, as run.json holds it under that name.

    Raises:
        ConfigError: naming the fields that differ.
    """
    uri = storage.join(run_dir, "run.json")
    try:
        known = storage.exists(uri)
        check_writable(run_dir)
    except (OSError, ValueError) as error:
        message = f"run_dir: {run_dir!r} cannot be written to ({error}); give another --run-dir"
        raise ConfigError([message]) from error
    if not known:
        return
    content = storage.read_json(uri)
    before, now = flatten(content["config"]), flatten(results)
    began, now_counted = counted(content["config"]), counted(results)
    if differing := [key for key in began | now_counted if began.get(key) != now_counted.get(key)]:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing)
        raise ConfigError(
            [f"run_dir: {run_dir!r} holds a run of another config: {changes}; undo that or give another --run-dir"]
        )
    commit = content.get("model_commit")
    if commit and commit != model_commit:
        field = "model.path" if "model.path" in now else "model"
        if now[field].startswith("/"):
            fault = f"{now[field]!r} holds other weights than those that this run began with; put those back"
        else:
            fault = (
                f"this run began with commit {commit} of the model, and this is {model_commit}; leave its revision out"
            )
        raise ConfigError([f"{field}: {fault} or give another --run-dir"])


# ------------------------------------------------------------------------------------------ commits
MANIFEST = "_manifest.json"  # readers of the folder as one table skip a leading underscore
COMMITS = "_commits"


def commit(folder: str, name: str, table: pa.Table, receipt: dict) -> dict:
    """Add a part to a folder, once: the table first, then `_commits/<part>.json`, which makes it count.

    Neither is ever replaced. Whoever comes second finds the part there and gets the first one's receipt.

    Args:
        receipt: what is to be known about the part without opening it.

    Returns:
        The receipt that counts.
    """
    if not storage.create_bytes(storage.join(folder, name), storage.parquet_bytes(table)):
        receipt = receipt | _counts(folder, name)
    marker = storage.join(folder, COMMITS, f"{name}.json")
    storage.create_bytes(marker, json.dumps(receipt | {"name": name, "time": round(time.time(), 3)}).encode())
    return storage.read_json(marker)


def committed(folder: str, name: str) -> dict | None:
    """The receipt of a part; None if it is not committed."""
    marker = storage.join(folder, COMMITS, f"{name}.json")
    return storage.read_json(marker) if storage.exists(marker) else None


def _counts(folder: str, name: str) -> dict[str, int]:
    table = storage.read_table(storage.join(folder, name), ["error"])
    return {"rows": len(table), "errors": len(table) - table["error"].null_count}


def adopt_parts(folder: str, names: list[str]) -> list[str]:
    """Commit the parts that are whole but lack their marker: a kill came between the two. Returns their names."""
    present = set(storage.list_names(folder)) & set(missing_parts(folder, names))
    for name in present:
        facts = _counts(folder, name) | {"name": name, "adopted": True, "time": round(time.time(), 3)}
        storage.create_bytes(storage.join(folder, COMMITS, f"{name}.json"), json.dumps(facts).encode())
    return sorted(present)


def missing_parts(folder: str, names: list[str]) -> list[str]:
    """Which of the planned parts are not committed yet."""
    present = set(storage.list_names(storage.join(folder, COMMITS)))
    return [name for name in names if f"{name}.json" not in present]


def remove_parts(folder: str, names: Collection[str]):
    """Take parts out of a folder, receipt first, so that a kill leaves none that counts."""
    committed = set(storage.list_names(storage.join(folder, COMMITS)))
    for name in names:
        if f"{name}.json" in committed:
            storage.delete(storage.join(folder, COMMITS, f"{name}.json"))
        storage.delete(storage.join(folder, name))


# ------------------------------------------------------------------------------------------ events
_pending: dict[str, list[bytes]] = {}  # by URI of an events.jsonl: lines that its object store has not got yet
_written_at: dict[str, float] = {}
EVENTS_EVERY = 10.0  # seconds; each time the whole file is put anew


def log_event(run_dir: str, event: str, **facts: str | int | float | bool | None):
    """Append a line to events.jsonl: what happened, when, to what. The holder of the run alone calls it.

    Object stores have no append: there, the frequent `shard_written` waits for up to `EVENTS_EVERY` seconds. A kill
    loses none of them, for they are made again from the receipts (`stages.generate`).
    """
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}).encode() + b"\n"
    uri = storage.join(run_dir, "events.jsonl")
    system, path = storage.filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem):
        with Path(path).open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):  # a kill cut the last line short
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
