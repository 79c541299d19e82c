"""Utilisation of the GPUs of a cluster: python benchmarks/scaling.py [--online] [--out FILE] [--check] [--smoke]"""

import os
import tempfile
import threading
import time
from collections import defaultdict
from itertools import pairwise

import pyarrow as pa
import ray
from gates import ROOT, Benchmark, Findings, Gate, main
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic_settings import CliToggleFlag
from ray.cluster_utils import Cluster
from simulated_run import Times, simulate

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.config.command_line import load_config
from mi_ray.inputs.online_plan import OnlinePlan
from mi_ray.inputs.prompts import PROMPTS as PROMPT_TABLE
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard, ShardPlan, write_prompts
from mi_ray.runs import folder as run_folder
from mi_ray.stages.shards import ShardWriter, run_stage
from mi_ray.storage import tables

CANDIDATES, STEPS, PROMPTS = 8, 20, 4  # candidates per prompt, steps per candidate, prompts per shard
NODE = 8  # number of GPUs of a simulated machine
SMOKE_SHARD_S = 5.0  # assumed seconds per shard: a measurement would take too long


class ScalingBenchmark(Benchmark):
    """Which share of the time are 1 to 64 GPUs busy, when is the first shard ready, and what does a dead node cost?

    The GPUs are simulated: the denoiser sleeps for the time of a real one. Ray, Ray Data, the actors, the commits and
    the events are those of a real run. Every simulated GPU is a process, so the memory limits their number.

    With --online: an online run on the largest number of GPUs, in simulated time, without Ray. The plan of the parts
    and the board are those of a real run.
    """

    gpus: list[int] = Field([1, 8, 32, 64], description="numbers of simulated GPUs")
    seconds_per_evaluation: PositiveFloat | None = Field(
        None, description="time of a denoiser evaluation; none: that of the embedded model, measured on this machine"
    )
    shards_per_gpu: PositiveInt = Field(12, description="number of shards of a run, per GPU")

    online: CliToggleFlag[bool] = Field(False, description="simulate an online run")
    updates: PositiveInt = Field(20, description="with --online: number of updates")
    seconds_per_prompt: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None,
        description="with --online: time of the generation and of the training of one prompt's candidates on one GPU;"
        " none: those of the demo, measured on a CPU core of this machine",
    )
    parts_per_actor: list[PositiveInt] = Field(
        [1, 2, 4], description="with --online: numbers of parts that an actor makes per update"
    )
    overheads: tuple[float, float, float] = Field(
        (0.2, 1.0, 2.0),
        description="with --online: seconds between two parts of an actor, per update, and per checkpoint",
    )
    spread: float = Field(
        0.1, ge=0, description="with --online: standard deviation of the logarithm of the time of a part"
    )

    def answer(self) -> Findings:
        if self.online:
            return self.answer_online()
        evaluations = 2 * STEPS * CANDIDATES * PROMPTS
        each = self.seconds_per_evaluation or (SMOKE_SHARD_S / evaluations if self.smoke else measured_here())
        seconds = each * evaluations
        sizes = [1, 4] if self.smoke else self.gpus
        shards = 4 if self.smoke else self.shards_per_gpu
        rows = [measure(gpus, shards * gpus, seconds, kill=False) for gpus in sizes]
        if sizes[-1] > 1:
            rows.append(measure(sizes[-1], shards * sizes[-1], seconds, kill=True))
        steady = [row for row in rows if not row["node_killed"]]
        gates = {
            "busy_share": Gate(steady[-1]["busy_share"] or 0.0, minimum=0.95),
            "lost": Gate(sum(row["lost"] for row in rows), maximum=0),
            "duplicated": Gate(sum(row["duplicated"] for row in rows), maximum=0),
        }
        return Findings(rows, gates)

    def answer_online(self) -> Findings:
        """For each number of parts per actor, the best division of the GPUs near the one where generation and training
        take the same time. The last of them also with lag 0."""
        config, _ = load_config(["--config", str(ROOT / "jobs" / "configs" / "shapes.yaml")])
        gpus, updates = (12, 8) if self.smoke else (max(self.gpus), self.updates)
        generation, training = self.seconds_per_prompt or ((2.0, 1.0) if self.smoke else measured_update(config))
        times = Times(generation, training, *self.overheads, self.spread)
        ideal = round(gpus * training / (generation + training))
        with tempfile.TemporaryDirectory() as folder:

            def row(parts: int, workers: int, lag: int) -> dict:
                actors = gpus - workers
                of_plan = online_plan(config, folder, parts * actors, updates, lag)
                found = {"lag": lag, "parts_per_actor": parts, "actors": actors, "training_gpus": workers}
                found |= {"prompts_per_update": of_plan.config.prompts_per_update}
                return found | simulate(of_plan, times, actors, workers, config.generate.candidates_per_prompt)

            def best_of(found: list[dict]) -> dict:
                return max(found, key=lambda of_row: of_row["busy_share"])

            near = range(max(1, ideal - 1), min(gpus, ideal + 2))
            several = self.parts_per_actor[-1:] if self.smoke else self.parts_per_actor
            rows = [best_of([row(parts, workers, 1) for workers in near]) for parts in several]
            best = best_of(rows)
            rows.append(row(rows[-1]["parts_per_actor"], rows[-1]["training_gpus"], 0))
        of_prompt = {"generation_s": generation, "training_s": training}
        return Findings([of_prompt | found for found in rows], {"busy_share": Gate(best["busy_share"], minimum=0.9)})


