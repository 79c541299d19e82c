"""The adapter, its loss and its training, compared with closed forms, diffusers and a run without faults."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft import PeftModel
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from mi_ray import storage
from mi_ray.config import FinetuneConfig, RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.adapter_files import WEIGHTS, save_adapter, save_weighted_sum
from mi_ray.diffusion.adapters import adapter_state, attach_adapter, load_adapter_state
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule, epsilon_from, prediction_from, x0_from_epsilon
from mi_ray.runs import lease
from mi_ray.storage import tables
from mi_ray.training import loop as stage
from mi_ray.training.losses import Batch, Objective, min_snr_weights
from mi_ray.training.optimization import Training

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def unet(tiny_pipeline) -> UNet2DConditionModel:
    return load_unet(tiny_pipeline)


def load_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


@torch.no_grad()
def output(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t, embeddings = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 6, 16, generator=generator)
    return unet(x_t, torch.tensor([10, 310, 610]), encoder_hidden_states=embeddings).sample


def trained(unet: UNet2DConditionModel, adapter: str, rank: int = 4, alpha: int = 8, seed: int = 2) -> PeftModel:
    """An adapter in which all weights differ from their initial values."""
    model = attach_adapter(unet, rank=rank, alpha=alpha, target_modules=TARGETS, use_dora=adapter == "dora")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# ---------------------------------------------------------------------------------------------- adapters
def test_adapter_without_matching_layers_is_refused(unet):
    with pytest.raises(ValueError, match=r"'to_query'.*to_q"):
        attach_adapter(unet, rank=4, alpha=4, target_modules=("to_k", "to_query"))


def test_new_adapter_does_not_change_outputs_and_is_float32(unet):
    before = output(unet)
    model = attach_adapter(unet, rank=4, alpha=4, target_modules=TARGETS)
    assert torch.equal(output(model), before)
    half = attach_adapter(model.unload().half(), rank=4, alpha=4, target_modules=TARGETS, use_dora=True)
    trainable = [p for p in half.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_saved_adapter_gives_the_same_outputs_in_diffusers_and_peft(tmp_path, tiny_pipeline, unet, adapter):
    base = output(unet)
    model = trained(unet, adapter)
    expected = output(model)
    assert (expected - base).norm() > 1e-2 * base.norm()
    save_adapter(model, tmp_path, "some/model")

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipeline.unet), expected, atol=1e-5, rtol=1e-4)
    again = PeftModel.from_pretrained(load_unet(tiny_pipeline), tmp_path)
    torch.testing.assert_close(output(again), expected, atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


def test_weighted_sum_of_adapters_adds_their_updates(tmp_path, tiny_pipeline):
    """2 a - b as one adapter changes every layer by 2 delta(a) - delta(b), in PEFT and in diffusers."""
    weights = {}
    for name, seed in (("a", 2), ("b", 3)):
        model = trained(load_unet(tiny_pipeline), "lora", seed=seed)
        save_adapter(model, tmp_path / name, "some/model")
        weights[name] = model.merge_and_unload().state_dict()
    save_weighted_sum([(2.0, tmp_path / "a"), (-1.0, tmp_path / "b")], tmp_path / "sum")
    base = load_unet(tiny_pipeline)
    merged = PeftModel.from_pretrained(load_unet(tiny_pipeline), tmp_path / "sum").merge_and_unload().state_dict()
    changed = 0
    for name, value in base.state_dict().items():
        expected = value + 2 * (weights["a"][name] - value) - (weights["b"][name] - value)
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-4)
        changed += not torch.equal(merged[name], value)
    assert changed > 8
    base.load_state_dict(merged)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(tmp_path / "sum")
    torch.testing.assert_close(output(pipeline.unet), output(base), atol=1e-5, rtol=1e-4)


def test_weights_of_another_adapter_are_refused(tiny_pipeline, unet):
    state = adapter_state(trained(load_unet(tiny_pipeline), "lora", rank=2))
    with pytest.raises(ValueError, match="do not fit"):
        load_adapter_state(trained(unet, "lora"), state)


# ---------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_give_the_capped_x0_loss(prediction_type):
    gamma, snr = 5.0, torch.logspace(-3, 3, 13, dtype=torch.float64)
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    x0, epsilon, prediction = torch.randn(3, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = alpha * x0 + sigma * epsilon
    target = prediction_from(prediction_type, x0, epsilon, alpha, sigma)
    implied = x0_from_epsilon(epsilon_from(prediction_type, prediction, x_t, alpha, sigma), x_t, alpha, sigma)
    weighted = min_snr_weights(snr, gamma, prediction_type) * (prediction - target).square()
    torch.testing.assert_close(weighted, snr.clamp(max=gamma) * (implied - x0).square())  # Hang et al. 2023, eq. 5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_a_perfect_model_and_weighted(prediction_type):
    class Oracle(torch.nn.Module):
        """Predicts the exact noise, plus 2 in the second sample."""

        def forward(self, x_t, timesteps, encoder_hidden_states):
            self.x_t = x_t
            a = schedule.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
            answer = prediction_from(prediction_type, x0, noise, a.sqrt(), (1 - a).sqrt())
            return type("Output", (), {"sample": answer + torch.tensor([0.0, 2.0]).view(-1, 1, 1, 1)})

    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    schedule = NoiseSchedule.from_config(scheduler.config)
    x0, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timesteps, oracle = torch.tensor([3, 900]), Oracle()
    objective = Objective(oracle, schedule, FinetuneConfig())
    loss = objective(
        Batch(x0, noise, timesteps, Conditioning({"embeds": torch.zeros(2, 1, 1)}), torch.tensor([1.0, 0.5]))
    )
    assert loss.item() == pytest.approx(0.5 * 4 / 2, rel=1e-5)
    torch.testing.assert_close(oracle.x_t, scheduler.add_noise(x0, noise, timesteps))


def test_optimizer_step_clips_and_averages_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    parameters = list(layer.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    data = [torch.randn(4, 3) * 100 for _ in range(3)]
    objective = torch.nn.Sequential(layer, torch.nn.Flatten(0))
    loss = torch.nn.Module()
    loss.forward = lambda x: objective(x).square().mean()
    whole = loss(torch.cat(data))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(whole, parameters)]).norm()
    before = [p.detach().clone() for p in parameters]
    mean, norm = stage.optimizer_step(
        loss,
        [(lambda x=x: x, 1 / len(data)) for x in data],
        parameters,
        optimizer,
        torch.amp.GradScaler("cpu", enabled=False),
        max_grad_norm=0.5,
    )
    moved = torch.cat([(p - q).flatten() for p, q in zip(parameters, before, strict=True)]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-4)
    assert mean.item() == pytest.approx(whole.item(), rel=1e-4)
    assert norm > 10
    assert moved.item() == pytest.approx(0.5, rel=1e-3)  # a step of SGD with learning rate 1 is the gradient


def test_average_of_a_checkpoint_goes_to_the_device_of_the_weights(monkeypatch):
    """A checkpoint is loaded on the CPU. The meta device stands for a GPU; weights there have no values to load."""
    monkeypatch.setattr("mi_ray.training.optimization.adapter_state", lambda model: {})
    monkeypatch.setattr("mi_ray.training.optimization.load_adapter_state", lambda model, state: None)

    def training(device: str) -> Training:
        layer = torch.nn.Linear(3, 1, device=device)
        parameters = list(layer.parameters())
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        return Training(layer, optimizer, torch.amp.GradScaler("cpu", enabled=False), EMAModel(parameters, 0.9), [])

    continued = training("meta")
    continued.load(training("cpu").state())
    assert {values.device.type for values in continued.average.shadow_params} == {"meta"}
    continued.average.step(continued.model.parameters())


# ---------------------------------------------------------------------------------------------- with Ray
@pytest.fixture
def selected(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [f"a {color} circle" for color in ("red", "blue", "green", "red", "blue")]
    rows = {
        "prompt_id": [f"{i:016x}" for i in range(5)],
        "prompt": prompts,
        "candidate_index": list(range(5)),
        "latents": [rng.standard_normal(256).astype(np.float16) for _ in prompts],
        "latents_shape": [[4, 8, 8]] * 5,
        "weight": [1.0, 1.0, 0.5, 2.0, 1.0],
    }
    path = str(tmp_path / "selected.parquet")
    storage.write_table(path, pa.table(rows, schema=tables.SELECTED))
    return path


def run_config(tiny_pipeline, *, workers: int | tuple[int, int], **finetune) -> RunConfig:
    settings = {"adapter": "dora", "rank": 4, "alpha": 4, "learning_rate": 1e-2, "lr_warmup_steps": 2, "steps": 6}
    settings |= {"batch_size": 2, "checkpoint_every": 2, "max_failures": 1, "prompt_dropout": 0.2, "min_snr_gamma": 5}
    settings |= {"lr_schedule": "cosine", "ema_decay": 0.9, "log_snr_max": 2.0}
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "prompts": {"file": "unused"},
            "model": {"path": str(tiny_pipeline)},
            "finetune": settings | finetune,
            "resources": {"train_workers": workers},
        }
    )


def test_learning_rate_rises_and_falls():
    constant = run_config("unused", workers=1, steps=6, lr_schedule="constant").finetune
    assert [stage.learning_rate_at(s, constant, 6) for s in range(4)] == [0.5e-2, 1e-2, 1e-2, 1e-2]
    cosine = run_config("unused", workers=1, steps=6).finetune
    rates = [stage.learning_rate_at(s, cosine, 6) for s in range(7)]
    assert rates[2] == 1e-2
    assert rates[4] == pytest.approx(0.5e-2)
    assert rates[6] == pytest.approx(0)


def in_process(config: RunConfig, selected: str, destination, previous: str | None = None) -> dict:
    settings = stage.loop_settings(config, selected, str(destination), previous, "here")
    trainer = TorchTrainer(stage.train_loop, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=0))
    return trainer.fit().return_value


def log_of(destination) -> list[dict]:
    return [json.loads(line) for line in (destination / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"target_modules": ["to_query"]}, r"finetune.target_modules: 'to_query'.*to_q"),
        ({"log_to": ["mlflow"]}, r"finetune.log_to: mlflow is not installed; run pip install"),
    ],
)
def test_targets_and_trackers_are_checked_before_anything_starts(
    tiny_pipeline, tmp_path, monkeypatch, finetune, message
):
    monkeypatch.setattr("mi_ray.training.log.find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(ConfigError, match=message):
        stage.finetune(
            run_config(tiny_pipeline, workers=1, **finetune), "none", str(tmp_path / "adapter"), None, "test"
        )
    assert not (tmp_path / "adapter").exists()


def test_driver_that_lost_the_run_stops_writing_the_training(tiny_pipeline, selected, tmp_path, monkeypatch):
    """It loses the run in step 3. Only the log so far exists, and restarted workers end at once."""
    config = run_config(tiny_pipeline, workers=1).model_copy(update={"run_dir": str(tmp_path)})
    destination, steps, optimizer_step = tmp_path / "adapter", [], stage.optimizer_step

    def take_over(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            destination.mkdir(exist_ok=True)
            (destination / "training.jsonl").write_text("the successor's")
            successor = lease.Lease(str(tmp_path), 40, mine.token + 1)
            storage.create_bytes(str(tmp_path / "lease" / f"{successor.token:08d}.json"), successor.content())
        return optimizer_step(*arguments, **options)

    monkeypatch.setattr(stage, "optimizer_step", take_over)
    monkeypatch.setattr(stage, "ScalingConfig", lambda **_: ScalingConfig(num_workers=0))
    with pytest.raises(lease.Lost, match="has taken it over"), lease.held(str(tmp_path), 40) as mine:
        stage.finetune(config, selected, str(destination), None, "here")
    assert len(steps) < config.finetune.steps
    monkeypatch.setattr(lease, "current_token", lambda run_dir: mine.token)
    with pytest.raises(lease.Lost, match="another driver has taken over"):
        stage.finetune(config, selected, str(destination), None, "here")
    assert len(steps) < config.finetune.steps
    assert (destination / "training.jsonl").read_text() == "the successor's"
    assert not (destination / "adapter_model.safetensors").exists()
    assert not (destination / stage.SUMMARY).exists()


def test_later_round_starts_from_the_previous_adapter(tiny_pipeline, selected, tmp_path):
    config = run_config(tiny_pipeline, workers=1, steps=3, gradient_accumulation=1)
    summary = in_process(config, selected, tmp_path / "first")
    assert summary["outputs_changed"]
    idle = run_config(tiny_pipeline, workers=1, steps=1, gradient_accumulation=1, learning_rate=1e-12, weight_decay=0)
    summary = in_process(idle, selected, tmp_path / "second", str(tmp_path / "first"))
    assert not summary["outputs_changed"]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=1e-8, rtol=1e-6)


def test_training_starts_from_an_adapter_of_another_rank(tiny_pipeline, selected, tmp_path):
    save_adapter(trained(load_unet(tiny_pipeline), "lora", rank=3, alpha=6), tmp_path / "start", "some/model")
    idle = run_config(tiny_pipeline, workers=1, steps=1, gradient_accumulation=1, learning_rate=1e-12, weight_decay=0)
    summary = in_process(idle, selected, tmp_path / "adapter", str(tmp_path / "start"))
    assert not summary["outputs_changed"]
    assert summary["trainable_parameters"] == sum(v.numel() for v in load_file(tmp_path / "start" / WEIGHTS).values())
    first, last = (load_file(tmp_path / name / WEIGHTS) for name in ("start", "adapter"))
    for name, weight in first.items():
        torch.testing.assert_close(last[name], weight, atol=1e-8, rtol=1e-6)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["lora_alpha"] == 6


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_finetuning_on_google_cloud_storage_continues_from_its_checkpoint(
    tiny_pipeline, selected, tmp_path, gcs_server, monkeypatch
):
    """It dies in step 4, after the checkpoint of step 2, and is started again."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs_server}")
    destination, begun = "gs://runs/adapter", tmp_path / "begun"

    def mortal_loop(settings: dict) -> dict | None:
        from mi_ray.training import loop as module

        optimizer_step = module.optimizer_step

        def step(*arguments, **options):
            with begun.open("a") as file:
                file.write(".")
            if begun.stat().st_size == 4:
                raise RuntimeError("as if the node had gone")
            return optimizer_step(*arguments, **options)

        module.optimizer_step = step
        return module.train_loop(settings)

    config = run_config(tiny_pipeline, workers=1, gradient_accumulation=1, max_failures=0)
    ray.init(address="local", num_cpus=2, logging_level="error")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(stage, "train_loop", mortal_loop)
            with pytest.raises(ray.train.TrainingFailedError):
                stage.finetune(config, selected, destination, None, "test")
            assert storage.list_names(storage.join(destination, "checkpoints")) != []
            summary = stage.finetune(config, selected, destination, None, "test")
    finally:
        ray.shutdown()
    assert begun.stat().st_size == 4 + 4
    assert summary["steps"] == 6
    assert [line["step"] for line in storage.read_lines(f"{destination}/training.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not storage.exists(f"{destination}/checkpoints")
    assert {"adapter_model.safetensors", "summary.json", "tensorboard"} <= set(storage.list_names(destination))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_sharded_training_equals_data_parallel_training_also_after_a_kill(
    tiny_pipeline, selected, tmp_path, monkeypatch
):
    """Two workers. Rank 1 is killed in step 4, past the checkpoint of step 2, and the same call continues."""
    begun = tmp_path / "begun"

    def mortal_loop(settings: dict) -> dict | None:
        from mi_ray.training import loop as module

        optimizer_step, context = module.optimizer_step, ray.train.get_context()

        def step(*arguments, **options):
            assert options["sharded"]
            if context.get_world_rank() == 1:
                with begun.open("a") as file:
                    file.write(str(context.get_world_size()))
                if begun.stat().st_size == 4:
                    ray.train.get_all_reported_checkpoints()  # waits until Ray has recorded the checkpoint
                    os.kill(os.getpid(), signal.SIGKILL)
            return optimizer_step(*arguments, **options)

        module.optimizer_step = step
        return module.train_loop(settings)

    options = {"workers": 2, "adapter": "lora", "gradient_accumulation": 4, "max_failures": 0}
    parallel, sharded = tmp_path / "parallel", tmp_path / "sharded"
    ray.init(address="local", num_cpus=2, logging_level="error")
    try:
        expected = stage.finetune(run_config(tiny_pipeline, **options), selected, str(parallel), None, "parallel")
        config = run_config(tiny_pipeline, **options, shard="fsdp")
        monkeypatch.setattr(stage, "train_loop", mortal_loop)
        with pytest.raises(ray.train.TrainingFailedError):
            stage.finetune(config, selected, str(sharded), None, "sharded")
        assert not (sharded / stage.SUMMARY).exists()
        summary = stage.finetune(config, selected, str(sharded), None, "sharded")
    finally:
        ray.shutdown()
    assert begun.read_text() == "2222" + "2222"  # steps 1 to 4; then 3 to 6 from the checkpoint of step 2
    assert summary["output_change"] == pytest.approx(expected["output_change"], rel=1e-3)
    one, two = log_of(parallel), log_of(sharded)
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-3)
    one, two = (load_file(folder / WEIGHTS) for folder in (parallel, sharded))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
    assert not (sharded / "checkpoints").exists()


@pytest.fixture
def nodes(monkeypatch):
    """A cluster with a head and two nodes of one CPU: (cluster, a node on which the driver does not run)."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")  # Ray notices a lost node only after some time
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="error")
    mine = ray.get_runtime_context().get_node_id()  # the driver can be on any node
    yield cluster, next(node for node in nodes if node.node_id != mine)
    ray.shutdown()
    cluster.shutdown()


def preempt(cluster: Cluster, node, waiting: Path, saved: Path):
    """Send a preemption notice to a node when the training waits for it. Kill the node after further steps."""
    store = ray._raylet.GcsClient(address=cluster.address)
    for moment, seconds in ((waiting, 120), (saved, 0)):
        await_file(moment)
        deadline_ms = int(1000 * (time.time() + seconds))
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        store.drain_node(node.node_id, reason, "", deadline_ms)
    cluster.remove_node(node, allow_graceful=False)


def await_file(file: Path):
    deadline = time.monotonic() + 600
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_two_workers_with_faults_give_the_result_of_one_worker(tiny_pipeline, selected, tmp_path, nodes, monkeypatch):
    """Rank 0 dies in step 4, past the checkpoint of step 2. In step 5 comes the notice; the node goes in step 6.

    Three microbatches are two and one of two workers, and three of the one that is left.
    """
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    expected = in_process(run_config(tiny_pipeline, workers=1, gradient_accumulation=3), selected, undisturbed)

    died, waiting, saved, begun = (tmp_path / name for name in ("died", "waiting", "saved", "begun"))

    def disturbed_loop(settings: dict) -> dict | None:
        from mi_ray.training import loop as module

        optimizer_step, calls = module.optimizer_step, []
        context = ray.train.get_context()
        rank, workers, first = context.get_world_rank(), context.get_world_size(), not died.exists()

        def step(*arguments, **options):
            calls.append(1)
            if rank == 0:
                with begun.open("a") as file:
                    file.write(str(workers))
            if first and len(calls) == 4 and rank == 0:
                died.touch()
                raise RuntimeError("as if the node had gone")
            if not first and workers == 2 and len(calls) == 3:
                waiting.touch()
                while ray.train.get_preemption_info() is None:
                    time.sleep(0.05)
            if not first and workers == 2 and len(calls) == 4:
                ray.train.get_all_reported_checkpoints()  # waits until Ray has recorded the checkpoint of the notice
                saved.touch()
                time.sleep(600)  # until the node is killed
            return optimizer_step(*arguments, **options)

        module.optimizer_step = step
        return module.train_loop(settings)

    config = run_config(tiny_pipeline, workers=(1, 2), gradient_accumulation=3)
    provider = threading.Thread(target=preempt, args=(*nodes, waiting, saved), daemon=True)
    provider.start()
    with monkeypatch.context() as patch:
        patch.setattr(stage, "train_loop", disturbed_loop)
        summary = stage.finetune(config, selected, str(disturbed), None, "test")
    provider.join()
    # Steps 1 to 4; then 3 to 6 from the checkpoint of step 2; then the last step from that of the notice.
    assert begun.read_text() == "2222" + "2222" + "1"
    assert summary["output_change"] == pytest.approx(expected["output_change"], rel=1e-3)

    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (undisturbed, disturbed))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
    one, two = log_of(undisturbed), log_of(disturbed)
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-3)

    # finished: neither Ray nor the model is needed
    monkeypatch.setattr(stage, "TorchTrainer", None)
    assert stage.finetune(config, selected, str(disturbed), None, "test") == summary
    assert not (disturbed / "checkpoints").exists()
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).load_lora_weights(disturbed)
