"""Run everything up to the evaluation of a run. python jobs/evaluate.py --config FILE --run-dir DIR

The same command line and folder as jobs/pipeline.py, which continues from here.
"""

from mi_ray.config import RunConfig, run_command
from mi_ray.stages.pipeline import Plan, run_pipeline
from mi_ray.stages.preflight import describe


def main(config: RunConfig, dry_run: bool):
    if dry_run:
        print(describe(Plan(config)))
    else:
        run_pipeline(config, until="evaluate")


if __name__ == "__main__":
    run_command(main, "Run everything up to the evaluation of a run.", smoke_file="jobs/configs/shapes-smoke.yaml")
