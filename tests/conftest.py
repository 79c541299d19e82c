"""Tiny models for all tests: real classes and files with random weights; a step takes milliseconds."""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported, so that its programs run on the CPU

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from mi_ray.shapes.model import MAX_TOKENS, build_tokenizer

WIDTH = 16


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests marked long: half an hour more")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="make test-long"))


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """A test that sets the number of threads does not change it for the tests after it."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """Run a benchmark in this process, without the seconds of new imports: (script, *arguments) -> exit status, stdout
    and stderr."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        status = 0
        try:
            runpy.run_path(str(folder / script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def s3_server():
    """The address of an S3 server in this process, without buckets. Its credentials are in the environment."""
    from moto.server import ThreadedMotoServer  # takes seconds and only a few tests need it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def gcs_server():
    """The address of a Google Cloud Storage server with the bucket `runs`."""
    command = [sys.executable, str(Path(__file__).with_name("gcs_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.kill()


@pytest.fixture(scope="session")
def ray_head():
    """The environment of a process that uses one Ray of two CPUs, which several tests share. It was started in `/`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it contains sockets
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "", "RAY_TMPDIR": folder}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), str(root / "tests" / "alignment")]
    )  # with metrics of a user
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", "--include-dashboard=false"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd="/", env=environment, **silent, start_new_session=True) as head:
        try:
            check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"127.0.0.1:{port}"]
            until = time.monotonic() + 300
            while subprocess.run(check, env=environment, capture_output=True).returncode and time.monotonic() < until:
                time.sleep(1)
            yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def _save_pipeline(folder: Path, prediction_type: str) -> Path:
    """A Stable Diffusion folder with latents of (4, 8, 8) and images of 64 x 64, from a fixed seed."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        **special,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """Folder of a tiny StableDiffusionPipeline that predicts epsilon; do not write to it."""
    return _save_pipeline(tmp_path_factory.mktemp("tiny") / "epsilon", "epsilon")


@pytest.fixture(scope="session")
def tiny_v_pipeline(tmp_path_factory) -> Path:
    """Folder of a tiny StableDiffusionPipeline that predicts v; do not write to it."""
    return _save_pipeline(tmp_path_factory.mktemp("tiny") / "v", "v_prediction")
