"""Compute other on-trajectory scores from the stored data of a run in rounds: python jobs/rescore.py --run-dir DIR"""

from mi_ray.config.command_line import run_command
from mi_ray.config.rescore import RescoreConfig


def run(config: RescoreConfig, dry_run: bool):
    from mi_ray.stages.rescore import rescore  # takes seconds; --help and wrong flags do not need it

    rescore(config, dry_run)


if __name__ == "__main__":
    run_command(run, model=RescoreConfig)
