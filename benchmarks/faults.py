"""Lost and repeated work of runs with faults: python benchmarks/faults.py [--out FILE.json] [--check] [--smoke]"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
from gates import ROOT, Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt
from pydantic_settings import CliToggleFlag
from safetensors.numpy import load
from surroundings import Nodes, flaky_store, head, nodes, small_disk

from mi_ray import storage
from mi_ray.runs import folder as run_folder
from mi_ray.runs import lease

SHARDS = 8  # number of shards of candidates
STEPS, EVERY, BATCH, BATCHES = 12, 4, 3, 2  # optimiser steps, steps per checkpoint, rows per batch, batches per step
RUN = [
    *("--smoke", "--prompts.limit", str(SHARDS), "--generate.prompts-per-shard", "1"),
    *("--generate.preview-prompts", "0", "--resources.shard-timeout-s", "30", "--finetune.log-to", "none"),
    *("--finetune.steps", str(STEPS), "--finetune.checkpoint-every", str(EVERY)),
    *("--finetune.batch-size", str(BATCH), "--finetune.gradient-accumulation", str(BATCHES)),
]
UPDATES, INNER = STEPS // 2, 2  # online run: updates, and steps per update; it has the same steps and checkpoints
ONLINE = [
    *("--online.updates", str(UPDATES), "--online.inner-steps", str(INNER), "--online.prompts-per-update", "2"),
    *("--online.validate-every", str(EVERY // INNER), "--online.validation-prompts", "2"),
    *("--online.validation-candidates", "2", "--finetune.method", "nft", "--score.names", "mitune"),
    *("--select.by", "mitune", "--resources.num-actors", "2,2", "--resources.cpus-per-actor", "0.5"),
    *("--resources.train-cpus", "0.5"),  # one actor and one training worker on each node
]
WAIT_S = 900
KILLED = ("driver", "actor", "worker", "node")  # processes that are killed during the generation
INSIDE = ("nan", "oom", "hang")  # faults inside a generating actor
TRAINING = ("trainer", "notice", "growth")  # faults during the fine-tuning
WHOLE = (*TRAINING, "driver", "s3", "job")  # runs until the adapter; the others only until the candidates
CALLS = 30  # the faulty call of the denoiser is drawn from the first calls of an actor
KINDS = (*KILLED, *INSIDE, "s3", "disk", *TRAINING, "job")
MUST_BE_ZERO = (
    "lost",
    "duplicated",
    "changed",
    "events_off",
    "curves_off",
    "adapters_off",
    "unreported",
    "half_written",
)
OF_ONLINE = ("driver", "actor", "trainer", "node", "notice")


class FaultsBenchmark(Benchmark):
    """Which results of a run are lost, duplicated or changed by each kind of fault, and how much work is repeated?

    The same command is repeated until it succeeds. Rows and adapter are compared with those of a run without faults. A
    candidate with NaN in the model's output must be there once, as an error row. If the fault did not happen (the run
    ended before, or the training had only one worker), the run is counted and repeated.
    """

    kinds: list[str] = Field(
        list(KINDS),
        description="kinds of faults: driver, actor, worker, node, trainer (killed), nan, oom, hang, s3 (errors, slow"
        " answers, lost connections), disk (full), notice (a preemption notice for a node of the training), growth (a"
        " second node joins the training), job (a job of `ray job submit` whose driver is killed)",
    )
    online: CliToggleFlag[bool] = Field(
        False, description=f"use an online run; it has the kinds {', '.join(OF_ONLINE)}, all of them by default"
    )
    driver_kills: PositiveInt = Field(20, description="number of killed drivers; of each other kind half as many")
    seed: int = Field(0, description="seed of the random moments of the faults")

    def answer(self) -> Findings:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds: unknown {', '.join(sorted(unknown))}; use {', '.join(KINDS)}")
        kinds = list(OF_ONLINE) if self.online and self.kinds == list(KINDS) else self.kinds
        if self.online and (unfit := set(kinds) - set(OF_ONLINE)):
            kinds_of_online = ", ".join(OF_ONLINE)
            raise ValueError(f"kinds: --online does not have {', '.join(sorted(unfit))}; use {kinds_of_online}")
        counts = {kind: self.driver_kills if kind == "driver" else -(-self.driver_kills // 2) for kind in kinds}
        if self.smoke:
            counts = dict.fromkeys([kind for kind in ("driver", "oom", "disk", "notice") if kind in kinds], 1)
        rng = random.Random(self.seed)
        rows = []
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, nodes() as cluster:
            truth = Disturbed(Path(folder) / "undisturbed", "none", rng, self.online)
            truth.until = "finetune" if self.online or set(counts) & set(WHOLE) else "generate"
            truth.run(cluster)
            for kind, count in counts.items():
                results = []
                while sum(r["happened"] for r in results) < count and (number := len(results)) < 2 * count:
                    run = Disturbed(Path(folder) / f"{kind}-{number}", kind, rng, self.online)
                    began = time.monotonic()
                    run.run(cluster, truth.run_dir)
                    results.append(run.compared_with(truth))
                    shown = ", ".join(f"{name} {value}" for name, value in results[-1].items())
                    print(f"{kind} {number}: {time.monotonic() - began:.0f} s, {shown}", file=sys.stderr, flush=True)
                rows.append({"fault": kind, "runs": len(results), **summed(results)})
        totals = {name: sum(row[name] for row in rows) for name in MUST_BE_ZERO}
        gates = {name: Gate(total, maximum=0) for name, total in totals.items()}
        gates["happened"] = Gate(sum(r["happened"] for r in rows) / sum(r["runs"] for r in rows), minimum=0.8)
        return Findings(rows, gates)


def summed(results: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(result[name] for result in results) for name in results[0]}


class Disturbed:
    """A run with one fault at a random moment."""

    def __init__(self, folder: Path, kind: str, rng: random.Random, online: bool):
        self.folder, self.kind, self.online = folder, kind, online
        self.home = "online" if online else "round-0"
        self.key = ["prompt_id", "candidate_index", *(["update"] if online else [])]
        self.after, self.pause = rng.randrange(SHARDS - 1), rng.uniform(0, 1.5)
        self.step, self.seed = rng.randrange(2, STEPS - 2), rng.randrange(2**31)
        self.call, self.late = rng.randrange(1, CALLS), rng.random() < 0.5  # late: during the fine-tuning
        self.until = "finetune" if online or kind in WHOLE else "generate"
        self.run_dir = str(folder / "run")
        self.commands, self.happened, self.unreported, self.half_written = 0, False, 0, 0
        folder.mkdir(parents=True)

    # -------------------------------------------------------------------------------------- the run
    def run(self, cluster: Nodes, generated: str = ""):
        """Repeat the command until it succeeds. The fault happens during the first one.

        Args:
            generated: folder of a run without faults. A fault in the training starts from its candidates.

        Raises:
            RuntimeError: the command failed too often.
        """
        self.cluster, self.enlarge, self.head = cluster, None, None
        mine = {"FAULT_FOLDER": str(self.folder), "FAULT_UNTIL": self.until}
        mine |= {"FAULT_STEP": str(self.step), "FAULT_CALL": str(self.call)}
        self.environment = os.environ | cluster.environment | mine
        if self.kind in (*INSIDE, *TRAINING):
            self.environment["FAULT"] = self.kind
        with ExitStack() as stack:
            if self.kind == "disk":
                size = 60 + self.seed % 120  # KiB, enough for some of the shards
                self.enlarge = stack.enter_context(small_disk(Path(self.run_dir), size))
            if self.kind == "job":
                self.head, closed = stack.enter_context(head(self.folder))
                self.environment |= closed
                del self.environment["RAY_ADDRESS"]  # it would override --address
            store = stack.enter_context(flaky_store(self.seed)) if self.kind == "s3" else None
            if store:
                self.environment |= store.environment
                self.run_dir = f"s3://runs/{self.folder.name}"
                os.environ |= store.environment
            if self.kind == "growth":
                cluster.kill(cluster.nodes[0])
            if self.kind in TRAINING and not self.online:
                shutil.copytree(generated, self.run_dir, ignore=shutil.ignore_patterns("adapter"))
            for _ in range(4):
                self.commands += 1
                if self._command() == 0:
                    break
            else:
                log = (self.folder / "log").read_text()[-3000:]
                raise RuntimeError(f"{self.kind}: the command failed {self.commands} times\n{log}")
            self.happened |= (self.folder / "happened").exists() or bool(store and store.refused)
            self._read()
        cluster.mend()

    def _read(self):
        self.table = storage.read_tables(storage.join(self.run_dir, self.home, "candidates")).to_pandas()
        self.receipts = self._receipts()
        self.events = storage.read_lines(storage.join(self.run_dir, "events.jsonl"))
        self.adapter, self.steps = {}, []
        if self.until == "finetune":
            adapter = storage.join(self.run_dir, self.home, "adapter")
            self.adapter = load(storage.read_bytes(storage.join(adapter, "adapter_model.safetensors")))
            self.steps = storage.read_lines(
                storage.join(self.run_dir, self.home, *([] if self.online else ["adapter"]), "training.jsonl")
            )

    def _command(self) -> int:
        script = ROOT / ("jobs/pipeline.py" if self.head else "benchmarks/faulty_run.py")
        command = [
            *(self.head or ()),
            sys.executable,
            str(script),
            *RUN,
            *(ONLINE if self.online else ()),
            "--run-dir",
            self.run_dir,
        ]
        if self.kind == "node" and not self.online:
            command += ["--resources.num-actors", "2,2"]  # one on each node
        if self.kind in TRAINING:
            command += ["--resources.train-workers", "1,2"]
        output = self.folder / f"log-{self.commands}"
        with output.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=self.environment)
            try:
                if self.kind in (*KILLED, "job") and not self.happened:
                    self._kill(process)
                if self.kind == "notice" and not self.happened:
                    self._take_node(process)
                if self.kind == "growth" and not self.happened:
                    self._until(process, (self.folder / "waiting").exists)
                    self.cluster.mend()
                code = process.wait(WAIT_S)
            finally:
                process.kill()
        if self.enlarge and not self.happened:
            self._check_full_disk(code, output.read_text(errors="replace"))
        with (self.folder / "log").open("ab") as log:
            log.write(output.read_bytes())
        return code

    # -------------------------------------------------------------------------------------- the faults
    def _kill(self, driver: subprocess.Popen):
        """Kill the driver, a generating actor, any worker, or a node, after a random number of committed shards. Half
        of the drivers are killed after a random number of optimiser steps instead."""
        if self.kind == "driver" and self.late:
            self._until(driver, lambda: len(self._begun_steps()) >= self.step)
        else:
            self._until(driver, lambda: len(self._receipts()) >= self.after and (self._begun() or self._receipts()))
        time.sleep(self.pause)
        if driver.poll() is not None:
            return
        if self.kind == "job":  # the process started here only waits for the driver
            os.kill(lease.latest(self.run_dir)[1]["pid"], signal.SIGKILL)
            self.happened = True
            return
        if self.kind == "node":
            self.cluster.kill(self.cluster.other_than((self.folder / "driver").read_text()))
            self.happened = True
            return
        workers = [pid for pid, name in descendants(os.getpid()) if name.startswith("ray::") and "Agent" not in name]
        actors = [pid for pid, name in descendants(os.getpid()) if "Faulty" in name]
        victims = {"driver": [driver.pid], "actor": actors, "worker": workers}[self.kind]
        if victims:
            os.kill(victims[self.seed % len(victims)], signal.SIGKILL)
            self.happened = True

    def _take_node(self, driver: subprocess.Popen):
        """Send a preemption notice to a node of the training. Kill the node after the checkpoint and further steps."""
        for moment, seconds in (("waiting", 300), ("saved", 0)):
            self._until(driver, (self.folder / moment).exists)
            if driver.poll() is not None:
                return
            node = self.cluster.other_than((self.folder / "driver").read_text())
            self.cluster.give_notice(node, seconds)
        self.cluster.kill(node)
        self.happened = True

    def _check_full_disk(self, code: int, output: str):
        """After the first command: check that it printed one message and left no incomplete files. Enlarge the disk."""
        messages = [line for line in output.splitlines() if line.startswith("error: ")]
        self.happened = "is full" in output
        self.unreported = int(self.happened and (code != 2 or len(messages) != 1))
        parts = Path(self.run_dir).rglob("*")
        self.half_written = sum(path.is_file() and path.name.startswith(".") for path in parts)
        self.half_written += sum(not readable(path) for path in Path(self.run_dir).rglob("*.parquet"))
        self.enlarge()

    def _until(self, driver: subprocess.Popen, reached):
        deadline = time.monotonic() + WAIT_S
        while driver.poll() is None and time.monotonic() < deadline and not reached():
            time.sleep(0.02)

    def _begun(self) -> list[str]:
        return [file.read_text() for file in (self.folder / "begun").glob("[!.]*")]

    def _begun_steps(self) -> list[Path]:
        return list((self.folder / "begun-steps").glob("[!.]*"))

    def _receipts(self) -> list[dict]:
        folder = storage.join(self.run_dir, self.home, "candidates", run_folder.COMMITS)
        return [storage.read_json(storage.join(folder, name)) for name in storage.list_names(folder) if name[0] != "."]

    # -------------------------------------------------------------------------------------- the comparison
    def rows(self) -> pd.DataFrame:
        return self.table.sort_values(self.key).reset_index(drop=True)

    def compared_with(self, undisturbed: "Disturbed") -> dict[str, int]:
        """The differences to the run without faults: numbers of lost, duplicated and changed rows, of wrong events,
        curves and adapters; and the repeated work in shards, optimiser steps and denoiser evaluations (a training row
        counts as one)."""
        mine, truth = self.rows(), undisturbed.rows()
        key = self.key
        keys, wanted = ({tuple(row) for row in frame[key].itertuples(index=False)} for frame in (mine, truth))
        both = truth.merge(mine.drop_duplicates(key), on=key, suffixes=("", "_mine"))
        failed = both["error_mine"].notna()
        same = (both["seed"] == both["seed_mine"]) & (
            failed | np.isclose(both["score_mitune"], both["score_mitune_mine"], rtol=1e-3)
        )
        trained = "advantage" if self.online else "kept"
        trained_off = ~np.isclose(
            both[trained].astype(float), both[f"{trained}_mine"].astype(float), atol=1e-2, equal_nan=True
        )
        kept_off = trained_off & ~both["prompt_id"].isin(both["prompt_id"][failed])
        written = sum(
            e["event"] == "shard_written" and e["stage"] == ("online" if self.online else "generate")
            for e in self.events
        )
        expected_errors = 1 if self.kind == "nan" and self.happened else 0
        begun, steps_begun = self._begun(), self._begun_steps()
        shards = len(begun) - len(self.receipts) if begun else 0
        steps = len(steps_begun) - len(self.steps) if steps_begun else 0
        of_shard = max(r["denoiser_evaluations"] + r["score_evaluations"] for r in undisturbed.receipts)
        return {
            "happened": int(self.happened),
            "commands": self.commands,
            "rows": len(mine),
            "lost": len(wanted - keys),
            "duplicated": len(mine) - len(keys),
            "changed": int((~same | kept_off).sum()) + abs(int(failed.sum()) - expected_errors),
            "events_off": abs(written - len(self.receipts)),
            "curves_off": sum(self._curve_off(undisturbed, name) for name in ("loss", "reward")),
            "adapters_off": int(not self._same_adapter(undisturbed)),
            "unreported": self.unreported,
            "half_written": self.half_written,
            "shards_repeated": shards,
            "steps_repeated": steps,
            "evaluations_repeated": shards * of_shard + steps * BATCHES * BATCH,
        }

    def _curve_off(self, other: "Disturbed", name: str) -> bool:
        """Whether a value of the training log differs at any step."""
        if self.until != "finetune":
            return False
        mine, theirs = (np.array([line.get(name) for line in run.steps], float) for run in (self, other))
        return len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=1e-3, equal_nan=True)

    def _same_adapter(self, other: "Disturbed") -> bool:
        """Whether the weights are equal up to rounding."""
        return self.until != "finetune" or (
            self.adapter.keys() == other.adapter.keys()
            and all(np.allclose(w, other.adapter[n], atol=1e-4, rtol=1e-2) for n, w in self.adapter.items())
        )


def readable(part: Path) -> bool:
    try:
        return len(storage.read_table(str(part))) > 0
    except (OSError, ValueError):
        return False


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """(process id, command) of all direct and indirect child processes."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    for child in parents:
        ancestor = parents.get(child)
        while ancestor and ancestor != pid:
            ancestor = parents.get(ancestor)
        if ancestor == pid:
            yield child, names.get(child, "")


if __name__ == "__main__":
    main(FaultsBenchmark)
