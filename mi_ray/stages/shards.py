"""Run the shards of a stage with Ray Data: a pool of actors, one commit per shard, resume with the missing shards."""

import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from mi_ray import storage
from mi_ray.config import ResourcesConfig, RunConfig
from mi_ray.inputs.shard_plan import Planned, Shard, ShardPlan, read_shard
from mi_ray.inputs.text import excerpt
from mi_ray.runs import folder as run_folder
from mi_ray.runs import lease
from mi_ray.scoring.machine import Patience, Turn
from mi_ray.scoring.work import Work
from mi_ray.stages.judges import judges_of
from mi_ray.stages.metrics import StageMetrics

START_FAILURES = 3  # consecutive failed actor starts allowed in a pool; at least one per actor
MAX_BLOCKS = 4096  # number of Ray Data blocks, which take some kilobytes each; with more shards a block holds several
Rows = Callable[[Shard, list[int], Work], list[dict]]  # makes the rows of the prompts at these positions of the shard
FACTS = {  # the fields of a shard's receipt that its event repeats, with default values
    "index": 0,
    "shard": "",
    "rows": 0,
    "errors": 0,
    "denoiser_evaluations": 0,
    "score_evaluations": 0,
    "batch_halvings": 0,
    "actor_restarts": 0,
    "host": "",
    "seconds": 0.0,
    "sample_seconds": 0.0,
    "score_seconds": 0.0,
    "decode_seconds": 0.0,
}


# ------------------------------------------------------------------------------------------ in the actor
class ShardWriter:
    """Writes the shards of an actor, for all stages, and updates the actor's metrics.

    A shard that is already committed is not computed again. Any other shard is computed, written and committed once.

    Args:
        token: token of the driver's lease; None: the driver has no lease.
        calls: returns the number of model calls so far, see `Patience`.
    """

    def __init__(
        self,
        stage: str,
        model: str,
        folder: str,
        schema: pa.Schema,
        config: RunConfig,
        token: int | None,
        calls: Callable[[], int],
    ):
        self.folder, self.schema = folder, schema
        self.commit = Committer(folder, config.run_dir, token)
        self.metrics = StageMetrics(stage, model)
        self.patience = Patience(config.resources.shard_timeout_s, calls)
        self.table: storage.ParquetRows | None = None
        self.turn = Turn()

    def __call__(self, batch: dict[str, np.ndarray], make_rows: Rows) -> dict[str, list]:
        """Process a Ray Data batch of one `ShardPlan.row`; the output row is the receipt of the shard."""
        (row,) = rows_of(batch)
        with self.turn():
            receipt = run_folder.committed(self.folder, row["name"]) or self._make(self._shard(row), make_rows)
        facts = FACTS | {"index": row["index"], "shard": row["name"]}
        return {name: [receipt.get(name, fact)] for name, fact in facts.items()}

    def _shard(self, row: dict) -> Shard:
        if self.table is None or self.table.uri != row["source"]:
            try:
                self.table = storage.ParquetRows(row["source"])
            except FileNotFoundError as error:
                shared = "nodes do not share its folder; set a run_dir that all nodes can read, such as s3://bucket/run"
                raise FileNotFoundError(f"{row['source']} is missing on node {platform.node()}: {shared}") from error
        return read_shard(row, self.table)

    def _make(self, shard: Shard, make_rows: Rows) -> dict:
        work = Work()
        with self.patience():
            of_positions = partial(make_rows, shard, work=work)
            rows, failures = whole_or_one_by_one(of_positions, len(shard.prompts), self.commit.proven)
        rows += [error_row(self.schema, shard, position, message) for position, message in failures]
        place = {prompt_id: position for position, prompt_id in enumerate(shard.prompt_ids)}
        number = "candidate_index" if "candidate_index" in self.schema.names else "image_index"
        rows.sort(key=lambda row: (place[row["prompt_id"]], row.get("guidance_scale") or 0, row[number] or 0))
        table = pa.Table.from_pylist(rows, schema=self.schema)
        mine, receipt = self.commit(shard.index, shard.name, table, work, self.turn.seconds)
        self.metrics.committed(mine, rows)
        return receipt


