"""Run everything up to the fine-tuning of a run, controls included. python jobs/finetune.py --config FILE --run-dir DIR

The same command line and folder as jobs/pipeline.py, which continues from here.
"""

from functools import partial

from mi_ray.command_line import run_command
from mi_ray.stages.preflight import run_or_describe

if __name__ == "__main__":
    run_command(
        partial(run_or_describe, until="finetune"),
        "Run everything up to the fine-tuning of a run, controls included.",
        "jobs/configs/shapes-smoke.yaml",
    )
