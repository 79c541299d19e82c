"""Score existing pairs of image and caption: python jobs/score.py --input pairs.parquet --run-dir DIR

A single pair: python jobs/score.py --model shapes --image x.png --prompt "a red circle left of a blue square"
"""

from mi_ray.config.command_line import run_command
from mi_ray.inputs.pair_config import ScorePairsConfig


def run(config: ScorePairsConfig, dry_run: bool):
    from mi_ray.stages.score import run_or_describe  # takes seconds; --help and wrong flags do not need it

    run_or_describe(config, dry_run)


if __name__ == "__main__":
    run_command(run, smoke_file="jobs/configs/score-smoke.yaml", model=ScorePairsConfig)
