"""Train the embedded model from scratch: python jobs/pretrain_shapes.py --folder DIR [--steps 6000 ...]

`--architecture flow --start-from shapes`: a small Stable Diffusion 3 with the autoencoder and text encoder of `shapes`.
"""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from mi_ray.config.command_line import run_settings
from mi_ray.config.paths import SharedPath
from mi_ray.stages.cluster import start_ray
from mi_ray.training.pretrain import pretrain
from mi_ray.training.pretrain_denoiser import PretrainConfig


class Command(BaseSettings, PretrainConfig):
    """Train the embedded model from scratch. The same command with the same folder continues the training."""

    model_config = SettingsConfigDict(cli_parse_args=True, cli_kebab_case=True, cli_implicit_flags=True, extra="forbid")

    folder: SharedPath = Field(description="output folder of checkpoints, logs and the trained model")

    def cli_cmd(self):
        start_ray()
        config = PretrainConfig(**self.model_dump(exclude={"folder"}))
        print(f"The model is in {pretrain(config, Path(self.folder))}")


if __name__ == "__main__":
    run_settings(Command)
