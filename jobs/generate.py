"""Generate, score and rank the candidates of the first round: python jobs/generate.py --config FILE --run-dir DIR

It has the command line and run folder of jobs/pipeline.py, which continues the run from here. An online run generates
while it trains, so this job also trains it.
"""

from mi_ray.config import RunConfig
from mi_ray.config.command_line import run_command


def run(config: RunConfig, dry_run: bool):
    from mi_ray.stages.preflight import run_or_describe  # takes seconds; --help and wrong flags do not need it

    run_or_describe(config, dry_run, until="generate")


if __name__ == "__main__":
    run_command(run, "Generate, score and rank the candidates of the first round.", "jobs/configs/shapes-smoke.yaml")
