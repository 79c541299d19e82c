"""Online fine-tuning on Ray: actors sample and score with the newest policy while workers train it.

The actors are a Ray Data pool that writes the parts of an `OnlinePlan` in order during the whole run. The workers are
those of Ray Train. They share a board, which knows the committed parts and the newest policies.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mi_ray import storage
from mi_ray.alignment.metric import columns_of
from mi_ray.config import RunConfig
from mi_ray.inputs.online_plan import plan_of
from mi_ray.inputs.shard_plan import Shard
from mi_ray.runs import folder as run_folder
from mi_ray.runs.layout import CANDIDATES, POLICIES, SUMMARY, policy_folder
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.policy import PolicySampler
from mi_ray.scoring.work import Work
from mi_ray.stages.judges import Judges, ask
from mi_ray.stages.shards import FACTS, ShardWriter, rows_of, write_missing
from mi_ray.storage import tables
from mi_ray.training.board import Meeting
from mi_ray.training.loop import loop_settings, remove_checkpoints, train
from mi_ray.training.start import local_start, start_adapter
from mi_ray.training.validation import best_version

LOOK_S = 30.0  # seconds that an actor waits for a policy before it checks whether an earlier part was lost

GRACE_S, INTERRUPTED_S = 60.0, 10.0  # seconds to finish parts after the training failed, and after Ctrl-C


class Board:
    """The handle of the board for workers and actors, a `training.online.Board`. The actor is on the driver's node:
    without this node the run ends anyway. It owns the weights in the object store: objects of a worker are lost with
    the worker."""

    def __init__(self, keep: int):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        meeting = ray.remote(Meeting).options(num_cpus=0, max_restarts=0, scheduling_strategy=here)
        self.actor = meeting.remote(keep, ray.put)

    def wait(self, indices: Sequence[int], deadline_s: float | None) -> list[int] | None:
        return ray.get(self.actor.wait.remote(list(indices), deadline_s))

    def publish(self, version: int, policy: dict[str, Tensor]):
        ray.get(self.actor.publish.remote(version, policy))

    def policy(self, version: int, timeout: float) -> tuple[str, dict[str, Tensor] | None]:
        word, reference = ray.get(self.actor.policy.remote(version, timeout))
        return word, ray.get(reference) if reference else None

    def finished(self, indices: Sequence[int]):
        ray.get(self.actor.finished.remote(list(indices)))

    def end(self):
        if ray.is_initialized():  # a call would start Ray again
            self.actor.end.remote()


class OnlineGenerator:
    """Ray Data actor: a batch with one part of the plan -> one row, the receipt of the part.

    The actor waits for the version of the policy in its row. Meanwhile it checks whether an earlier part was lost with
    another actor, and makes such a part itself. Otherwise the training would wait for ever.
    """

    def __init__(
        self, config: dict, source: str, folder: str, board: Board, token: int | None = None, judges: Judges = ()
    ):
        config = RunConfig.model_validate(config)
        take_share(config.resources.cpus_per_actor, config.resources.gpus_per_actor)
        self.folder, self.candidates, self.board = folder, storage.join(folder, CANDIDATES), board
        self.plan = plan_of(config, source)
        self.policy, self.loaded = PolicySampler(config, local_start(config)), (0, False)
        schema = tables.online_schema(config.score.names, columns_of(self.policy.validation_metrics))
        self.write = ShardWriter("online", "policy", self.candidates, schema, config, token, lambda: self.policy.calls)
        ask(judges, self.policy.validation_metrics, self.write.turn)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        (row,) = rows_of(batch)
        while run_folder.committed(self.candidates, row["name"]) is None:
            word = self._take(row, LOOK_S)
            if word == "here":
                break
            if word != "wait":  # this part is no longer needed
                return {name: [value] for name, value in (FACTS | {"index": row["index"]}).items()}
            self._mend(row["index"])
        return self._write(row)

    def _mend(self, until: int):
        """Report earlier parts that are committed to the board, and make those that are missing, if possible:
        the actor that had them may have been lost before or after its commit."""
        names = [self.plan.name(index) for index in range(until)]
        missing = set(run_folder.missing_parts(self.candidates, names))
        self.board.finished([index for index, name in enumerate(names) if name not in missing])
        for row in (self.plan.row(index) for index, name in enumerate(names) if name in missing):
            if self._take(row, 0.0) == "here":
                self._write(row)

    def _write(self, row: dict) -> dict[str, list]:
        def make(shard: Shard, positions: list[int], work: Work) -> list[dict]:
            return self.policy.rows(shard, positions, row["update"], row["validation"], work)

        receipt = self.write({name: np.array([value]) for name, value in row.items()}, make)
        self.board.finished([row["index"]])
        return receipt

    def _take(self, row: dict, timeout_s: float) -> str:
        """Load the policy of a part, if it exists, and return "here". Otherwise return the answer of the board.

        A validation uses the saved policy, because the evaluation uses it too. It is saved before its version is
        published. Only version 0, the base model, can be used before it is saved.
        """
        version = row["version"]
        wanted = version, row["validation"] and version > 0
        if wanted == self.loaded:
            return "here"
        word, state = self.board.policy(version, timeout_s)
        if row["validation"] and word in (("here", "past") if version else ("past",)):
            saved = storage.join(policy_folder(self.folder, version), "adapter_model.safetensors")
            word, state = "here", load_safetensors(storage.read_bytes(saved))
        if word == "here":
            self.policy.load(state)
            self.loaded = wanted
        return word


def online(config: RunConfig, source: str, folder: str, name: str) -> str:
    """Train a policy online into `folder`. Ray must be initialised. Returns the adapter folder of the best policy.

    A second call continues: committed parts are not made again, and the training continues from its last checkpoint.
    The best policy is chosen by its self-score on held-out prompts, see `best_version`.

    Args:
        source: URI of the stored table of prompts.
        folder: URI. In the end it contains candidates/, policies/, training.jsonl and adapter/ with the best policy and
            summary.json: the fields of `training.loop.finetune`, `version` (the best) and `validation` (self-scores).
        name: name of the training run in Ray and in the trackers.

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
    what = "online", "policy", OnlineGenerator, constructor, plan, candidates, config.run_dir, config.resources
    # In a fixed pool each actor holds one shard, so that the shards of an update run in parallel on all actors.
    least, most = config.resources.num_actors
    in_flight = 1 if least == most else 2
    generation = _Thread(lambda: write_missing(*what, in_flight=in_flight, metrics=config.metrics), board.end)
    generation.start()
    try:
        settings = {"prompts": source, "folder": folder, "board": board}
        summary = train(config, loop_settings(config, None, folder, start_adapter(config), name, settings))
    except BaseException as error:
        board.end()
        interrupted = not isinstance(error, Exception)
        generation.join(INTERRUPTED_S if interrupted else GRACE_S)  # Ray Data must end first: it would start Ray again
        if generation.error and not interrupted:  # it caused the error of the training
            raise generation.error from error
        raise
    if summary["stopped"]:
        board.end()
    generation.finish()  # the last validation comes after the last update
    names = storage.list_names(storage.join(folder, POLICIES))
    saved = sorted(int(name.rpartition("-")[2]) for name in names)
    summary |= best_version(config, plan, candidates, saved)
    source = policy_folder(folder, summary["version"])
    for file in storage.list_names(source):
        storage.write_bytes(storage.join(adapter, file), storage.read_bytes(storage.join(source, file)))
    storage.write_json(storage.join(adapter, SUMMARY), summary)
    remove_checkpoints(folder)
    return adapter


class _Thread(threading.Thread):
    """Runs a function in a thread. If it fails, `on_error` is called at once, and `finish` raises the error."""

    def __init__(self, run: Callable[[], None], on_error: Callable[[], None]):
        super().__init__(daemon=True)
        self._run, self._on_error = run, on_error
        self.error: BaseException | None = None

    def run(self):
        try:
            self._run()
        except BaseException as error:
            self.error = error
            self._on_error()

    def finish(self):
        self.join()
        if self.error:
            raise self.error
