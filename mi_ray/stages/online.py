"""Online fine-tuning on Ray: actors that draw and score by the newest policy, beside the workers that train it.

The actors are a Ray Data pool that lives as long as the run and writes the parts of an `OnlinePlan` in order; the
workers are Ray Train's. Both meet at a board: it knows which parts are committed and holds the newest policies.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import ray
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mi_ray import storage
from mi_ray.alignment.metric import columns_of, load_metrics
from mi_ray.config import RunConfig
from mi_ray.inputs.online_plan import plan_of
from mi_ray.inputs.shard_plan import Shard
from mi_ray.runs import folder as run_folder
from mi_ray.runs.layout import CANDIDATES, POLICIES, SUMMARY, policy_folder
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.policy import PolicySampler
from mi_ray.scoring.work import Work
from mi_ray.stages.shards import FACTS, ShardWriter, rows_of, write_missing
from mi_ray.storage import tables
from mi_ray.training.loop import loop_settings, remove_checkpoints, train
from mi_ray.training.online import best_version

LOOK_S = 30.0  # between two looks of a waiting actor at whether a part before its own was lost
POLL_S = 0.02  # between two looks of the board at what it knows


@ray.remote(num_cpus=0, max_restarts=0)
class _Board:
    """An asynchronous actor: all may wait in it at once."""

    def __init__(self, keep: int):
        self.keep, self.done, self.policies, self.ended = keep, set(), {}, False

    async def finished(self, indices: list[int]):
        self.done.update(indices)

    async def publish(self, version: int, policy: list):
        """`policy` holds the reference of the weights, which Ray then does not resolve."""
        self.policies[version] = policy
        self.policies = {v: self.policies[v] for v in sorted(self.policies)[-self.keep :]}

    async def end(self):
        self.ended = True

    async def policy(self, version: int, timeout_s: float) -> tuple[str, list | None]:
        """The weights of a version, behind one word: here, past (it is kept no more), ended, or wait."""
        until = time.monotonic() + timeout_s
        while True:
            if version in self.policies:
                return "here", self.policies[version]
            if self.policies and version < max(self.policies):
                return "past", None
            if self.ended or time.monotonic() > until:
                return ("ended" if self.ended else "wait"), None
            await asyncio.sleep(POLL_S)

    async def wait(self, indices: list[int], deadline_s: float | None) -> list[int] | None:
        first = math.inf
        while True:
            here = [index for index in indices if index in self.done]
            first = min(first, time.monotonic() if here else math.inf)
            late = deadline_s is not None and time.monotonic() - first >= deadline_s
            if here and (len(here) == len(indices) or late):
                return here
            if self.ended:
                return None
            await asyncio.sleep(POLL_S)


class Board:
    """What the workers and actors see of the board, as `training.online.Board` has it."""

    def __init__(self, keep: int):
        self.actor = _Board.remote(keep)

    def wait(self, indices: Sequence[int], deadline_s: float | None) -> list[int] | None:
        return ray.get(self.actor.wait.remote(list(indices), deadline_s))

    def publish(self, version: int, policy: dict[str, Tensor]):
        ray.get(self.actor.publish.remote(version, [ray.put(policy)]))

    def policy(self, version: int, timeout: float) -> tuple[str, dict[str, Tensor] | None]:
        word, reference = ray.get(self.actor.policy.remote(version, timeout))
        return word, ray.get(reference[0]) if reference else None

    def finished(self, indices: Sequence[int]):
        ray.get(self.actor.finished.remote(list(indices)))

    def end(self):
        ray.get(self.actor.end.remote())


class OnlineGenerator:
    """Ray Data actor: a batch holding one part of the plan -> one row that says what was written.

    A part waits for the version of the policy that its row names. While it waits, it looks from time to time whether a
    part that this version needs was lost with another actor, and makes that one itself: so nobody waits for ever.
    """

    def __init__(self, config: dict, source: str, folder: str, board: Board, token: int | None = None):
        config = RunConfig.model_validate(config)
        take_share(config.resources.cpus_per_actor, config.resources.gpus_per_actor)
        self.folder, self.candidates, self.board = folder, storage.join(folder, CANDIDATES), board
        self.plan = plan_of(config, source)
        self.policy, self.version = PolicySampler(config), 0
        schema = tables.online_schema(config.score.names, columns_of(load_metrics(config.generate.alignment)))
        self.write = ShardWriter("online", "policy", self.candidates, schema, config, token, lambda: self.policy.calls)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        (row,) = rows_of(batch)
        while run_folder.committed(self.candidates, row["name"]) is None:
            word = self._take(row["version"])
            if word == "here":
                break
            if word != "wait":  # nobody needs this part any more
                return {name: [value] for name, value in (FACTS | {"index": row["index"]}).items()}
            for index in self.plan.of_update(row["version"] - 1):
                lost = self.plan.row(index)
                if (
                    run_folder.committed(self.candidates, lost["name"]) is None
                    and self._take(lost["version"]) == "here"
                ):
                    self._write(lost)
        return self._write(row)

    def _write(self, row: dict) -> dict[str, list]:
        def make(shard: Shard, positions: list[int], work: Work) -> list[dict]:
            return self.policy.rows(shard, positions, row["update"], row["validation"], work)

        receipt = self.write({name: np.array([value]) for name, value in row.items()}, make)
        self.board.finished([row["index"]])
        return receipt

    def _take(self, version: int) -> str:
        """Make a version of the policy the one that draws, if it is `here`; else the board's word for it."""
        if version == self.version:
            return "here"
        word, state = self.board.policy(version, LOOK_S)
        saved = storage.join(policy_folder(self.folder, version), "adapter_model.safetensors")
        if word == "past" and storage.exists(saved):
            word, state = "here", load_safetensors(storage.read_bytes(saved))
        if word == "here":
            self.policy.load(state)
            self.version = version
        return word


