"""A run with a fault in its actors or workers, for benchmarks/faults.py. The command line is that of jobs/pipeline.py.

Environment variables:
- FAULT: nan, oom, hang, trainer, notice or growth; not set: no fault.
- FAULT_CALL: the call of the denoiser in an actor, from 1, at which nan, oom or hang happens.
- FAULT_STEP: the optimiser step at which trainer, notice or growth happens.
- FAULT_FOLDER: folder for files that record that the fault has happened (it happens once) and which work has begun.
- FAULT_UNTIL: last stage of the run.
"""

import os
import signal
import time
import uuid
from functools import partial
from pathlib import Path

import ray
import torch

from mi_ray.config.command_line import run_command
from mi_ray.stages import generate as stage
from mi_ray.stages import online as online_stage
from mi_ray.stages.preflight import run_or_describe
from mi_ray.storage import create_bytes
from mi_ray.training import loop as finetune_stage

FOLDER, FAULT = Path(os.environ["FAULT_FOLDER"]), os.environ.get("FAULT")
STEP, UNTIL = int(os.environ.get("FAULT_STEP", "0")), os.environ.get("FAULT_UNTIL", "generate")
CALL = int(os.environ.get("FAULT_CALL", "1"))


def noted(name: str, text: str = "") -> bool:
    """Create a file in FAULT_FOLDER. False if it exists already."""
    return create_bytes(str(FOLDER / name), text.encode())


class FaultyGenerator(stage.CandidateGenerator):
    """The actor with faults. It is defined in the main script, so it is pickled by value and works in the actors."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.calls = 0
        self.denoiser.network.register_forward_hook(self.after_denoiser)

    def after_denoiser(self, unet, inputs, output):
        self.calls += 1
        if FAULT not in ("nan", "oom", "hang") or self.calls != CALL or not noted("happened", FAULT):
            return None
        if FAULT == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if FAULT == "hang":
            time.sleep(3600)
        output.sample[0] = torch.nan
        return output

    def __call__(self, batch):
        noted(f"begun/{uuid.uuid4().hex}", str(batch["name"][0]))
        return super().__call__(batch)


class FaultyOnlineGenerator(online_stage.OnlineGenerator):
    """Records every part that an actor begins."""

    def _write(self, row):
        noted(f"begun/{uuid.uuid4().hex}", row["name"])
        return super()._write(row)


def faulty_train_loop(settings: dict) -> dict | None:
    """Records every optimiser step. At FAULT_STEP it kills its process, or waits until its node is preempted or until a
    second worker joins, after which all workers are restarted."""
    from mi_ray.training import loop as module

    optimizer_step, calls = module.optimizer_step, []
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if FAULT == "growth" and workers > 1:
        noted("happened", FAULT)

    def step(*arguments, **options):
        calls.append(1)
        if rank == 0:
            noted(f"begun-steps/{uuid.uuid4().hex}")
        if FAULT == "trainer" and rank == workers - 1 and len(calls) == STEP and noted("happened", FAULT):
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "growth" and workers == 1 and len(calls) == STEP:
            noted("waiting")
            time.sleep(3600)  # Ray Train checks once a minute for more resources
        if FAULT == "notice" and workers > 1:
            if len(calls) == STEP:
                noted("waiting")
                while ray.train.get_preemption_info() is None:
                    time.sleep(0.05)
            if len(calls) == STEP + 2:  # after the step that wrote the checkpoint
                ray.train.get_all_reported_checkpoints()
                noted("saved")
                time.sleep(3600)  # until the node is killed
        return optimizer_step(*arguments, **options)

    module.optimizer_step = step
    return module.train_loop(settings)


def run(config, dry_run):
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}  # the nodes do not have them
    ray.init(logging_level="warning", runtime_env={"env_vars": store} if store else None)
    noted("driver", ray.get_runtime_context().get_node_id())
    run_or_describe(config, dry_run, until=UNTIL)


if __name__ == "__main__":
    stage.CandidateGenerator, finetune_stage.train_loop = FaultyGenerator, faulty_train_loop
    online_stage.OnlineGenerator = FaultyOnlineGenerator
    finetune_stage.ScalingConfig = partial(finetune_stage.ScalingConfig, placement_strategy="SPREAD")  # one per node
    run_command(run, "A run with a fault.", "jobs/configs/shapes-smoke.yaml")
