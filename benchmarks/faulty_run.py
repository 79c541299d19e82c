"""The generation stage with a fault inside its actor, for benchmarks/faults.py: jobs/generate.py's command line.

The environment says which: FAULT is nan, oom, hang or nothing, FAULT_FOLDER is where it is noted that it has happened
(it happens once) and which shards were begun.
"""

import os
import time
import uuid
from pathlib import Path

import torch

from mi_ray.config import run_command
from mi_ray.stages import generate as stage
from mi_ray.stages.preflight import run_or_describe
from mi_ray.storage import create_bytes

FOLDER, FAULT = Path(os.environ["FAULT_FOLDER"]), os.environ.get("FAULT")
FAULTY_CALL = 3  # of the denoiser, counted from 1: in the middle of a batch


class FaultyGenerator(stage.CandidateGenerator):
    """Pickled by value, since it lives in the script that is run; so the actors have the fault and nothing else has."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.calls = 0
        self.denoiser.unet.register_forward_hook(self.after_denoiser)

    def after_denoiser(self, unet, inputs, output):
        self.calls += 1
        if FAULT is None or self.calls != FAULTY_CALL or not create_bytes(str(FOLDER / "happened"), FAULT.encode()):
            return None
        if FAULT == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if FAULT == "hang":
            time.sleep(3600)
        output.sample[0] = torch.nan
        return output

    def __call__(self, batch):
        create_bytes(str(FOLDER / "begun" / uuid.uuid4().hex), str(batch["name"][0]).encode())
        return super().__call__(batch)


if __name__ == "__main__":
    stage.CandidateGenerator = FaultyGenerator

    def generate(config, dry_run):
        run_or_describe(config, dry_run, until="generate")

    run_command(generate, "The generation stage with a fault.", "jobs/configs/shapes-smoke.yaml")