def online(config: RunConfig, source: str, folder: str, name: str) -> str:
    """Train a policy online into `folder`; Ray must be initialised. Returns the folder of the best policy's adapter.

    Called again, it goes on: parts that are committed are not made again, and the training continues at its last
    checkpoint. The best policy is the validated version with the highest self-score on held-out prompts.

    Args:
        source: URI of the stored table of prompts.
        folder: URI. In the end it holds candidates/, policies/, adapter/ with the best policy, training.jsonl and
            summary.json (as of `training.loop.finetune`, with `version`, the best one, and `validation`, all).
        name: of the training run, for Ray and the trackers.

    Raises:
        ConfigError, lease.Lost, ray.train.TrainingFailedError: as `training.loop.finetune`.
    """
    adapter, candidates = storage.join(folder, "adapter"), storage.join(folder, CANDIDATES)
    if storage.exists(storage.join(adapter, SUMMARY)):
        return adapter
    plan, board = plan_of(config, source), Board(config.online.lag + 1)
    names = [plan.name(index) for index in range(len(plan))]
    run_folder.adopt_parts(candidates, names)
    missing = set(run_folder.missing_parts(candidates, names))
    board.finished([index for index, part in enumerate(names) if part not in missing])
    constructor = {"config": config.model_dump(mode="json"), "source": source, "folder": folder, "board": board}
    what = "online", "policy", OnlineGenerator, constructor, plan, candidates, config.run_dir
    generation = _Thread(lambda: write_missing(*what, config.resources, "prompt"), board.end)
    generation.start()
    try:
        settings = {"prompts": source, "folder": folder, "board": board}
        summary = train(config, loop_settings(config, None, folder, None, name, settings))
    except BaseException:
        board.end()
        raise
    if summary["stopped"]:
        board.end()
    names = storage.list_names(storage.join(folder, POLICIES))
    saved = sorted(int(name.rpartition("-")[2]) for name in names)
    generation.finish()  # the last validation comes after the last update
    summary |= best_version(config, plan, candidates, saved)
    source = policy_folder(folder, summary["version"])
    for file in storage.list_names(source):
        storage.write_bytes(storage.join(adapter, file), storage.read_bytes(storage.join(source, file)))
    storage.write_json(storage.join(adapter, SUMMARY), summary)
    remove_checkpoints(folder)
    return adapter


class _Thread(threading.Thread):
    """Runs a function beside the caller; where it fails, something is done at once, and `finish` raises its error."""

    def __init__(self, run: Callable[[], None], on_error: Callable[[], None]):
        super().__init__(daemon=True)
        self._run, self._on_error, self._error = run, on_error, None

    def run(self):
        try:
            self._run()
        except BaseException as error:
            self._error = error
            self._on_error()

    def finish(self):
        self.join()
        if self._error:
            raise self._error
