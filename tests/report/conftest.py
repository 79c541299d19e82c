from pathlib import Path

import pytest
from run_folder import config_of, write_run

from mi_ray.config import RunConfig


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="session")
def config(run_dir) -> RunConfig:
    return config_of(run_dir)
