"""How a run stands, from its folder alone: python jobs/status.py RUN_DIR [--json]"""

import json
import sys

from pydantic import Field
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliToggleFlag, SettingsConfigDict

from mi_ray.config.paths import LocalOrUri
from mi_ray.config.section import ConfigError
from mi_ray.runs.status import run_status, status_text


class Command(BaseSettings):
    """Tell what is done, what failed and what is left of a run, and how long that may take. It changes nothing."""

    model_config = SettingsConfigDict(cli_parse_args=True, cli_kebab_case=True, extra="forbid")

    run_dir: CliPositionalArg[LocalOrUri] = Field(description="folder of the run, local, s3:// or gs://")
    json_: CliToggleFlag[bool] = Field(False, alias="json", description="as JSON, for programs")

    def cli_cmd(self):
        try:
            status = run_status(self.run_dir)
        except ConfigError as error:
            for fault in error.faults:
                print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)
        print(json.dumps(status, indent=2) if self.json_ else status_text(status))


if __name__ == "__main__":
    CliApp.run(Command)
