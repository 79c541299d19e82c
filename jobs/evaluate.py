"""Run everything up to the evaluation of a run. python jobs/evaluate.py --config FILE --run-dir DIR

The same command line and folder as jobs/pipeline.py, which continues from here.
"""

from functools import partial

from mi_ray.command_line import run_command
from mi_ray.stages.preflight import run_or_describe

if __name__ == "__main__":
    run_command(
        partial(run_or_describe, until="evaluate"),
        "Run everything up to the evaluation of a run.",
        "jobs/configs/shapes-smoke.yaml",
    )
