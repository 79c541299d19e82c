"""Find the noise levels at which a score ranks best: jobs/calibrate.py --model.path M --prompts.file F --out FILE.yaml

It needs no labels. For prompts of the shapes grammar, `--alignment oracle` compares the result with exact labels.
"""

from mi_ray.config.calibration import CalibrationConfig
from mi_ray.config.command_line import run_command


def run(config: CalibrationConfig, dry_run: bool):
    from mi_ray.stages.calibrate import calibrate  # takes seconds; --help and wrong flags do not need it

    calibrate(config, dry_run)


if __name__ == "__main__":
    run_command(
        run,
        "Find the noise levels at which the contrastive score of a model ranks the candidates of a prompt best.",
        "jobs/configs/calibrate-smoke.yaml",
        CalibrationConfig,
    )
