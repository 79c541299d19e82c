"""Reads the pairs of a place that the plan found: a table, a folder of images, a WebDataset tar."""

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from mi_ray import storage
from mi_ray.inputs import text
from mi_ray.inputs.layout import IMAGE_SUFFIXES, folder_of, is_litter
from mi_ray.inputs.pair import CAPTION_SUFFIXES, Columns, Pair, caption_beside, pair_of
from mi_ray.inputs.records import Form, first_value, read_records

LONGEST_LINE = 1 << 28  # bytes of a row in text form: it may hold an image as base64
_ROWS_AT_ONCE = 64
_UNSORTED = "if the tar's members are out of order, sort it: tar --sort=name"


def as_utf8(pair: Pair) -> Pair:
    """The pair with valid UTF-8 texts of bounded length: names of files may not be text."""
    key, file, error, remark = (
        value and value.encode(errors="backslashreplace").decode()
        for value in (pair.key, pair.file, pair.error, pair.remark)
    )
    return replace(pair, key=key, file=file, error=error and text.excerpt(error, 600), remark=remark)


# ------------------------------------------------------------------------------------------ tables
def parquet_file(uri: str) -> pq.ParquetFile:
    system, path = storage.filesystem(uri)
    # The buffer makes Arrow read a row group in small pieces: pandas writes whole files as one row group.
    return pq.ParquetFile(system.open_input_file(path), pre_buffer=False, buffer_size=1 << 20)


def _parquet_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    uri, row = place["uri"], place["first"]
    with parquet_file(uri) as file:
        images, captions = columns.find(file.schema_arrow.names)
        names = list(dict.fromkeys([*images, *captions]))
        storage.check_plain(file.schema_arrow, names)
        for group in place["row_groups"]:
            end = row + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=names):
                    for values in zip(*(batch[name] for name in names), strict=True):
                        yield _row_pair(f"{uri}#{row}", dict(zip(names, values, strict=True)), images, captions)
                        row += 1
            except (OSError, ValueError, pa.ArrowException) as error:  # a damaged page; other groups may be intact
                if storage.is_transient(error):
                    raise
                for lost in range(row, end):
                    yield Pair(f"{uri}#{lost}", error=f"the row cannot be read: {text.reason(error)}")
            row = end


def _row_pair(key: str, scalars: dict[str, pa.Scalar], images: list[str], captions: list[str]) -> Pair:
    try:
        fields = {name: scalar.as_py() for name, scalar in scalars.items()}
    except ValueError as error:  # Arrow does not check that text is UTF-8
        return Pair(key, error=f"the row is not text: {text.reason(error)}")
    folder = folder_of(key.rpartition("#")[0])
    return pair_of(key, first_value(fields, images), first_value(fields, captions), folder)


def _table_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    uri, form = place["uri"], Form(place["form"][0], tuple(place["form"][1]), place["form"][2])
    records = read_records(uri, form, LONGEST_LINE, place["start"], place["number"])
    if form.kind == "array":
        records = itertools.islice(records, place["number"] - 1, None)
    for record in itertools.islice(records, place["rows"]):
        key = f"{uri}#{record.number}"
        try:
            if record.fields is None:
                raise ValueError(f"the row is {record.fault}")
            images, captions = columns.find(list(record.fields))
        except ValueError as error:
            yield Pair(key, error=str(error))
            continue
        fields = record.fields
        yield pair_of(key, first_value(fields, images), first_value(fields, captions), folder_of(uri))


# ------------------------------------------------------------------------------------------ files
def _folder_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    for name, *beside in place["files"]:
        key = storage.join(place["uri"], name)
        files: dict[str, bytes] = {}
        try:
            for file in beside:
                files[posixpath.splitext(file)[1][1:].lower()] = storage.read_bytes(storage.join(place["uri"], file))
            prompt, remark = caption_beside(files, columns)
            if prompt is None:
                raise ValueError(f"there is no caption beside it, such as {posixpath.splitext(name)[0]}.txt")
        except (OSError, ValueError) as error:
            if storage.is_transient(error):
                raise
            yield Pair(key, error=text.excerpt(error), file=key)
            continue
        yield replace(pair_of(key, name, prompt, place["uri"]), key=key, file=key, remark=remark)


def _tar_pairs(place: dict, columns: Columns) -> Iterator[Pair]:
    """Samples by WebDataset's convention: adjacent files with the same name up to the first dot are one sample."""
    system, path = storage.filesystem(place["uri"])
    with system.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        sample = None
        for member in tar:
            if not member.isfile() or is_litter(member.name):
                continue
            stem, suffix = member_stem(member.name)
            if sample is None or sample.stem != stem:
                if sample is not None:
                    yield sample.pair(columns)
                sample = _Sample(place["uri"], stem)
            sample.add(suffix, tar.extractfile(member).read())
            tar.members.clear()  # otherwise it keeps every header in memory
        if sample is not None:
            yield sample.pair(columns)


def member_stem(name: str) -> tuple[str, str]:
    """The path of a tar's member up to the first dot of its name, and the rest."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


class _Sample:
    """The members of a tar with one stem."""

    def __init__(self, uri: str, stem: str):
        self.uri, self.stem = uri, stem
        self.files: dict[str, bytes] = {}  # by what follows the stem, in lower case
        self.names: dict[str, str] = {}  # the same as it is written
        self.repeated: list[str] = []

    def add(self, suffix: str, content: bytes):
        name = suffix.lower()
        if self.files.get(name, content) != content:
            self.repeated.append(suffix)
        self.files[name], self.names[name] = content, suffix

    def pair(self, columns: Columns) -> Pair:
        key, there = f"{self.uri}#{self.stem}", text.excerpt(", ".join(self.files))
        wanted = columns.image.lower() if columns.image else None
        images = [name for name in self.files if f".{name}" in IMAGE_SUFFIXES]
        image = (wanted if wanted in self.files else None) if wanted else next(iter(images), None)
        file = image and f"{key}.{self.names[image]}"
        try:
            prompt, remark = caption_beside(self.files, columns)
            if image is None:
                dotted = [name for name in self.files if f".{name}".endswith(IMAGE_SUFFIXES)]
                advice = f"set --image-column {dotted[0]}" if dotted and not wanted else _UNSORTED
                raise ValueError(f"there is no image {wanted or ''} among {there}; {advice}".replace("  ", " "))
            if prompt is None:
                texts = [name for name in self.files if name.endswith(CAPTION_SUFFIXES)]
                advice = f"set --caption-column {texts[0]}" if texts and not columns.caption else _UNSORTED
                raise ValueError(f"there is no caption among {there}; {advice}")
        except ValueError as error:
            return Pair(key, None, None, str(error), file)
        pair = pair_of(key, self.files[image], prompt, "")
        repeats = [f"{name} is repeated with another content; the last one is read" for name in self.repeated]
        return replace(pair, file=file, remark="; ".join([*repeats, *([remark] if remark else [])]) or None)


READERS = {"parquet": _parquet_pairs, "table": _table_pairs, "folder": _folder_pairs, "tar": _tar_pairs}
