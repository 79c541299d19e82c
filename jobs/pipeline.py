"""The main job: python jobs/pipeline.py --config jobs/configs/shapes.yaml --run-dir runs/demo [--field value ...]"""

from mi_ray.config import RunConfig
from mi_ray.config.command_line import run_command


def run(config: RunConfig, dry_run: bool):
    from mi_ray.stages.preflight import run_or_describe  # takes seconds; --help and wrong flags do not need it

    run_or_describe(config, dry_run)


if __name__ == "__main__":
    run_command(run, RunConfig.__doc__, "jobs/configs/shapes-smoke.yaml")
