"""Where a run lies: URIs to filesystems, Arrow schemas of its tables, atomic writes, commits and events."""

import errno
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mi_ray import s3
from mi_ray.config import ConfigError, flatten

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------ schemas
def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": meaning})


_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])  # as Hugging Face datasets shows it
_LATENTS = pa.list_(pa.float16())

SCORES = {
    "mitune": "MI-TUNE on-trajectory score, nats; the released code's convention (no alpha_t), arXiv 2405.20759 alg. 2",
    "mitune_eq2": "MI-TUNE on-trajectory score, nats; with eq. 2's factor alpha_t, arXiv 2405.20759",
    "asd": "sum over the steps of ||conditional - unconditional prediction||^2, no weight (ASD / CFG-rejection)",
    "trajectory_banded": "the on-trajectory score score.banded, of the steps within score.log_snr_min..max, nats",
    "pmi": "log p(x|y) - log p(x), signed i_s over the band of log SNR, nats; arXiv 2310.07972 eq. 7",
    "pmi_orthogonal": "i_o: how much the prompt changes the prediction over the same band, >= 0, nats; eq. 8",
    "pmi_contrastive": "log p(x|y) - log mean_j p(x|y_j) over the nearest other prompts, same band, nats",
    "pmi_negatives": "log p(x|y) - logsumexp_j log p(x|y_j) over the prompt changed in one thing, same band, nats",
}


def score_columns(names: tuple[str, ...]) -> list[pa.Field]:
    return [_field(f"score_{name}", pa.float32(), SCORES[name]) for name in names]


_METRICS = [
    _field("exact", pa.float32(), "oracle: 1 if everything said is right and nothing is extra"),
    _field("objects", pa.float32(), "oracle: share of the named objects present with all their attributes"),
    _field("attributes", pa.float32(), "oracle: share of the named shapes, colours and textures that are right"),
    _field("count", pa.float32(), "oracle: share of the named kinds whose number is right"),
    _field("relation", pa.float32(), "oracle: 1 if the named relation holds; null where none is named"),
]


def candidates_schema(score_names: tuple[str, ...]) -> pa.Schema:
    """One row a candidate; a row whose `error` is set stands for a prompt (or candidate) that failed."""
    curve = pa.list_(pa.float32())
    return pa.schema(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "the prompt's category, if its file gives one"),
            _field("candidate_index", pa.int32(), "0 .. candidates_per_prompt - 1"),
            _field("seed", pa.int64(), "of the candidate's own noise generator"),
            _field("delta_sq", curve, "per step: squared norm of conditional minus unconditional epsilon"),
            _field("cross", curve, "per step: inner product of conditional epsilon and that difference"),
            *score_columns(score_names),
            *_METRICS,
            _field("pruned_after", pa.int32(), "steps after which pruning took it out; null: it was not"),
            _field("prune_score", pa.float32(), "score prune.by at the last cut that it faced; null: no pruning"),
            _field("rank", pa.int32(), "within the prompt by the selecting score, 0 is best"),
            _field("kept", pa.bool_(), "selected for fine-tuning"),
            _field("latents", _LATENTS, "clean latents, flat; of what some selection keeps"),
            _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
            _field("image", _IMAGE, "PNG; of what is kept or previewed"),
            _field("error", pa.string(), "why there is no result"),
        ]
    )


SELECTED = pa.schema(
    [
        _field("prompt_id", pa.string(), "hash of the prompt's text"),
        _field("prompt", pa.string(), "the prompt"),
        _field("candidate_index", pa.int32(), "which candidate"),
        _field("latents", _LATENTS, "clean latents, flat"),
        _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
        _field("weight", pa.float32(), "of the row in the training loss"),
    ]
)


def evaluation_schema() -> pa.Schema:
    """One row an image of one model."""
    return pa.schema(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "the prompt's category, if its file gives one"),
            _field("split", pa.string(), "test (in distribution) or ood, if the file says"),
            _field("image_index", pa.int32(), "0 .. images_per_prompt - 1"),
            _field("seed", pa.int64(), "of the image's own noise generator; the same for every model"),
            *score_columns(("pmi",)),
            *_METRICS,
            _field("features", pa.list_(pa.float32()), "of the image, for the quality measures"),
            _field("image", _IMAGE, "encoded as PNG"),
            _field("error", pa.string(), "why there is no result"),
        ]
    )


