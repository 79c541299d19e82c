"""Print the status of a run, from its folder: python jobs/status.py RUN_DIR [--json]"""

import json

from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg, CliToggleFlag, SettingsConfigDict

from mi_ray.config.command_line import run_settings
from mi_ray.config.paths import LocalOrUri
from mi_ray.runs.status import run_status, status_text


class Command(BaseSettings):
    """Print what is done, failed and left in a run, and an estimate of the remaining time. It changes nothing."""

    model_config = SettingsConfigDict(cli_parse_args=True, cli_kebab_case=True, extra="forbid")

    run_dir: CliPositionalArg[LocalOrUri] = Field(description="folder of the run: local, s3:// or gs://")
    json_: CliToggleFlag[bool] = Field(False, alias="json", description="print JSON, for programs")

    def cli_cmd(self):
        status = run_status(self.run_dir)
        print(json.dumps(status, indent=2) if self.json_ else status_text(status))


if __name__ == "__main__":
    run_settings(Command)
