"""Reads pairs of image and caption, local, s3:// or gs://: Parquet, JSON lines, folders, WebDataset tars.

Planning reads only names, footers and line ends. A shard says where its pairs are. An actor reads them one after the
other, so memory does not depend on their number (for a folder of images, planning keeps the names in memory). A pair
that cannot be read becomes a pair with an error. A temporary failure of a store stops the run; the same command
continues it.
"""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mi_ray import storage
from mi_ray.config.section import ConfigError

IMAGE_COLUMNS = ("image", "jpg", "png", "file_name", "image_path", "path")
CAPTION_COLUMNS = ("caption", "prompt", "text", "txt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA = "metadata.jsonl"  # in a folder of images, as in Hugging Face's ImageFolder
_ROWS_AT_ONCE = 64
_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".tar": "tar", ".tgz": "tar", ".gz": "tar"}


@dataclass(frozen=True)
class Pair:
    """An encoded image and its caption, or the reason why one is missing."""

    key: str  # its place: a file, a row or line of a file, a member of a tar
    image: bytes | None = None
    prompt: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class PairShard:
    """Pairs whose scores go to one file, `name`. `source` is JSON and says where the pairs are."""

    index: int
    name: str
    source: str

    @property
    def unreadable(self) -> bool:
        """Whether planning could not read the file. The shard then holds only the reason."""
        return "error" in json.loads(self.source)


@dataclass(frozen=True)
class Columns:
    """Names of the columns or keys. None means the first usual name that exists."""

    image: str | None = None
    caption: str | None = None

    def find(self, names: list[str]) -> tuple[str, str]:
        """The names of the image and the caption column in `names`.

        Raises:
            ValueError: one is missing or ambiguous.
        """
        found = []
        for wanted, usual, what in (
            (self.image, IMAGE_COLUMNS, "image_column"),
            (self.caption, CAPTION_COLUMNS, "caption_column"),
        ):
            name = next((n for n in ((wanted,) if wanted else usual) if n in names), None)
            if name is None:
                looked = wanted or ", ".join(usual)
                raise ValueError(f"no column {looked} among {', '.join(names) or 'none'}; set {what}")
            if names.count(name) > 1:
                raise ValueError(f"there are {names.count(name)} columns {name}; rename all but one")
            found.append(name)
        return found[0], found[1]


# ------------------------------------------------------------------------------------------ planning
def plan_pairs(source: str, pairs_per_shard: int, key: str, columns: Columns) -> list[PairShard]:
    """The shards of an input: a file, or a folder of images, of Parquet files or of tars.

    A shard has about `pairs_per_shard` pairs, but at least one Parquet row group or one tar. Its name depends on its
    file, its place in the file, `key`, and the file's content or time of change. It does not depend on other files. The
    names of a file's parts sort in the order of the file.

    Raises:
        ConfigError: the input is missing, empty or of an unknown type, or no file of it has the columns.
    """
    try:
        sources = list(_sources(source, pairs_per_shard, columns))
    except (OSError, ValueError) as error:
        raise ConfigError([f"input: {source!r} cannot be read ({error}); give a local path or a URI"]) from error
    if not sources:
        raise ConfigError([f"input: {source!r} has no pairs; give Parquet, .jsonl, .tar or a folder of images"])
    if all("error" in s for s in sources):
        raise ConfigError([f"input: {s['uri']}: {s['error']}" for s in sources])
    shards, seen = [], Counter()
    for index, place in enumerate(sources):
        file, number = hashlib.sha256(place["uri"].encode()).hexdigest()[:8], seen[place["uri"]]
        seen[place["uri"]] += 1
        text = json.dumps(place, sort_keys=True)
        digest = hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()[:12]
        shards.append(PairShard(index, f"part-{file}-{number:05d}-{digest}.parquet", text))
    return shards


