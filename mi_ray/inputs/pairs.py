"""Plans the reading of pairs of image and caption, local, s3:// or gs://: which files have them, and in which shards.

Planning reads only names, Parquet footers and text tables. A shard says where its pairs are. An actor reads them one
after the other (`pair_readers`), so memory does not depend on their number (for a folder of images, planning keeps the
names in memory). A pair that cannot be read becomes a pair with an error. A temporary failure of a store stops the run;
the same command continues it.
"""

import hashlib
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs import pair_readers, text
from mi_ray.inputs.layout import Found, State, files_in, folder_of, kind_of, sidecars, state_of
from mi_ray.inputs.pair import Columns, Pair
from mi_ray.inputs.pair_readers import LONGEST_LINE, READERS, parquet_file
from mi_ray.inputs.records import Form, Record, first_value, form_of, read_records

__all__ = ["Columns", "Pair", "PairPlan", "PairShard", "plan_pairs", "read_pairs"]

_ROWS_LOOKED_AT = 100  # of a table, for its columns
_VERSION = 3  # of the reading: a part of an earlier version is made again
_FORMS = "give .parquet, .jsonl, .json, .csv, .tsv, a WebDataset .tar, or a folder of these or of images"
Place = dict[str, Any]


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
class PairPlan:
    """The shards of an input, and lines that tell what was found."""

    shards: list[PairShard]
    found: list[str]

    def __iter__(self) -> Iterator[PairShard]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def stale(self, parts: list[str]) -> set[str]:
        """The parts among these whose pairs are no longer in the input. Parts of a file that cannot be read now stay:
        its pairs may have been scored before."""
        kept = tuple(shard.name.rpartition("-")[0].rpartition("-")[0] for shard in self.shards if shard.unreadable)
        names = {shard.name for shard in self.shards}
        return {part for part in parts if part not in names and not (kept and part.startswith(kept))}


def plan_pairs(source: str, pairs_per_shard: int, key: str, columns: Columns) -> PairPlan:
    """Plan an input: a file, or a folder of images, of tables and of tars.

    A shard has about `pairs_per_shard` pairs, but at least one Parquet row group or one tar. Its name depends on its
    file, its place in the file, `key`, and the file's content or time of change. It does not depend on other files. The
    names of a file's parts sort in the order of the file.

    Raises:
        ConfigError: the input is missing, empty or of an unknown type, or no file of it has the columns.
    """
    planner = _Planner(source, pairs_per_shard, columns)
    try:
        places = list(planner.places())
    except (OSError, ValueError) as error:
        fault = f"{source!r} cannot be read ({text.reason(error)}); give a local path or a URI"
        raise ConfigError([f"input: {fault}"]) from error
    found = planner.found.lines()
    if not places:
        raise ConfigError([f"input: {source!r} has no pairs ({'; '.join(found)}); {_FORMS}"])
    if all("error" in place for place in places):
        raise ConfigError([f"input: {place['uri']}: {place['error']}" for place in places])
    shards, seen = [], Counter()
    for index, place in enumerate(places):
        file, number = hashlib.sha256(place["uri"].encode()).hexdigest()[:8], seen[place["uri"]]
        seen[place["uri"]] += 1
        described = json.dumps(place, sort_keys=True)
        digest = hashlib.sha256(f"{key}\n{_VERSION}\n{described}".encode()).hexdigest()[:12]
        shards.append(PairShard(index, f"part-{file}-{number:05d}-{digest}.parquet", described))
    return PairPlan(shards, found)