class Committer:
    """Commits an actor's shards, each once, with its cost. The first commit reports whether the actor was restarted."""

    def __init__(self, folder: str, run_dir: str, token: int | None):
        self.folder, self.run_dir, self.token = folder, run_dir, token
        self.restarts = int(is_restarted())
        self.proven = False  # whether this process has committed a shard

    def __call__(self, index: int, name: str, table: pa.Table, work: Work, seconds: float) -> tuple[dict, dict]:
        """Commit a shard. Returns its facts, with the fields of `FACTS`, and the valid receipt of the shard.

        The receipt is that of another process if that one committed the shard first.

        Raises:
            lease.Lost: another driver has taken over the run.
        """
        lease.refuse_if_superseded(self.run_dir, self.token, name)
        facts = {
            "index": index,
            "shard": name,
            "rows": len(table),
            "errors": len(table) - table["error"].null_count,
            "denoiser_evaluations": work.denoiser_evaluations,
            "score_evaluations": work.score_evaluations,
            "batch_halvings": work.batch_halvings,
            "actor_restarts": self.restarts,
            "host": platform.node(),
            "seconds": seconds,
            **{f"{part}_seconds": work.seconds.get(part, 0.0) for part in ("sample", "score", "decode")},
        }
        process = {"pid": os.getpid(), "token": self.token}
        receipt = run_folder.commit(self.folder, name, table, facts | process)
        self.restarts, self.proven = 0, True
        return facts, receipt


def stop_if_machine_failed(error: Exception, alone: bool, proven: bool):
    """End this process if its GPU has failed, so that Ray starts a new process for the shard.

    After a GPU failure every prompt fails, so an error row would say nothing about the prompt. If this process is
    already a replacement and has committed no shard, the error is raised again and the run stops.

    Args:
        alone: whether the prompt was processed alone; if it then runs out of memory, the machine is the cause.
        proven: whether this process has committed a shard.
    """
    failed = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    if failed or (alone and isinstance(error, torch.OutOfMemoryError)):
        if _in_actor() and (proven or not is_restarted()):
            message = f"the GPU failed or its memory is too small: {error}; Ray starts a new process for the shard"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        raise error


def is_restarted() -> bool:
    """Whether this process replaces an earlier process of the same Ray actor."""
    if not _in_actor():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # caused inside Ray
        return ray.get_runtime_context().was_current_actor_reconstructed


def _in_actor() -> bool:
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def rows_of(batch: dict[str, np.ndarray]) -> list[dict]:
    """The rows of a Ray Data batch, with Python numbers and strings."""
    columns = [values.tolist() for values in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]


def whole_or_one_by_one(
    make_rows: Callable[[list[int]], list[dict]], count: int, proven: bool
) -> tuple[list[dict], list[tuple[int, str]]]:
    """Process all prompts or pairs at once. If that fails, process them one by one, so that only bad ones fail.

    Args:
        make_rows: makes the rows of the prompts or pairs at the given positions, 0 to count - 1.
        proven: whether this process has committed a shard.

    Returns:
        The rows, and (position, message) of each prompt or pair that failed.
    """
    everything = list(range(count))
    try:
        return make_rows(everything), []
    except Exception as error:
        stop_if_machine_failed(error, len(everything) == 1, proven)
        if len(everything) == 1:
            return [], [(0, f"{type(error).__name__}: {excerpt(error, 500)}")]
    rows, failures = [], []
    for position in everything:
        try:
            rows += make_rows([position])
        except Exception as error:
            stop_if_machine_failed(error, True, proven)
            failures.append((position, f"{type(error).__name__}: {excerpt(error, 500)}"))
    return rows, failures


def error_row(schema: pa.Schema, shard: Shard, position: int, message: str) -> dict:
    row = dict.fromkeys(schema.names)
    row |= {"prompt_id": shard.prompt_ids[position], "prompt": shard.prompts[position], "error": message}
    return row | {"category": shard.categories[position]}