SCORED = pa.schema(
    [
        _field("key", pa.string(), "where the pair lies: a file, a file's row or line, a tar's member"),
        _field("prompt", pa.string(), "the caption"),
        _field("score_pmi", pa.float32(), SCORES["pmi"]),
        _field("score_pmi_se", pa.float32(), "standard error of score_pmi over the noise draws, nats"),
        _field("score_pmi_negatives", pa.float32(), SCORES["pmi_negatives"]),
        _field("score_pmi_negatives_se", pa.float32(), "standard error of score_pmi_negatives, nats"),
        _field("score_margin", pa.float32(), "log p(x|y) less the highest of its negatives' and log p(x), nats"),
        _field("score_margin_se", pa.float32(), "standard error of score_margin, nats"),
        _field("posterior", pa.float32(), "of the caption among itself and its negatives, all equally likely before"),
        _field(
            "contradicted_attribute",
            pa.string(),
            "color, shape, count, relation ...; null: no negative is clearly likelier",
        ),
        _field("contradicted_kind", pa.string(), "what sort of change the likeliest negative is"),
        _field("contradicted", pa.string(), "the caption's words that the image contradicts"),
        _field("instead", pa.string(), "what the likeliest negative says instead; empty: nothing"),
        _field("instead_posterior", pa.float32(), "of that negative"),
        _field(
            "words",
            pa.list_(pa.struct([("word", pa.string()), ("value", pa.float32()), ("standard_error", pa.float32())])),
            "of each word: log p(x|y) - log p(x|y without it), nats; empty if not asked for",
        ),
        _field("image", _IMAGE, "as the model saw it, small; of the shard's best and worst pairs"),
        _field("error", pa.string(), "why there is no score"),
    ]
)


