"""The configuration of jobs/export.py."""

from pydantic import Field

from mi_ray.config.paths import LocalOrUri
from mi_ray.config.section import Section


class ExportConfig(Section):
    """Merge the adapter of a finished run into its model: a folder that diffusers loads and the hub takes."""

    run_dir: LocalOrUri = Field(description="folder of the run: local, s3:// or gs://")
    out: LocalOrUri = Field(description="local folder to write; it must not exist, or be empty")
    arm: str = Field("tuned", description="which adapter of the run: tuned, or one of evaluation.controls")