class _Planner:
    """Finds the places of an input's pairs, in order, and keeps what was found beside them."""

    def __init__(self, source: str, pairs_per_shard: int, columns: Columns):
        self.source, self.pairs_per_shard, self.columns = source, pairs_per_shard, columns
        self.found = Found()
        self.named: set[str] | None = None  # files that tables name, by their paths in the folder; None: not asked

    def places(self) -> Iterator[Place]:
        storage.check_reachable(self.source)
        system, path = storage.filesystem(self.source)
        info = system.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise ConfigError([f"input: {self.source!r} does not exist; give a file or folder of pairs"])
        if info.type == pafs.FileType.Directory:
            yield from self._in_folder()
            return
        try:
            places = list(self._in_file(self.source, state_of(info)))
        except ValueError as error:
            raise ConfigError([f"input: {self.source}: {text.reason(error)}"]) from error
        yield from places

    def _in_folder(self) -> Iterator[Place]:
        states, self.found.litter = files_in(self.source)
        images = [name for name in states if kind_of(name) == "image"]
        beside = sidecars(images, states)
        used = {name for names in beside.values() for name in names} | {*images}
        self.named = set() if images else None
        for name, state in states.items():
            if name in used:
                continue
            if kind_of(name) is None:
                self.found.leave([name])
                continue
            try:
                yield from self._in_file(storage.join(self.source, name), state)
            except ValueError as error:
                self.found.passed[text.reason(error)].append(name)
        yield from self._of_images(images, beside, states)

    def _of_images(self, images: list[str], beside: dict[str, list[str]], states: dict[str, State]) -> Iterator[Place]:
        """The images that no table names, with the files that may hold their captions."""
        loose = [name for name in images if name not in (self.named or ())]
        captioned = [name for name in loose if beside[name]]
        if self.named and len(captioned) < len(loose):
            bare = [name for name in loose if not beside[name]]
            self.found.passed["no caption file, and no table names them"] += bare
            loose = captioned
        elif loose and not captioned and self.found.read:
            self.found.passed["images without caption files"] += loose
            return
        elif loose and not captioned:
            told = "; ".join(self.found.lines()[1:])
            first = f"none of {len(loose)} images has a caption file, such as {posixpath.splitext(loose[0])[0]}.txt"
            raise ConfigError([f"input: {self.source!r}: {first}{told and f' ({told})'}; {_FORMS}"])
        if doubled := [name for name in images if name in (self.named or ()) and beside[name]]:
            self.found.passed["their table's captions are read, not the files beside them"] += doubled
        if loose:
            self.found.read["images with a caption file"] += len(captioned)
            if len(captioned) < len(loose):
                self.found.read["images without one"] += len(loose) - len(captioned)
        for start in range(0, len(loose), self.pairs_per_shard):
            names = loose[start : start + self.pairs_per_shard]
            files = [[name, *beside[name]] for name in names]
            state = json.dumps([[states[file] for file in of_pair] for of_pair in files])
            digest = hashlib.sha256(state.encode()).hexdigest()
            yield {"kind": "folder", "uri": self.source, "files": files, "state": digest}

    def _in_file(self, uri: str, state: State) -> Iterator[Place]:
        """The places of a table or tar.

        Raises:
            ValueError: it holds no pairs.
        """
        match kind_of(uri):
            case "parquet" | "table" as kind:
                try:
                    places = list(self._in_parquet(uri, state) if kind == "parquet" else self._in_table(uri))
                except OSError as error:  # such as damaged gzip: the other files of a folder are read
                    if storage.is_transient(error):
                        raise
                    places = [{"kind": kind, "uri": uri, "state": state, "error": text.reason(error)}]
                yield from places
            case "tar":
                self.found.read["tars"] += 1
                yield {"kind": "tar", "uri": uri, "state": state}
            case "image":
                raise ValueError("it is a single image; give --image and --prompt, or the folder as --input")
            case _:
                raise ValueError(f"it has an unknown type; {_FORMS}")

    def _in_parquet(self, uri: str, state: State) -> Iterator[Place]:
        place = {"kind": "parquet", "uri": uri, "state": state}
        try:
            file = parquet_file(uri)
        except (OSError, ValueError, pa.ArrowException) as error:
            if storage.is_transient(error):
                raise
            yield place | {"error": text.reason(error)}
            return
        with file:
            images, captions = self.columns.find(file.schema_arrow.names)
            storage.check_plain(file.schema_arrow, [*images, *captions])
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if self.named is not None:  # otherwise nothing is read
                texts = [name for name in images if pa.types.is_string(file.schema_arrow.field(name).type)]
                for batch in file.iter_batches(columns=texts) if texts else ():
                    self._name(uri, batch.to_pylist(), texts)
        self.found.took("Parquet files", images, captions)
        groups, first, count = [], 0, 0
        for index, of_group in enumerate(rows):
            groups.append(index)
            count += of_group
            if count >= self.pairs_per_shard or index == len(rows) - 1:
                yield place | {"row_groups": groups, "first": first}
                groups, first, count = [], first + count, 0

    def _in_table(self, uri: str) -> Iterator[Place]:
        """Ranges of whole rows. If rows are appended to a file of lines, only its last range changes."""
        form = form_of(uri, LONGEST_LINE)
        records = read_records(uri, form, LONGEST_LINE)
        images, captions = self._columns_of(first := list(islice(records, _ROWS_LOOKED_AT)), form)
        self.found.took(form.name, images, captions)
        place = {"kind": "table", "uri": uri, "form": [form.kind, form.header, form.delimiter]}
        start, number = 0, 1
        rows = chain(first, records)
        while of_shard := list(islice(rows, self.pairs_per_shard)):
            self._name(uri, [record.fields for record in of_shard if record.fields], images)
            digest = hashlib.sha256()
            for record in of_shard:
                digest.update(record.text.encode(errors="backslashreplace") + b"\n")
            end, state = of_shard[-1].end, digest.hexdigest()
            yield place | {"start": start, "end": end, "number": number, "rows": len(of_shard), "state": state}
            start, number = end, of_shard[-1].following

    def _columns_of(self, records: list[Record], form: Form) -> tuple[list[str], list[str]]:
        """The columns of a file, by its header or else by the first row that has them.

        Raises:
            ValueError: none of these rows has them.
        """
        if form.kind == "csv":
            return self.columns.find(list(form.header))
        fault = "it has no rows"
        for record in records:
            try:
                if record.fields is None:
                    raise ValueError(f"its first row is {record.fault}")
                return self.columns.find(list(record.fields))
            except ValueError as error:
                fault = str(error) if record is records[0] else fault
        raise ValueError(fault)

    def _name(self, uri: str, rows: list[dict], images: list[str]):
        """Keep the files that rows name, as paths within the folder."""
        if self.named is None:
            return
        folder, root = storage.filesystem(folder_of(uri))[1], storage.filesystem(self.source)[1]
        for fields in rows:
            if isinstance(value := first_value(fields, images), str) and len(value) < 4096:
                path = posixpath.normpath(posixpath.join(folder, value))
                self.named.add(path.removeprefix(f"{root}/"))


# ------------------------------------------------------------------------------------------ reading
def read_pairs(shard: PairShard, columns: Columns) -> Iterator[Pair]:
    """The pairs of a shard, one after the other. If the rest cannot be read, the last pair has the error."""
    place = json.loads(shard.source)
    if "error" in place:
        yield Pair(place["uri"], error=place["error"])
        return
    try:
        yield from map(pair_readers.as_utf8, READERS[place["kind"]](place, columns))
    except (OSError, EOFError, ValueError, RecursionError, tarfile.TarError, pa.ArrowException) as error:
        if storage.is_transient(error):
            raise
        yield Pair(place["uri"], error=f"the rest cannot be read: {text.reason(error)}")
