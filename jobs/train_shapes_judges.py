"""Train a judge of the embedded world: python jobs/train_shapes_judges.py --folder DIR --judge blip [--steps N ...]"""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from mi_ray.config.command_line import run_settings
from mi_ray.config.paths import LocalOrUri
from mi_ray.training.shapes_judges import JudgeConfig, train_judge


class Command(BaseSettings, JudgeConfig):
    """Train a judge of the embedded world. The same command with the same folder continues the training."""

    model_config = SettingsConfigDict(cli_parse_args=True, cli_kebab_case=True, cli_implicit_flags=True, extra="forbid")

    folder: LocalOrUri = Field(description="output folder of the scenes, the checkpoint, the log and the judge")

    def cli_cmd(self):
        config = JudgeConfig(**self.model_dump(exclude={"folder"}))
        print(f"The judge is in {train_judge(config, Path(self.folder))}")


if __name__ == "__main__":
    run_settings(Command)