# ------------------------------------------------------------------------------------------ in the driver
def stream(
    actor: type, constructor: dict, rows: list[dict], resources: ResourcesConfig, in_flight: int = 2, at_once: int = 1
) -> Iterator[dict]:
    """Run shards, one row each, through a pool of actors. Yield the receipt of each shard when it is written.

    Args:
        in_flight: number of shards that an actor holds, the next one beside the current one. A pool that grows needs 2.
        at_once: number of shards that an actor begins in threads of its own, see `Turn`; it holds this many times more.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # hide "progress bars are off"
    least, most = (min(n, len(rows)) for n in resources.num_actors)
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    # No timeout: Ray Data's default is half an hour, but a shard, or waiting for spot machines, can take longer.
    # `Patience` ends processes that hang.
    dataset.context.execution_no_progress_timeout_s = -1
    # A node or a store can fail while an actor starts. Another actor then replaces it.
    dataset.context.max_consecutive_actor_init_deaths = max(START_FAILURES, most)
    dataset.context.target_max_block_size = 1  # byte: yield each receipt at once, not at the end of its block
    dataset = dataset.map_batches(
        actor,
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_tasks_in_flight_per_actor=in_flight * at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
        ),
        num_cpus=resources.cpus_per_actor,
        num_gpus=resources.gpus_per_actor,
        fn_constructor_kwargs=constructor,
    )
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
        yield from rows_of(batch)


def _written_of(run_dir: str, folder: str) -> Iterator[dict]:
    """The events of the written shards of this folder."""
    for event in storage.iter_lines(storage.join(run_dir, "events.jsonl")):
        if event["event"] == "shard_written" and event.get("folder") == folder:
            yield event


def write_missing(
    stage: str,
    model: str,
    actor: type,
    constructor: dict,
    shards: Planned,
    folder: str,
    run_dir: str,
    resources: ResourcesConfig,
    unit: str = "prompt",
    in_flight: int = 2,
    metrics: tuple[str, ...] = (),
    at_once: int = 1,
):
    """Write the missing parts of a folder, with a progress bar and an event for each part.

    Args:
        unit: unit of the progress bar.
        metrics: names of the metrics that judges measure, if there are judges.
        at_once: number of shards that an actor begins if there are judges: one computes while others wait for values.

    Raises:
        lease.Lost: another driver has taken over the run.
    """
    names = [shards.name(index) for index in range(len(shards))]
    run_folder.adopt_parts(folder, names)
    missing = set(run_folder.missing_parts(folder, names))
    todo = [index for index, name in enumerate(names) if name in missing]
    what = {"stage": stage, "model": model, "folder": storage.relative(folder, run_dir)}
    logged = {event["shard"] for event in _written_of(run_dir, what["folder"])}
    for index, name in enumerate(names):  # committed, but an earlier driver ended before it wrote the event
        if name not in missing and name not in logged:
            receipt = run_folder.committed(folder, name)
            facts = FACTS | {"index": index, "shard": name, "time": receipt["time"]}
            facts = {key: receipt.get(key, fact) for key, fact in facts.items()}
            run_folder.log_event(run_dir, "shard_written", **what, **facts)
    run_folder.log_event(run_dir, "shards_planned", **what, shards=len(shards), missing=len(todo))
    del names, missing, logged
    constructor = constructor | {"token": lease.current_token(run_dir)}
    total = sum(shards.size(index) for index in range(len(shards)))
    here = total - sum(shards.size(index) for index in todo)
    bar = {"desc": f"{stage} {model}", "unit": unit, "mininterval": 2, "dynamic_ncols": True}
    with tqdm(total=total, initial=here, **bar) as progress, judges_of(metrics if todo else (), resources) as judges:
        constructor |= {"judges": judges} if judges else {}
        rows = [shards.row(index) for index in todo]
        for done in stream(actor, constructor, rows, resources, in_flight, at_once if judges else 1) if rows else ():
            lease.confirm(run_dir)
            if not done["shard"]:  # the shard is no longer needed
                continue
            run_folder.log_event(run_dir, "shard_written", **what, **done)
            progress.update(shards.size(done["index"]))
    lease.confirm(run_dir)


def run_stage(
    stage: str, model: str, actor: type, constructor: dict, shards: ShardPlan, folder: str, config: RunConfig
) -> dict:
    """Write the missing parts of a folder, then its manifest. Returns the manifest."""
    manifest_uri = storage.join(folder, run_folder.MANIFEST)
    if storage.exists(manifest_uri):
        return storage.read_json(manifest_uri)
    what = stage, model, actor, constructor, shards, folder, config.run_dir, config.resources
    # PyTorch keeps CUDA graphs per thread.
    write_missing(*what, metrics=config.metrics, at_once=1 if config.model.compile == "cuda-graphs" else 2)
    manifest = {"shards": len(shards), "prompts": shards.prompts}
    storage.write_json(manifest_uri, manifest)
    return manifest
