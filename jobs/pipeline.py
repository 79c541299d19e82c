"""The main job: python jobs/pipeline.py --config jobs/configs/shapes.yaml --run-dir runs/demo [--field value ...]"""

from mi_ray.command_line import run_command
from mi_ray.config import RunConfig
from mi_ray.stages.preflight import run_or_describe

if __name__ == "__main__":
    run_command(run_or_describe, RunConfig.__doc__, "jobs/configs/shapes-smoke.yaml")
