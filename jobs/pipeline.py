"""The main job: python jobs/pipeline.py --config jobs/configs/shapes.yaml --run-dir runs/demo [--field value ...]"""

from mi_ray.config import RunConfig, run_command
from mi_ray.stages.pipeline import Plan, run_pipeline
from mi_ray.stages.preflight import describe


def main(config: RunConfig, dry_run: bool):
    if dry_run:
        print(describe(Plan(config)))
    else:
        run_pipeline(config)


if __name__ == "__main__":
    run_command(main, RunConfig.__doc__, smoke_file="jobs/configs/shapes-smoke.yaml")
