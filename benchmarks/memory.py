"""Memory by number of prompts: python benchmarks/memory.py [--out FILE.json] [--check] [--smoke]"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import ray
from gates import ROOT, Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig
from mi_ray.inputs.shard_plan import Shard
from mi_ray.report.page import write_report
from mi_ray.runs.status import run_status
from mi_ray.stages import generate as stage
from mi_ray.stages.pipeline import Plan, open_run
from mi_ray.stages.shards import ShardWriter
from mi_ray.storage import tables
from mi_ray.training.select import select

MB = 2**20
CANDIDATES = 2  # per prompt, the smallest possible pool
METRICS = {"made-up": (Column("good", "made up", "yes/no", 0, 1),)}
WORDS = ("red", "blue", "green", "small", "large", "cat", "dog", "owl", "house", "boat")


class MemoryBenchmark(Benchmark):
    """How much memory of the driver and of the object store does a run with 10^4, 10^5 or 10^6 prompts need?

    Each run is a separate process. It plans a prompt file, generates, selects, reads the status and writes the report.
    It uses the code of a real run, except for the actor, which writes artificial candidates. Memory is measured
    relative to an idle driver with Ray and all libraries loaded. The gates compare the two largest runs, because a
    small run does not fill the buffers. Tokens of prompts are not counted (`prompts.overlong: truncate`): this takes
    time, not memory.
    """

    prompts: list[int] = Field([10_000, 100_000, 1_000_000], description="numbers of prompts, in ascending order")
    prompts_per_shard: PositiveInt = Field(1000, description="prompts per shard; each shard needs a few kilobytes")
    alone: PositiveInt | None = Field(None, description="measure one run with this number of prompts, in this process")

    def answer(self) -> Findings:
        if self.alone:
            return Findings([measure(self.alone, self.prompts_per_shard)], {})
        if len(self.prompts) < 2 or sorted(self.prompts) != self.prompts:
            raise ValueError(f"prompts: {self.prompts} is invalid; give two or more numbers in ascending order")
        sizes = [500, 5000] if self.smoke else self.prompts
        per_shard = 100 if self.smoke else self.prompts_per_shard
        rows = [in_a_fresh_process(count, per_shard) for count in sizes]
        fewer, most = rows[-2:]
        gates = {
            "driver_growth": Gate(most["driver_peak_mb"] / fewer["driver_peak_mb"], maximum=1.25),
            "object_store_growth_mb": Gate(most["object_store_peak_mb"] - fewer["object_store_peak_mb"], maximum=8),
            "lost": Gate(sum(row["prompts"] - row["selected"] for row in rows), maximum=0),
        }
        return Findings(rows, gates)


def in_a_fresh_process(count: int, per_shard: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        arguments = ["--alone", str(count), "--prompts-per-shard", str(per_shard), "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(
                f"the run with {count} prompts failed with status {done.returncode}; see its output above"
            )
        (row,) = storage.read_json(str(out))["results"]
    print(row, file=sys.stderr, flush=True)
    return row


class MadeUpGenerator:
    """Ray Data actor that reads, writes and commits like the real one, with artificial values instead of a model's."""

    def __init__(
        self,
        config: dict,
        round_index: int,
        folder: str,
        adapter: str | None,
        keep_by: list[str],
        previews: list[str],
        pool: list[str],
        token: int | None = None,
    ):
        config = RunConfig.model_validate(config)
        schema = tables.candidates_schema(config.score.names, METRICS)
        self.empty = dict.fromkeys(schema.names)
        self.write = ShardWriter("generate", f"round {round_index}", folder, schema, config, token, lambda: 0)

    def __call__(self, batch):
        return self.write(batch, self.rows)

    def rows(self, shard: Shard, positions: list[int], work) -> list[dict]:
        rows = []
        for position in positions:
            known = {"prompt_id": shard.prompt_ids[position], "prompt": shard.prompts[position]}
            for candidate in range(CANDIDATES):
                kept = {"kept": candidate == 1, "rank": 1 - candidate, "score_mitune": float(candidate)}
                kept |= {"good": float(position % 2 == candidate)}
                latents = {"latents": [0.0] * 16 if kept["kept"] else None, "latents_shape": [16]}
                rows.append(self.empty | known | kept | latents | {"candidate_index": candidate})
        return rows


# ------------------------------------------------------------------------------------------ one run
def measure(count: int, per_shard: int) -> dict:
    """Peak memory and times of one run."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # the machine may be busy
    ray.init(logging_level="warning", num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"
        with file.open("w") as lines:
            for number in range(count):
                lines.write(" ".join(WORDS[int(digit)] for digit in f"{number:012d}") + "\n")
        given = {
            "run_dir": str(Path(folder) / "run"),
            "prompts": {"file": str(file), "overlong": "truncate"},
            "evaluation": {"holdout_share": 1e-9},  # one prompt, which is not used here
            "generate": {"candidates_per_prompt": CANDIDATES, "prompts_per_shard": per_shard},
            "score": {"names": ("mitune",)},
            "resources": {"num_actors": (2, 2), "cpus_per_actor": 0.5},
        }
        config = RunConfig.model_validate(given)
        stage.CandidateGenerator = MadeUpGenerator
        candidates, selected = (storage.join(config.run_dir, "round-0", n) for n in ("candidates", "selected.parquet"))
        with watched() as peaks:
            plan, plan_s = timed(lambda: Plan(config))
            open_run(plan)
            peaks.mark("plan")
            arguments = (0, None, ["mitune"], [], plan.pool)
            _, generate_s = timed(lambda: stage.generate(config, plan.shards, candidates, *arguments))
            peaks.mark("generate")
            counts, select_s = timed(lambda: select(config, candidates, selected, "mitune"))
            run_status(config.run_dir)
            peaks.mark("select")
            _, report_s = timed(lambda: write_report(config.run_dir, config))
            peaks.mark("end")
        shards = len(plan.shards)
    ray.shutdown()
    return {
        "prompts": count - 1,  # one is held out
        "shards": shards,
        "driver_idle_mb": peaks.idle,
        "driver_peak_mb": peaks.driver["end"],
        "driver_after_plan_mb": peaks.driver["plan"],
        "driver_after_generate_mb": peaks.driver["generate"],
        "driver_after_select_mb": peaks.driver["select"],
        "object_store_peak_mb": peaks.store,
        "plan_s": plan_s,
        "generate_s": generate_s,
        "shards_per_s": shards / generate_s,
        "select_s": select_s,
        "report_s": report_s,
        "selected": counts["kept"],
    }


def timed(run) -> tuple:
    began = time.monotonic()
    return run(), time.monotonic() - began


class Peaks:
    """Peak memory so far, in MB: resident memory of the driver above its idle value, and use of the object store."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # reset the kernel's record of the peak
        self.idle, self.driver, self.store = resident("VmRSS"), {}, 0.0

    def mark(self, when: str):
        self.driver[when] = resident("VmHWM") - self.idle

    def look(self, stopped: threading.Event):
        total = ray.cluster_resources()["object_store_memory"]
        while not stopped.wait(0.2):
            self.store = max(self.store, (total - ray.available_resources()["object_store_memory"]) / MB)


def resident(name: str) -> float:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@contextmanager
def watched():
    peaks, stopped = Peaks(), threading.Event()
    watcher = threading.Thread(target=peaks.look, args=(stopped,), daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        stopped.set()
        watcher.join()


if __name__ == "__main__":
    main(MemoryBenchmark)