def measured_update(config: RunConfig) -> tuple[float, float]:
    """Seconds of generation and of training per prompt of an update, on one device."""
    from online import time_of_updates  # imported here: it loads the models' code

    times, prompts = time_of_updates(config, 2), config.online.prompts_per_update
    return times["generation"]["seconds"] / prompts, times["training"]["seconds"] / prompts


def online_plan(config: RunConfig, folder: str, parts: int, updates: int, lag: int) -> OnlinePlan:
    """The plan of an online run with this number of parts in each update."""
    per_shard = config.generate.prompts_per_shard
    held = -(-config.online.validation_prompts // per_shard)
    shards = plan(parts + held, folder, per_shard)
    changed = {"updates": updates, "lag": lag, "prompts_per_update": parts * per_shard}
    return OnlinePlan(shards, config.online.model_copy(update=changed), config.seed)


def measured_here() -> float:
    from mi_ray.diffusion.denoisers import load_denoiser  # imported here: the actors would need more memory
    from mi_ray.scoring.trial import try_batch

    return try_batch(load_denoiser("shapes"), 16).seconds_per_evaluation


class SleepingGenerator:
    """Ray Data actor that sleeps for the time of a real one and writes rows of the real schema."""

    def __init__(self, config: dict, folder: str, seconds: float, token: int | None = None):
        config = RunConfig.model_validate(config)
        self.seconds = seconds
        self.schema = tables.candidates_schema(config.score.names)
        self.write = ShardWriter("generate", "simulated", folder, self.schema, config, token, lambda: 0)

    def __call__(self, batch):
        return self.write(batch, self.rows)

    def rows(self, shard: Shard, positions: list[int], work) -> list[dict]:
        began = time.perf_counter()
        time.sleep(self.seconds)
        work.timed("sample", began)
        work.denoiser_evaluations += 2 * STEPS * CANDIDATES * len(positions)
        rows = []
        for position in positions:
            known = {"prompt_id": shard.prompt_ids[position], "prompt": shard.prompts[position]}
            curves = {"delta_sq": [1.0] * STEPS, "cross": [1.0] * STEPS}
            empty = dict.fromkeys(self.schema.names)
            rows += [empty | known | curves | {"candidate_index": c, "score_mitune": 1.0} for c in range(CANDIDATES)]
        return rows


def plan(count: int, run_dir: str, per_shard: int = PROMPTS) -> ShardPlan:
    """Shards of artificial prompts."""
    prompts = [f"prompt {number}" for number in range(count * per_shard)]
    nothing = [None] * len(prompts)
    source = storage.join(run_dir, "prompts.parquet")
    known = {"prompt_id": [prompt_id(prompt) for prompt in prompts], "prompt": prompts}
    columns = [known.get(name, nothing) for name in PROMPT_TABLE.names]
    write_prompts(source, [pa.record_batch(columns, PROMPT_TABLE)])
    return ShardPlan(source, per_shard, "scaling")


def measure(gpus: int, count: int, seconds: float, kill: bool) -> dict:
    """Run `count` shards on `gpus` simulated GPUs. `kill`: kill a node during the run."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # the start of many nodes on few cores is slow
    per_node = min(NODE, -(-gpus // 2)) if gpus > 1 else 1
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    nodes = [cluster.add_node(num_cpus=per_node, num_gpus=per_node) for _ in range(-(-gpus // per_node))]
    ray.init(address=cluster.address, logging_level="warning")
    try:
        with tempfile.TemporaryDirectory() as run_dir:
            folder = storage.join(run_dir, "candidates")
            resources = {"num_actors": (gpus, gpus), "gpus_per_actor": 1, "cpus_per_actor": 1}
            given = {"score": {"names": ("mitune",)}, "resources": resources}
            config = RunConfig.model_validate({"run_dir": run_dir, "prompts": {"file": "none.txt"}, **given})
            mine = ray.get_runtime_context().get_node_id()  # the driver can be on any node
            victim = next((node for node in nodes if node.node_id != mine), None)
            killer = threading.Thread(target=kill_node, args=(cluster, victim, folder, count // 3), daemon=True)
            if kill:
                killer.start()
            constructor = {"config": config.model_dump(mode="json"), "folder": folder, "seconds": seconds}
            began = time.time()
            run_stage("generate", "simulated", SleepingGenerator, constructor, plan(count, run_dir), folder, config)
            wall = time.time() - began
            return {
                "gpus": gpus,
                "node_killed": kill,
                "shards": count,
                **findings(folder, gpus, count, seconds, began, wall),
            }
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_node(cluster: Cluster, node, folder: str, after: int):
    while len(storage.list_names(storage.join(folder, run_folder.COMMITS))) < after:
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)


def findings(folder: str, gpus: int, count: int, seconds: float, began: float, wall: float) -> dict:
    """The results, from the receipts: busy share in the steady state, while all actors work, and of the whole run."""
    commits = storage.join(folder, run_folder.COMMITS)
    receipts = [storage.read_json(storage.join(commits, name)) for name in storage.list_names(commits)]
    by_actor = defaultdict(list)
    for receipt in sorted(receipts, key=lambda r: r["time"]):
        start = receipt["time"] - receipt["seconds"]
        by_actor[receipt["pid"]].append((start, start + receipt["sample_seconds"]))
    first, last = max(spans[0][0] for spans in by_actor.values()), min(spans[-1][1] for spans in by_actor.values())
    within = sum(max(0.0, min(end, last) - max(start, first)) for spans in by_actor.values() for start, end in spans)
    gaps = [b[0] - a[1] for spans in by_actor.values() for a, b in pairwise(spans)]
    table = storage.read_tables(folder, ["prompt_id", "candidate_index"]).to_pandas()
    expected = count * PROMPTS * CANDIDATES
    return {
        "busy_share": within / (gpus * (last - first)) if last > first else None,  # not defined with a killed node
        "busy_share_whole_run": len(receipts) * seconds / (gpus * wall),
        "first_shard_s": min(receipt["time"] for receipt in receipts) - began,
        "overhead_per_shard_s": sum(gaps) / len(gaps) if gaps else None,
        "seconds_per_shard": seconds,
        "wall_s": wall,
        "lost": expected - len(table.drop_duplicates()),
        "duplicated": int(table.duplicated().sum()),
    }


if __name__ == "__main__":
    main(ScalingBenchmark)
