"""Writes the input's rows without the pairs that were called wrong, in the input's own form: `jobs/score.py --keep`."""

import gzip
import json
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from mi_ray import storage
from mi_ray.config.section import ConfigError, split_query
from mi_ray.inputs import text
from mi_ray.inputs.pair_readers import LONGEST_LINE, member_stem
from mi_ray.inputs.pairs import PairPlan
from mi_ray.inputs.records import form_of, read_records


def check_keep(plan: PairPlan, destination: str) -> tuple[str, str]:
    """The kind and the URI of what the plan reads, if its rows can be written to this file.

    Raises:
        ConfigError: the input has several files with pairs, the file's type is not the input's, or its store does not
            answer.
    """
    sources = dict.fromkeys((place["kind"], place["uri"]) for place in map(json.loads, (s.source for s in plan)))
    if len(sources) > 1:
        raise ConfigError([f"keep: the input has {len(sources)} files with pairs; give one of them as input"])
    ((kind, uri),) = sources
    wanted = ".jsonl" if kind == "folder" else _suffix(uri)
    if _suffix(destination) != wanted:
        raise ConfigError([f"keep: {text.excerpt(destination)!r} is not of the input's type; end it in {wanted}"])
    if storage.filesystem(destination)[1] == storage.filesystem(uri)[1]:
        raise ConfigError(["keep: it is the input itself; give another file"])
    try:
        storage.check_reachable(destination)
    except OSError as error:
        raise ConfigError([f"keep: {text.reason(error)}"]) from error
    return kind, uri


def write_kept(plan: PairPlan, destination: str, scores: str) -> tuple[int, int]:
    """Write the input's rows without those called wrong. Rows that were not scored stay.

    Args:
        scores: folder of the tables that hold the scores of the plan's shards.

    Returns:
        The number of pairs kept and of pairs left out.

    Raises:
        ConfigError: as `check_keep`, or the file cannot be written.
    """
    kind, uri = check_keep(plan, destination)
    wrong, kept, remaining = set(), [], 0
    for shard in plan:
        table = storage.read_table(
            storage.join(scores, shard.name), ["key", "file", "prompt", "contradicted_attribute"]
        )
        is_wrong = pc.is_valid(table["contradicted_attribute"])
        wrong |= {key.removeprefix(f"{uri}#") for key in table.filter(is_wrong)["key"].to_pylist()}
        remaining += len(table) - (pc.sum(is_wrong).as_py() or 0)
        if kind == "folder":
            kept += table.filter(pc.invert(is_wrong)).select(["file", "prompt"]).to_pylist()
    try:
        if kind == "parquet":
            _write_parquet(uri, destination, {int(key) for key in wrong})
        elif kind == "tar":
            _write_tar(uri, destination, wrong)
        else:
            lines = map(_listed, kept) if kind == "folder" else _rows_without(uri, {int(key) for key in wrong})
            opener = gzip.open if _suffix(destination).endswith(".gz") else open
            with storage.new_file(destination) as partial, opener(partial, "wb") as file:
                file.writelines(line.encode(errors="surrogateescape") for line in lines)
    except OSError as error:
        raise ConfigError(
            [f"keep: {destination!r} cannot be written ({text.reason(error)}); give another file"]
        ) from error
    return remaining, len(wrong)


def _suffix(uri: str) -> str:
    """What the name of a table or tar ends with, in lower case and without synonyms."""
    name = PurePosixPath(split_query(uri)[0] if "://" in uri else uri).name.lower()
    name = name.replace(".tgz", ".tar.gz").replace(".ndjson", ".jsonl")
    path = PurePosixPath(name)
    packed = path.suffix if path.suffix in (".gz", ".bz2", ".xz") else ""
    return PurePosixPath(name.removesuffix(packed)).suffix + packed


def _listed(row: dict) -> str:
    return json.dumps({"file_name": row["file"], "caption": row["prompt"]}) + "\n"


def _write_parquet(uri: str, destination: str, wrong: set[int]):
    rows, at = storage.ParquetRows(uri), 0
    with storage.table_writer(destination, rows.schema) as writer:
        for batch in rows.batches():
            writer.write_batch(batch.filter(pa.array([at + row not in wrong for row in range(len(batch))])))
            at += len(batch)


def _rows_without(uri: str, wrong: set[int]) -> Iterator[str]:
    form = form_of(uri, LONGEST_LINE)
    if form.kind == "array":
        items = json.loads(text.decode(b"".join(storage.unpacked_chunks(uri))))
        kept = [item for number, item in enumerate(items, 1) if number not in wrong]
        yield json.dumps(kept, ensure_ascii=False, indent=1)
        return
    lines_of = {row.number: row.following for row in read_records(uri, form, LONGEST_LINE) if row.number in wrong}
    dropped = {line for first, following in lines_of.items() for line in range(first, following)}
    for line in text.lines(uri, LONGEST_LINE):
        if line.number not in dropped:
            yield line.content.decode(errors="surrogateescape") + "\n"


def _write_tar(uri: str, destination: str, wrong: set[str]):
    system, path = storage.filesystem(uri)
    packing = _suffix(destination).removeprefix(".tar").removeprefix(".")
    with (
        system.open_input_stream(path) as stream,
        tarfile.open(fileobj=stream, mode="r|*") as tar,
        storage.new_file(destination) as partial,
        tarfile.open(partial, f"w:{packing}") as kept,
    ):
        for member in tar:
            if wrong.isdisjoint((member_stem(member.name)[0], posixpath.splitext(member.name)[0])):
                kept.addfile(member, tar.extractfile(member) if member.isfile() else None)
            tar.members.clear()
            kept.members.clear()
