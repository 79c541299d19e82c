"""Compute other on-trajectory scores from the stored data of a run in rounds: python jobs/rescore.py --run-dir DIR"""

from mi_ray.config.command_line import run_command
from mi_ray.config.rescore import RescoreConfig
from mi_ray.stages.rescore import rescore

if __name__ == "__main__":
    run_command(rescore, RescoreConfig.__doc__, model=RescoreConfig)
