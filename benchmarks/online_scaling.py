"""How busy an online run keeps a cluster's GPUs: python benchmarks/online_scaling.py [--out FILE.json] [--check]"""

import os
import tempfile
import time

import ray
from gates import Benchmark, Findings, Gate, main
from pydantic import Field, PositiveFloat, PositiveInt
from ray.cluster_utils import Cluster
from scaling import CANDIDATES, NODE, PROMPTS, plan

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.inputs.online_plan import plan_of
from mi_ray.runs import folder as run_folder
from mi_ray.runs.layout import CANDIDATES as PARTS
from mi_ray.runs.layout import policy_folder
from mi_ray.stages import online as stage
from mi_ray.training import loop


class OnlineScalingBenchmark(Benchmark):
    """What share of their time are the GPUs of an online run busy, with lag 0 and with lag 1?

    One GPU in eight trains, the others generate; an update's training takes as long as a shard of its candidates. The
    GPUs are declared, not real: model and optimiser sleep. Ray, Ray Data, Ray Train, the board, the waiting for
    policies, the commits and the events are those of a real run. Every simulated GPU is a process here, of half a
    gigabyte, so memory limits how many.
    """

    gpus: PositiveInt = Field(64, description="number of simulated GPUs")
    seconds: PositiveFloat = Field(20.0, description="of a shard's generation, and of an update's training")
    updates: PositiveInt = Field(10, description="length of a run; each update has one shard for each generating GPU")

    def answer(self) -> Findings:
        gpus, updates, seconds = (8, 6, 5.0) if self.smoke else (self.gpus, self.updates, self.seconds)
        rows = [measure(gpus, updates, seconds, lag) for lag in (0, 1)]
        return Findings(rows, {"busy_share": Gate(rows[-1]["busy_share"], minimum=0.9)})


class SleepingPolicy:
    """Takes the time of a `PolicySampler`."""

    seconds = 0.0

    def __init__(self, config: RunConfig):
        self.calls = 0

    def load(self, state: dict):
        pass

    def rows(self, shard, positions: list[int], update: int, validation: bool, work) -> list[dict]:
        began = time.perf_counter()
        time.sleep(self.seconds)
        work.timed("sample", began)
        known = {"score_mitune": 1.0, "update": update}
        return [
            {"prompt_id": shard.prompt_ids[p], "prompt": shard.prompts[p], "candidate_index": c, **known}
            for p in positions
            for c in range(CANDIDATES)
        ]


class SleepingGenerator(stage.OnlineGenerator):
    """Pickled by value with what it refers to, as all of the script that is run."""

    def __init__(self, *arguments, **keywords):
        stage.PolicySampler = SleepingPolicy
        super().__init__(*arguments, **keywords)


def sleeping_loop(settings: dict) -> dict:
    """Takes the time of the training, and publishes empty policies. Returns when each update was trained."""
    config, online = RunConfig.model_validate(settings["config"]), settings["online"]
    parts, first = plan_of(config, online["prompts"]), ray.train.get_context().get_world_rank() == 0
    if first:
        online["board"].publish(0, {})
    spans = []
    for update in range(config.online.updates):
        online["board"].wait(parts.of_update(update), None)
        began = time.time()
        time.sleep(SleepingPolicy.seconds)
        spans.append((began, time.time()))
        if first:
            saved = storage.join(policy_folder(online["folder"], update + 1), "adapter_model.safetensors")
            storage.write_bytes(saved, b"")
            online["board"].publish(update + 1, {})
    return {"steps": config.online.updates, "stopped": None, "spans": spans}


def measure(gpus: int, updates: int, seconds: float, lag: int) -> dict:
    """Run so many updates on so many simulated GPUs."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # many nodes start on few cores
    workers = max(1, gpus // 8)
    actors, SleepingPolicy.seconds = gpus - workers, seconds
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    for _ in range(-(-gpus // NODE)):
        cluster.add_node(num_cpus=NODE)
    ray.init(address=cluster.address, logging_level="warning")
    try:
        with tempfile.TemporaryDirectory() as run_dir:
            online = {"updates": updates, "prompts_per_update": actors * PROMPTS, "lag": lag, "validation_prompts": 0}
            given = {
                "run_dir": run_dir,
                "prompts": {"file": "none.txt"},
                "model": {"path": "shapes"},
                "generate": {"prompts_per_shard": PROMPTS},
                "score": {"names": ["mitune"]},
                "select": {"by": "mitune"},
                "finetune": {"method": "nft", "log_to": []},
                "online": online,
                # A simulated GPU is a CPU of Ray's here: with GPUs, Ray Train would look for real ones.
                "resources": {"num_actors": actors, "train_workers": workers},
            }
            config, source = RunConfig.model_validate(given), plan(actors, run_dir).source
            folder = storage.join(run_dir, "online")
            stage.OnlineGenerator, loop.train_loop = SleepingGenerator, sleeping_loop
            adapter = stage.online(config, source, folder, "simulated")
            spans = storage.read_json(storage.join(adapter, "summary.json"))["spans"]
            commits = storage.join(folder, PARTS, run_folder.COMMITS)
            receipts = [storage.read_json(storage.join(commits, name)) for name in storage.list_names(commits)]
    finally:
        ray.shutdown()
        cluster.shutdown()
    # In steady state: while updates are trained and there are some to draw.
    first, last = spans[1][0], spans[-1][0]
    drawn = [(r["time"] - r["seconds"], r["time"] - r["seconds"] + r["sample_seconds"]) for r in receipts]
    within = [max(0.0, min(end, last) - max(start, first)) for start, end in drawn + spans * workers]
    return {
        "gpus": gpus,
        "of_which_train": workers,
        "lag": lag,
        "updates": updates,
        "seconds": seconds,
        "seconds_per_update": (last - first) / (updates - 2),
        "busy_share": sum(within) / (gpus * (last - first)),
        "lost": updates * actors - len(receipts),
    }


if __name__ == "__main__":
    main(OnlineScalingBenchmark)