def _sources(uri: str, pairs_per_shard: int, columns: Columns) -> Iterator[dict[str, Any]]:
    system, path = storage.filesystem(uri)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise ConfigError([f"input: {uri!r} does not exist; give a file or folder of pairs"])
    if info.type == pafs.FileType.File:
        yield from _file_sources(uri, _state(info), pairs_per_shard, columns)
        return
    files = [f for f in system.get_file_info(pafs.FileSelector(path, recursive=True)) if f.type == pafs.FileType.File]
    states = {f.path.removeprefix(path).lstrip("/"): _state(f) for f in sorted(files, key=lambda f: f.path)}
    if _METADATA in states:
        yield from _file_sources(storage.join(uri, _METADATA), states[_METADATA], pairs_per_shard, columns)
        return
    tables = [name for name in states if _kind(name)]
    for name in tables:
        yield from _file_sources(storage.join(uri, name), states[name], pairs_per_shard, columns)
    if not tables:
        images = [name for name in states if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        for start in range(0, len(images), pairs_per_shard):
            names = images[start : start + pairs_per_shard]
            beside = [str(PurePosixPath(name).with_suffix(".txt")) for name in names]
            state = json.dumps([states.get(name) for name in (*names, *beside)])
            yield {"kind": "folder", "uri": uri, "names": names, "state": hashlib.sha256(state.encode()).hexdigest()}


def _state(info: pafs.FileInfo) -> list[int | None]:
    """The state of a file, to notice changes: size, and time of the last change in nanoseconds."""
    return [info.size, info.mtime_ns]


def _kind(name: str) -> str | None:
    kind = _KINDS.get(PurePosixPath(name.partition("?")[0]).suffix.lower())
    return None if name.lower().endswith(".gz") and not name.lower().endswith(".tar.gz") else kind


def _file_sources(uri: str, state: list, pairs_per_shard: int, columns: Columns) -> Iterator[dict[str, Any]]:
    match _kind(uri):
        case "parquet":
            yield from _parquet_sources(uri, state, pairs_per_shard, columns)
        case "jsonl":
            yield from _line_sources(uri, pairs_per_shard)
        case "tar":
            yield {"kind": "tar", "uri": uri, "state": state}
        case _:
            raise ConfigError([f"input: {uri!r} has an unknown type; give .parquet, .jsonl, .tar or a folder"])


def _parquet_sources(uri: str, state: list, pairs_per_shard: int, columns: Columns) -> Iterator[dict[str, Any]]:
    place = {"kind": "parquet", "uri": uri, "state": state}
    try:
        with _parquet(uri) as file:
            storage.check_plain(file.schema_arrow, [*columns.find(file.schema_arrow.names)])
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except (OSError, ValueError, pa.ArrowException) as error:
        if storage.is_passing(error):
            raise
        yield place | {"error": _reason(error)}
        return
    groups, first, count = [], 0, 0
    for index, of_group in enumerate(rows):
        groups.append(index)
        count += of_group
        if count >= pairs_per_shard or index == len(rows) - 1:
            yield place | {"row_groups": groups, "first": first}
            groups, first, count = [], first + count, 0


def _parquet(uri: str) -> pq.ParquetFile:
    system, path = storage.filesystem(uri)
    # The buffer makes Arrow read a row group in small pieces: pandas writes whole files as one row group.
    return pq.ParquetFile(system.open_input_file(path), pre_buffer=False, buffer_size=1 << 20)


def _line_sources(uri: str, pairs_per_shard: int) -> Iterator[dict[str, Any]]:
    """Ranges of bytes with whole lines. If lines are appended to the file, only the last range changes."""
    system, path = storage.filesystem(uri)
    lines, start, end, digest = 0, 0, 0, hashlib.sha256()

    def place() -> dict[str, Any]:
        first = (lines - 1) // pairs_per_shard * pairs_per_shard + 1
        return {"kind": "jsonl", "uri": uri, "start": start, "end": end, "line": first, "state": digest.hexdigest()}

    with system.open_input_stream(path) as stream:
        while block := stream.read(1 << 20):
            taken = 0
            for match in re.finditer(b"\n", block):
                lines += 1
                if lines % pairs_per_shard == 0:
                    digest.update(block[taken : match.end()])
                    end += match.end() - taken
                    yield place()
                    start, taken, digest = end, match.end(), hashlib.sha256()
            digest.update(block[taken:])
            end += len(block) - taken
    if end > start:
        lines += 1  # the last line may have no newline
        yield place()


# ------------------------------------------------------------------------------------------ reading
def read_pairs(shard: PairShard, columns: Columns) -> Iterator[Pair]:
    """The pairs of a shard, one after the other. If the rest cannot be read, the last pair has the error."""
    place = json.loads(shard.source)
    if "error" in place:
        yield Pair(place["uri"], error=place["error"])
        return
    readers = {"parquet": _parquet_pairs, "jsonl": _line_pairs, "folder": _folder_pairs, "tar": _tar_pairs}
    try:
        yield from map(_as_utf8, readers[place["kind"]](place, columns))
    except (OSError, EOFError, ValueError, RecursionError, tarfile.TarError, pa.ArrowException) as error:
        if storage.is_passing(error):
            raise
        yield Pair(place["uri"], error=f"the rest cannot be read: {_reason(error)}")


def _as_utf8(pair: Pair) -> Pair:
    """The pair with valid UTF-8 texts: file names may not be text, and JSON allows half a surrogate pair."""
    key, prompt, error = (
        text and text.encode(errors="backslashreplace").decode() for text in (pair.key, pair.prompt, pair.error)
    )
    if prompt != pair.prompt and error is None:
        error = "the caption is not text: it contains half a surrogate pair"
    return replace(pair, key=key, prompt=prompt, error=error)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _pair(key: str, image: Any, prompt: Any, folder: str) -> Pair:
    """A pair. `image` is bytes, a path or URI, or Hugging Face's {bytes, path}. Paths are relative to `folder`."""
    prompt = prompt if isinstance(prompt, str) else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        uri = image if "://" in image or image.startswith("/") else storage.join(folder, image)
        try:
            image = storage.read_bytes(uri)
        except (OSError, ValueError) as error:
            if storage.is_passing(error):
                raise
            return Pair(key, None, prompt, f"the image cannot be read: {_reason(error)}")
    if not isinstance(image, bytes) or not image:
        return Pair(key, None, prompt, "there is no image")
    return Pair(key, image, prompt)


def _folder_of(uri: str) -> str:
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return (path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")) + mark + query


def _parquet_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    uri, row = place["uri"], place["first"]
    with _parquet(uri) as file:
        image, caption = columns.find(file.schema_arrow.names)
        storage.check_plain(file.schema_arrow, [image, caption])
        for group in place["row_groups"]:
            end = row + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[image, caption]):
                    for values in zip(batch[image], batch[caption], strict=True):
                        yield _row_pair(f"{uri}#{row}", *values, _folder_of(uri))
                        row += 1
            except (
                OSError,
                ValueError,
                pa.ArrowException,
            ) as error:  # a damaged page; the other row groups may be intact
                if storage.is_passing(error):
                    raise
                for lost in range(row, end):
                    yield Pair(f"{uri}#{lost}", error=f"the row cannot be read: {_reason(error)}")
            row = end


def _row_pair(key: str, image: pa.Scalar, caption: pa.Scalar, folder: str) -> Pair:
    try:
        fields = image.as_py(), caption.as_py()
    except ValueError as error:  # Arrow does not check that text is UTF-8
        return Pair(key, error=f"the row is not text: {_reason(error)}")
    return _pair(key, *fields, folder)


def _line_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    uri = place["uri"]
    system, path = storage.filesystem(uri)
    with system.open_input_file(path) as file:
        content = file.read_at(place["end"] - place["start"], place["start"])
    for number, line in enumerate(io.BytesIO(content), start=place["line"]):
        key = f"{uri}#{number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            if not isinstance(fields, dict):
                raise ValueError("the line is not a JSON object")
            image, caption = columns.find(list(fields))
        except (ValueError, RecursionError) as error:
            yield Pair(key, error=_reason(error))
            continue
        yield _pair(key, fields[image], fields[caption], _folder_of(uri))


def _folder_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    for name in place["names"]:
        caption = str(PurePosixPath(name).with_suffix(".txt"))
        key = storage.join(place["uri"], name)
        try:
            prompt = storage.read_bytes(storage.join(place["uri"], caption)).decode().strip()
        except OSError as error:
            if storage.is_passing(error):
                raise
            yield Pair(key, error=f"there is no caption file: {caption}")
            continue
        except ValueError:
            yield Pair(key, error=f"the caption file is not UTF-8: {caption}")
            continue
        yield _pair(key, name, prompt, place["uri"])


def _tar_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    """Samples by WebDataset's convention: adjacent files with the same name up to the first dot are one sample."""
    system, path = storage.filesystem(place["uri"])
    with system.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        sample, current = {}, None
        for member in tar:
            if not member.isfile():
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if sample and folder + slash + stem != current:
                yield _sample_pair(place["uri"], current, sample, columns)
                sample = {}
            current = folder + slash + stem
            sample[suffix.lower()] = tar.extractfile(member).read()
            tar.members.clear()  # otherwise it keeps every header in memory
        if sample:
            yield _sample_pair(place["uri"], current, sample, columns)


def _sample_pair(uri: str, stem: str, sample: dict[str, bytes], columns: Columns) -> Pair:
    key = f"{uri}#{stem}"
    image = columns.image or next((s for s in sample if f".{s}" in IMAGE_SUFFIXES), None)
    try:
        fields = json.loads(sample["json"]) if "json" in sample else {}
        texts = {**fields, **{s: v.decode() for s, v in sample.items() if s in ("txt", "caption", columns.caption)}}
        names = (columns.caption,) if columns.caption else CAPTION_COLUMNS
        prompt = next((texts[name] for name in names if name in texts), None)
    except (ValueError, TypeError, RecursionError) as error:
        return Pair(key, error=f"the caption cannot be read: {_reason(error)}")
    if image not in sample:
        return Pair(key, None, prompt, f"there is no image among {', '.join(sample)}")
    return _pair(key, sample[image], prompt.strip() if isinstance(prompt, str) else None, "")
