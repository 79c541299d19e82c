"""Reads the pairs of a place that the plan found: a table, a folder of images, a WebDataset tar."""

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mi_ray import storage
from mi_ray.inputs import text
from mi_ray.inputs.layout import IMAGE_SUFFIXES, SIDECARS, folder_of, is_litter
from mi_ray.inputs.pair import CAPTION_SUFFIXES, Columns, Pair, caption_beside, pair_of
from mi_ray.inputs.records import Form, first_value, read_records

LONGEST_LINE = 1 << 28  # bytes of a row in text form: it may hold an image as base64
_ROWS_AT_ONCE = 64
_UNSORTED = "; if the files of a sample are not neighbours in this tar, write it again: tar --sort=name"
Members = list[tuple[str, bytes]]  # of a sample of a tar: what follows the stem in a file's name, and its content
_T = TypeVar("_T")


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
    """Samples by WebDataset's convention: files with the same name up to the first dot are one sample."""
    uri = place["uri"]
    system, path = storage.filesystem(uri)
    if isinstance(system, pafs.LocalFileSystem) and _is_plain_tar(path):
        samples, advice = _gathered(path, columns), ""
    else:
        samples, advice = _in_order(system, path, columns), _UNSORTED
    for stem, members in samples:
        yield _sample_pair(uri, stem, members, columns, advice)


def _is_plain_tar(path: str) -> bool:
    """Whether it is a tar without compression, whatever its name says."""
    with suppress(tarfile.ReadError), tarfile.open(path, "r:"):
        return True
    return False


def _in_order(system: pafs.FileSystem, path: str, columns: Columns) -> Iterator[tuple[str, Members]]:
    """The samples of a tar that is read from its start to its end. Files of a sample must be neighbours."""
    with system.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for stem, files in itertools.groupby(_data_files(tar), lambda member: member_stem(member.name)[0]):
            members = [(member_stem(member.name)[1], tar.extractfile(member).read()) for member in files]
            yield from _divided(stem, members, columns).items()


def _gathered(path: str, columns: Columns) -> Iterator[tuple[str, Members]]:
    """The samples of a local tar without compression, wherever their files are in it.

    A first pass reads only the headers. The names and the places of the files stay in memory, not their contents.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    cut = None
    with tarfile.open(path, "r:") as tar:

        def content(place: int) -> bytes:
            tar.fileobj.seek(place)
            return tar.extractfile(tar.tarinfo.fromtarfile(tar)).read()

        try:
            for member in _data_files(tar):
                stem, suffix = member_stem(member.name)
                places.setdefault(stem, []).append((suffix, member.offset))
        except tarfile.TarError as error:  # what comes before is read
            cut = error
        for stem, files in places.items():
            for name, of_name in _divided(stem, files, columns).items():
                yield name, [(suffix, content(place)) for suffix, place in of_name]
    if cut:
        raise cut


def _data_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.isfile() and not is_litter(member.name):
            yield member
        tar.members.clear()  # otherwise it keeps every header in memory


def member_stem(name: str) -> tuple[str, str]:
    """The path of a tar's member up to the first dot of its name, and the rest."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _divided(stem: str, members: list[tuple[str, _T]], columns: Columns) -> dict[str, list[tuple[str, _T]]]:
    """The members of a sample by its stem; or by their names up to the last dot, if all names have several dots and
    some of these groups have an image and a caption, such as a.v1.png and a.v1.txt."""
    groups: dict[str, list[tuple[str, _T]]] = {}
    for suffix, member in members:
        more, dot, last = suffix.rpartition(".")
        groups.setdefault(f"{stem}.{more}" if dot else stem, []).append((last, member))
    named = columns.image or columns.caption
    return {stem: members} if named or stem in groups or not any(map(_is_pair, groups.values())) else groups


def _is_pair(members: list[tuple[str, _T]]) -> bool:
    suffixes = {f".{suffix.lower()}" for suffix, _ in members}
    return not suffixes.isdisjoint(IMAGE_SUFFIXES) and not suffixes.isdisjoint(SIDECARS)


def _sample_pair(uri: str, stem: str, members: Members, columns: Columns, advice: str) -> Pair:
    """The pair of a sample. `advice` is what may help if its image or caption is missing."""
    files: dict[str, bytes] = {}  # by what follows the stem, in lower case
    names: dict[str, str] = {}  # the same as it is written
    remarks = []
    for suffix, content in members:
        if files.get(suffix.lower(), content) != content:
            remarks.append(f"{suffix} is repeated with another content; the last one is read")
        files[suffix.lower()], names[suffix.lower()] = content, suffix
    key, there = f"{uri}#{stem}", text.excerpt(", ".join(files))
    wanted = columns.image.lower() if columns.image else None
    images = [name for name in files if f".{name}" in IMAGE_SUFFIXES]
    image = (wanted if wanted in files else None) if wanted else next(iter(images), None)
    file = image and f"{key}.{names[image]}"
    try:
        prompt, remark = caption_beside(files, columns)
        if image is None:
            dotted = [name for name in files if f".{name}".endswith(IMAGE_SUFFIXES)]
            advice = f"; set --image-column {dotted[0]}" if dotted and not wanted else advice
            raise ValueError(f"there is no image {wanted or ''} among {there}{advice}".replace("  ", " "))
        if prompt is None:
            texts = [name for name in files if name.endswith(CAPTION_SUFFIXES)]
            advice = f"; set --caption-column {texts[0]}" if texts and not columns.caption else advice
            raise ValueError(f"there is no caption among {there}{advice}")
    except ValueError as error:
        return Pair(key, None, None, str(error), file)
    remarks += [remark] if remark else []
    return replace(pair_of(key, files[image], prompt, ""), file=file, remark="; ".join(remarks) or None)


READERS = {"parquet": _parquet_pairs, "table": _table_pairs, "folder": _folder_pairs, "tar": _tar_pairs}
