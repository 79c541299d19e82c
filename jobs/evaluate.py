"""Run everything up to the evaluation of a run. python jobs/evaluate.py --config FILE --run-dir DIR

The same command line and folder as jobs/pipeline.py, which continues from here.
"""

from mi_ray.config import RunConfig
from mi_ray.config.command_line import run_command


def run(config: RunConfig, dry_run: bool):
    from mi_ray.stages.preflight import run_or_describe  # seconds, which --help and a wrong flag do without

    run_or_describe(config, dry_run, until="evaluate")


if __name__ == "__main__":
    run_command(run, "Run everything up to the evaluation of a run.", "jobs/configs/shapes-smoke.yaml")
