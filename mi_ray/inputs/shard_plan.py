"""A prompt table, stored, split and cut into the shards that a run makes."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.prompts import PROMPTS, ROWS_AT_ONCE

_ROWS_IN_GROUP = 1024  # of a stored table: what is read at once for the sake of one shard


@dataclass(frozen=True)
class Shard:
    """Prompts whose candidates are written together, as one file `name`."""

    index: int
    name: str
    prompt_ids: list[str]
    prompts: list[str]
    categories: list[str | None]
    splits: list[str | None]


class ShardPlan:
    """A prompt table cut into shards, in its order. A shard's name is fixed by its place, `key` and its prompt ids.

    It holds 12 bytes a shard and no prompt: who makes a shard reads the shard's rows of the table.

    Args:
        source: URI of the prompt table, as `write_prompts` leaves it.
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
        """12 hexadecimal digits of the shard's prompts and of what the results depend on."""
        return self._digests[index].decode()

    def name(self, index: int) -> str:
        return f"part-{index:05d}-{self.digest(index)}.parquet"

    def size(self, index: int) -> int:
        """Prompts of a shard."""
        return min(self.prompts_per_shard, self.prompts - index * self.prompts_per_shard)

    def check_stored(self, uri: str, field: str):
        """See that the table that an earlier session stored, if one did, is this one.

        Args:
            field: of the config, which the message names.

        Raises:
            ConfigError: it is another one, of which the run's shards were made.
        """
        if storage.exists(uri) and (what := _difference(storage.ParquetRows(uri), storage.ParquetRows(self.source))):
            advice = "give the prompts that it began with, or another --run-dir"
            raise ConfigError([f"{field}: the run folder holds a run of other prompts: {what}; {advice}"])

    def store(self, uri: str, field: str):
        """Copy the table to where the actors can read it, unless an earlier session did.

        Raises:
            ConfigError: an earlier session stored another one.
        """
        self.check_stored(uri, field)
        if not storage.exists(uri):
            write_prompts(uri, storage.ParquetRows(self.source).batches())
        self.source = uri

    def row(self, index: int) -> dict:
        """What who makes a shard must know of it: index, name, source and, of the source's rows, start and stop."""
        start = index * self.prompts_per_shard
        stop = start + self.size(index)
        return {"index": index, "name": self.name(index), "source": self.source, "start": start, "stop": stop}


def _difference(stored: storage.ParquetRows, given: storage.ParquetRows) -> str | None:
    """What tells two tables apart; None if nothing does."""
    for start in range(0, min(len(stored), len(given)), ROWS_AT_ONCE):
        then, now = (table.read(start, start + ROWS_AT_ONCE).to_pylist() for table in (stored, given))
        for number, (before, after) in enumerate(zip(then, now, strict=False), start + 1):
            if name := next((name for name in ("prompt", "category", "split") if before[name] != after[name]), None):
                return f"{name} {number} was {before[name]!r} and is {after[name]!r}"
    return f"they were {len(stored)} and are {len(given)}" if len(stored) != len(given) else None


def write_prompts(uri: str, batches: Iterable[pa.RecordBatch]):
    """Write a prompt table from its batches, as a file that shards are read from."""
    with storage.table_writer(uri, PROMPTS) as writer:
        for batch in batches:
            if len(batch):
                writer.write_batch(batch, row_group_size=_ROWS_IN_GROUP)


def read_shard(row: dict, table: storage.ParquetRows) -> Shard:
    """The shard of a `ShardPlan.row`, from its source."""
    columns = table.read(row["start"], row["stop"]).to_pydict()
    return Shard(row["index"], row["name"], *(columns[name] for name in PROMPTS.names))


class Holdout:
    """Which of a table's prompts are held out from training: about `share`, at least one each way.

    A hash of (seed, prompt id) decides, so a prompt keeps its side when others come or go.

    Args:
        ids: of all prompts.

    Raises:
        ConfigError: there are fewer than two prompts.
    """

    def __init__(self, ids: Iterable[str], share: float, seed: int):
        self.seed = seed
        least, most, count = 1.0, 0.0, 0
        for draw in map(self._draw, ids):
            least, most, count = min(least, draw), max(most, draw), count + 1
        if count < 2:
            raise ConfigError(["evaluation.file: a single prompt cannot be split; give a file, or more prompts"])
        self.below = min(max(share, math.nextafter(least, 1)), most)

    def __call__(self, ids: Iterable[str]) -> np.ndarray:
        """Of some of the prompts, (n,) bool."""
        return np.array([self._draw(i) < self.below for i in ids], bool)

    def _draw(self, prompt_id: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:{prompt_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