# ------------------------------------------------------------------------------------------ files
def join(uri: str, *parts: str) -> str:
    """Append to the path of a URI; a query (s3://bucket/run?endpoint_override=...) stays at its end."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path on it.

    Raises:
        ValueError: an unknown scheme, or a URI that carries credentials, which would end in logs and in run.json.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "the URI carries credentials; take them out: they come from the environment or an instance role"
        )
    if not uri.startswith("s3://"):
        return pafs.FileSystem.from_uri(uri)
    return s3.filesystem(uri)


def relative(uri: str, folder: str) -> str:
    """The path of what lies in a folder, from there."""
    return filesystem(uri)[1].removeprefix(filesystem(folder)[1] + "/")


_PASSING = ("INTERNAL_FAILURE", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "NETWORK_CONNECTION", "REQUEST_TIMEOUT")


def _patiently(read: Callable[[], Result]) -> Result:
    """Read again after an error that passes. Arrow does so itself, but for errors whose text is longer than the range
    that was asked for, which are the rule with small files."""
    for pause in (0.2, 1.0, 3.0, 10.0, None):
        try:
            return read()
        except OSError as error:
            if pause is None or not any(name in str(error) for name in _PASSING):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def exists(uri: str) -> bool:
    system, path = filesystem(uri)
    return _patiently(lambda: system.get_file_info(path).type) != pafs.FileType.NotFound


def list_names(uri: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; none if it does not exist."""
    system, path = filesystem(uri)
    found = _patiently(lambda: system.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
    return sorted(info.base_name for info in found)


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
        with system.open_output_stream(path) as stream:
            stream.write(content)
        return
    with _partial(Path(path), content) as partial:
        partial.replace(path)


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

    A hard link does it on a local disk, a put with `If-None-Match: *` on S3.

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
    if not uri.startswith("s3://"):
        raise ValueError(f"{uri} is on no store with conditional writes; give a local folder or an s3:// URI")
    # After a refusal: it may be our own, if the answer to an earlier attempt was lost.
    return s3.create(uri, content) or read_bytes(uri) == content


def delete(uri: str):
    system, path = filesystem(uri)
    system.delete_file(path)


def check_writable(uri: str):
    """Write and delete a small file, and see that the store keeps a second writer from it.

    Raises:
        OSError: the folder cannot be made or written to, or two drivers could both win there.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    first, second = create_bytes(probe, b"1"), create_bytes(probe, b"2")
    delete(probe)
    if not first or second:
        raise OSError("its store does not honour If-None-Match, which keeps two drivers apart")


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


def check_run_dir(run_dir: str, results: dict):
    """See that the folder can be written to, and that what it holds was made by the same config.

    Args:
        results: what the results depend on, as run.json holds it under `config`.

    Raises:
        ConfigError: naming the fields that differ.
    """
    uri = join(run_dir, "run.json")
    try:
        known = exists(uri)
        check_writable(run_dir)
    except (OSError, ValueError) as error:
        message = f"run_dir: {run_dir!r} cannot be written to ({error}); give another --run-dir"
        raise ConfigError([message]) from error
    if not known:
        return
    before, now = flatten(read_json(uri)["config"]), flatten(results)
    if differing := [key for key in before | now if before.get(key) != now.get(key)]:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing)
        raise ConfigError(
            [f"run_dir: {run_dir!r} holds a run of another config: {changes}; undo that or give another --run-dir"]
        )


def read_json(uri: str) -> dict:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: dict):
    write_bytes(uri, json.dumps(value, indent=2, allow_nan=False).encode())


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_table(uri: str, table: pa.Table):
    write_bytes(uri, _parquet(table))


def _read_parquet(system: pafs.FileSystem, path: str, columns: list[str] | None) -> pa.Table:
    # No partitioning: a folder named lr=1e-4 on the way to the file is no column.
    return _patiently(lambda: pq.read_table(path, columns=columns, filesystem=system, partitioning=None))


def read_tables(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All parts of a folder as one table, in the order of their names."""
    system, path = filesystem(folder)
    parts = [f"{path}/{name}" for name in list_names(folder) if name.endswith(".parquet")]
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
                with system.open_output_stream(path) as stream:
                    shutil.copyfileobj(file, stream, 1 << 22)


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
        first, last = np.searchsorted(self._ends, [start, max(start, stop - 1)], side="right")
        groups = list(range(first, min(last + 1, len(self._ends))))
        begins = 0 if first == 0 else int(self._ends[first - 1])
        table = _patiently(lambda: self._file.read_row_groups(groups, columns))
        return table.slice(start - begins, stop - start)

    def batches(self, columns: list[str] | None = None, size: int = 1 << 14) -> Iterator[pa.RecordBatch]:
        """All rows in order, at most `size` at a time."""
        # A reader holds on to what it has read, so each one reads some of the groups.
        groups = range(len(self._ends))
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
    if not create_bytes(join(folder, name), _parquet(table)):
        receipt = receipt | _counts(folder, name)
    marker = join(folder, COMMITS, f"{name}.json")
    create_bytes(marker, json.dumps(receipt | {"name": name, "time": round(time.time(), 3)}).encode())
    return read_json(marker)


def committed(folder: str, name: str) -> dict | None:
    """The receipt of a part; None if it is not committed."""
    marker = join(folder, COMMITS, f"{name}.json")
    return read_json(marker) if exists(marker) else None


def _counts(folder: str, name: str) -> dict[str, int]:
    table = read_table(join(folder, name), ["error"])
    return {"rows": len(table), "errors": len(table) - table["error"].null_count}


def adopt_parts(folder: str, names: list[str]) -> list[str]:
    """Commit the parts that are whole but lack their marker: a kill came between the two. Returns their names."""
    present = set(list_names(folder)) & set(missing_parts(folder, names))
    for name in present:
        facts = _counts(folder, name) | {"name": name, "adopted": True, "time": round(time.time(), 3)}
        create_bytes(join(folder, COMMITS, f"{name}.json"), json.dumps(facts).encode())
    return sorted(present)


def missing_parts(folder: str, names: list[str]) -> list[str]:
    """Which of the planned parts are not committed yet."""
    present = set(list_names(join(folder, COMMITS)))
    return [name for name in names if f"{name}.json" not in present]


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
    uri = join(run_dir, "events.jsonl")
    system, path = filesystem(uri)
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
    before = read_bytes(uri) if exists(uri) else b""
    write_bytes(uri, before + b"".join(waiting))
    waiting.clear()
    _written_at[uri] = time.monotonic()


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


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
