"""The order of prompts in an online run: the shards of every update and of every validation."""

import hashlib
from functools import lru_cache

import numpy as np

from mi_ray.config import OnlineConfig, RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.inputs.shard_plan import ShardPlan


def too_few_prompts(config: RunConfig, prompts: int) -> list[str]:
    """One error message for each part of a run that needs more prompts than there are."""
    per_shard = config.generate.prompts_per_shard
    faults = _too_short(config.online, prompts, per_shard) if config.online.updates else []
    if prompts == 1 and "pmi_contrastive" in config.candidate_scores:
        faults.append("prompts.file: pmi_contrastive compares prompts, but there is only one; give more prompts")
    return faults


def _shards_of(config: OnlineConfig, per_shard: int) -> tuple[int, int]:
    """Number of shards of one update, and of held-out shards."""
    return -(-config.prompts_per_update // per_shard), -(-config.validation_prompts // per_shard)


def _too_short(config: OnlineConfig, prompts: int, per_shard: int) -> list[str]:
    """An error message if the list is too short for one update."""
    groups, held = _shards_of(config, per_shard)
    if -(-prompts // per_shard) - held >= groups:
        return []
    return [
        f"prompts.file: {prompts} prompts are too few: one update needs {groups * per_shard} and {held * per_shard} are"
        " held out; give more, or lower online.prompts_per_update"
    ]


class OnlinePlan:
    """The parts of the candidate table, in the order in which they are made.

    A part contains the candidates of one shard of prompts, sampled by one version of the policy. Version 0 is the base
    model; version v is the policy after v updates. Update u uses the next shards of the prompt list and version
    max(0, u - lag).

    Each epoch is a new permutation of the list, divided into complete updates. So no update has a shard twice; the
    remaining shards of a permutation are not used. The shards at the end of the list are held out: every
    `validate_every` updates, and after the last one, the newest version is scored on them, with the same seeds.

    Raises:
        ConfigError: the list is too short.
    """

    def __init__(self, shards: ShardPlan, config: OnlineConfig, seed: int):
        self.shards, self.config, self.seed = shards, config, seed
        if faults := _too_short(config, shards.prompts, shards.prompts_per_shard):
            raise ConfigError(faults)
        self.groups, self.held = _shards_of(config, shards.prompts_per_shard)
        self.trained = len(shards) - self.held
        # A version is scored just before the first update that it draws. So no part waits for a version that it does
        # not need.
        parts, versions = [], [v for v in range(config.updates + 1) if self.is_checkpoint(v)]
        for update in range(config.updates):
            while versions and versions[0] <= max(0, update - config.lag):
                parts += [(versions[0], -1, chunk) for chunk in range(self.held)]
                versions.pop(0)
            parts += [(update, 1, group) for group in range(self.groups)]
        parts += [(version, -1, chunk) for version in versions for chunk in range(self.held)]
        self._parts = np.array(parts, np.int32)

    def __len__(self) -> int:
        return len(self._parts)

    def _chunk(self, index: int) -> int:
        """Index of the prompt shard of a part."""
        update, kind, number = self._parts[index].tolist()
        if kind < 0:
            return self.trained + number
        epoch, update_of_epoch = divmod(update, self.trained // self.groups)
        return int(_permutation(self.seed, epoch, self.trained)[update_of_epoch * self.groups + number])

    def name(self, index: int) -> str:
        update, kind, number = self._parts[index].tolist()
        what = "validation" if kind < 0 else "update"
        return f"{what}-{update:05d}-{number:03d}-{self.shards.digest(self._chunk(index))}.parquet"

    def size(self, index: int) -> int:
        """Number of prompts in a part."""
        return self.shards.size(self._chunk(index))

    def row(self, index: int) -> dict:
        """The input of the actor: `ShardPlan.row`, with the update, the version of the policy that draws, and whether
        the part is a validation."""
        update, kind, _ = self._parts[index].tolist()
        version = update if kind < 0 else max(0, update - self.config.lag)
        row = self.shards.row(self._chunk(index)) | {"index": index, "name": self.name(index)}
        return row | {"update": update, "version": version, "validation": kind < 0}

    def is_checkpoint(self, version: int) -> bool:
        """Whether a version of the policy is saved and scored on the held-out prompts."""
        return version % self.config.validate_every == 0 or version == self.config.updates

    def of_update(self, update: int) -> list[int]:
        """Indices of the parts that an update trains on."""
        return np.flatnonzero((self._parts[:, 0] == update) & (self._parts[:, 1] > 0)).tolist()

    def of_validation(self, version: int) -> list[int]:
        """Indices of the validation parts of a version of the policy; none between checkpoints."""
        return np.flatnonzero((self._parts[:, 0] == version) & (self._parts[:, 1] < 0)).tolist()


def plan_of(config: RunConfig, source: str) -> OnlinePlan:
    """The plan of an online run, from the URI of its stored prompt table."""
    shards = ShardPlan(source, config.generate.prompts_per_shard, config.hash())
    return OnlinePlan(shards, config.online, config.seed)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    digest = hashlib.sha256(f"online order/{seed}/{epoch}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(count)
