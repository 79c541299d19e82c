"""Find the noise levels at which a score ranks best: python jobs/calibrate.py --prompts.file FILE --out F.yaml

No labels are needed; where prompts are of the shapes grammar, `--alignment oracle` shows how it does against them.
"""

from mi_ray.config.calibration import CalibrationConfig
from mi_ray.config.command_line import run_command
from mi_ray.stages.calibrate import calibrate

if __name__ == "__main__":
    run_command(
        calibrate,
        "Find the noise levels at which a model's contrastive score ranks the candidates of a prompt best.",
        "jobs/configs/calibrate-smoke.yaml",
        CalibrationConfig,
    )
