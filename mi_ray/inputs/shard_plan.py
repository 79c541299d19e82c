"""Stores a prompt table, divides it into shards, and holds prompts out for the evaluation."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import pyarrow as pa

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.prompt_sets import Prompt
from mi_ray.inputs.prompts import PROMPTS, ROWS_AT_ONCE

_ROWS_IN_GROUP = 1024  # rows in a row group of a stored table: the smallest part that a shard reads


@dataclass(frozen=True)
class Shard:
    """Prompts whose candidates are written to one file, `name`."""

    index: int
    name: str
    prompt_ids: list[str]
    prompts: list[Prompt] | list[str]
    categories: list[str | None]
    splits: list[str | None]


class Planned(Protocol):
    """The shards of a stage, numbered from 0."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of the shard's part."""

    def size(self, index: int) -> int:
        """Size of the shard, in units of the progress bar."""

    def row(self, index: int) -> dict:
        """Input row of the actor, with at least `index` and `name`."""


class ShardPlan:
    """A prompt table divided into shards, in order. A shard's name depends on its index, `key` and its prompt ids.

    The plan needs 12 bytes per shard and holds no prompts. An actor reads the rows of its shard from the table.

    Args:
        source: URI of the prompt table, as written by `write_prompts`.
    """

    def __init__(self, source: str, prompts_per_shard: int, key: str):
        self.source, self.prompts_per_shard = source, prompts_per_shard
        table = storage.ParquetRows(source)
        self.prompts = len(table)
        ids = (i for batch in table.batches(["prompt_id"]) for i in batch["prompt_id"].to_pylist())
        self._digests = np.empty(-(-self.prompts // prompts_per_shard), "S12")
        for index in range(len(self)):
            of_shard = islice(ids, prompts_per_shard)
            self._digests[index] = hashlib.sha256("\n".join([key, *of_shard]).encode()).hexdigest()[:12].encode()

    def __len__(self) -> int:
        return len(self._digests)

    def digest(self, index: int) -> str:
        """Hash of `key` and of the shard's prompts, 12 hexadecimal digits."""
        return self._digests[index].decode()

    def name(self, index: int) -> str:
        return f"part-{index:05d}-{self.digest(index)}.parquet"

    def size(self, index: int) -> int:
        """Number of prompts in a shard."""
        return min(self.prompts_per_shard, self.prompts - index * self.prompts_per_shard)

    def check_stored(self, uri: str, field: str):
        """Check that this table is the one that an earlier session stored, if there is one.

        Args:
            field: config field, for the message.

        Raises:
            ConfigError: the stored table is different.
        """
        if storage.exists(uri) and (what := _difference(storage.ParquetRows(uri), storage.ParquetRows(self.source))):
            advice = "use the prompts that the run started with, or another --run-dir"
            raise ConfigError([f"{field}: the run folder holds a run with other prompts: {what}; {advice}"])

    def store(self, uri: str, field: str):
        """Copy the table to a place where the actors can read it, unless an earlier session did.

        Raises:
            ConfigError: an earlier session stored a different table.
        """
        self.check_stored(uri, field)
        if not storage.exists(uri):
            write_prompts(uri, storage.ParquetRows(self.source).batches())
        self.source = uri

    def row(self, index: int) -> dict:
        """The description of a shard for an actor: index, name, source, and the rows start to stop of the source."""
        start = index * self.prompts_per_shard
        stop = start + self.size(index)
        return {"index": index, "name": self.name(index), "source": self.source, "start": start, "stop": stop}


def _difference(stored: storage.ParquetRows, given: storage.ParquetRows) -> str | None:
    """The first difference between two tables; None if they are equal."""
    for start in range(0, min(len(stored), len(given)), ROWS_AT_ONCE):
        then, now = (table.read(start, start + ROWS_AT_ONCE).to_pylist() for table in (stored, given))
        for number, (before, after) in enumerate(zip(then, now, strict=False), start + 1):
            # A run of an earlier version has no column details.
            names = (name for name in PROMPTS.names[1:] if name in before)
            if name := next((name for name in names if before[name] != after[name]), None):
                return f"{name} {number} was {before[name]!r} and is {after[name]!r}"
    return f"there were {len(stored)} and now there are {len(given)}" if len(stored) != len(given) else None


def write_prompts(uri: str, batches: Iterable[pa.RecordBatch]):
    """Write a prompt table from batches, with row groups that suit the reading of shards."""
    with storage.table_writer(uri, PROMPTS) as writer:
        for batch in batches:
            if len(batch):
                writer.write_batch(batch, row_group_size=_ROWS_IN_GROUP)


def read_shard(row: dict, table: storage.ParquetRows) -> Shard:
    """Read the shard that a `ShardPlan.row` describes from its source."""
    read = table.read(row["start"], row["stop"])
    ids, categories, splits = (read[name].to_pylist() for name in ("prompt_id", "category", "split"))
    return Shard(row["index"], row["name"], ids, with_details(read), categories, splits)


def with_details(table: pa.Table | pa.RecordBatch) -> list[Prompt]:
    """The prompts of a prompt table, with their details. A table of an earlier version has no column details."""
    details = table["details"].to_pylist() if "details" in table.schema.names else [None] * len(table)
    return list(map(Prompt, table["prompt"].to_pylist(), details))


class Holdout:
    """The prompts of a table that are held out from training: about `share`, but at least one on each side.

    A hash of (seed, prompt id) decides, so a prompt stays on its side if other prompts are added or removed.

    Args:
        ids: ids of all prompts.

    Raises:
        ConfigError: there are fewer than two prompts.
    """

    def __init__(self, ids: Iterable[str], share: float, seed: int):
        self.seed = seed
        least, most, count = 1.0, 0.0, 0
        for draw in map(self._draw, ids):
            least, most, count = min(least, draw), max(most, draw), count + 1
        if count < 2:
            raise ConfigError(
                [
                    "evaluation.file: it is not set, and a single prompt cannot be divided; set evaluation.file, or"
                    " give more prompts"
                ]
            )
        self.below = min(max(share, math.nextafter(least, 1)), most)

    def __call__(self, ids: Iterable[str]) -> np.ndarray:
        """(n,) bool: whether each of these prompts is held out."""
        return np.array([self._draw(i) < self.below for i in ids], bool)

    def _draw(self, prompt_id: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:{prompt_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
