"""Sharded fine-tuning on two workers of this machine: equal to data-parallel training, also after a restart."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.training.losses import Objective
from mi_ray.training.optimization import Training, optimizer_step
from mi_ray.training.sharding import shard
from mi_ray.training.training_set import KeptCandidates, TrainingSet

WORKERS, STEPS, STOPPED = 2, 4, 2
CPU = torch.device("cpu")


def config(**sections) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "unused", "prompts": {"file": "unused"}} | sections)


RUN = config(finetune={"rank": 4, "alpha": 4, "batch_size": 2, "gradient_accumulation": 4, "learning_rate": 1e-2})


def training(path: str, sharded: bool):
    """The model with its adapter, its optimiser and its data, as `training.loop.prepare` makes them."""
    denoiser = load_denoiser(path, device="cpu", placed=not sharded)
    generator = torch.Generator().manual_seed(1)
    conditioning = denoiser.encode_prompts(["a red circle", "two hearts", ""])
    latents = torch.randn(6, *denoiser.latent_shape, generator=generator)
    data = TrainingSet(torch.arange(6), 6, latents, torch.ones(6), torch.tensor([0, 1] * 3), conditioning)
    torch.manual_seed(0)
    model = attach_adapter(denoiser.network, **RUN.finetune.adapter_settings)
    model = shard(model, CPU) if sharded else model
    objective = Objective(model, denoiser.schedule, RUN.finetune, network_prediction=denoiser.family.predict)
    optimizer = torch.optim.AdamW(objective.parameters_trained, lr=RUN.finetune.learning_rate)
    state = Training(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, [])
    return objective, state, KeptCandidates(data, RUN, range(10, 990), CPU)


def losses(path: str, rank: int, workers: int, sharded: bool, steps: range, resume: dict | None = None):
    """Mean loss of the workers and gradient norm of each step, and the state of a checkpoint after the last one."""
    objective, state, source = training(path, sharded)
    if resume:
        state.load(resume)
    parallel = DistributedDataParallel(objective) if workers > 1 and not sharded else objective
    found = []
    for step in steps:
        arguments = objective.parameters_trained, state.optimizer, state.scaler, 1.0
        loss, norm = optimizer_step(parallel, source.parts(step, rank, workers), *arguments, sharded=sharded)
        if workers > 1:
            dist.all_reduce(loss)
        found.append((loss.item() / workers, norm.item()))
    return found, state.state(), objective


def held(objective: Objective) -> tuple[int, int]:
    """Numbers of frozen parameters: those that this worker holds, and all."""
    frozen = [parameter for parameter in objective.model.parameters() if not parameter.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return sum(map(torch.numel, local)), sum(map(torch.numel, frozen))


def worker(rank: int, path: str, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    parallel, _, _ = losses(path, rank, WORKERS, False, range(STEPS))
    whole, last, objective = losses(path, rank, WORKERS, True, range(STEPS))
    first, state, _ = losses(path, rank, WORKERS, True, range(STOPPED))
    rest, resumed, _ = losses(path, rank, WORKERS, True, range(STOPPED, STEPS), state)
    found = {"parallel": parallel, "sharded": whole, "in two parts": first + rest, "held": held(objective)}
    torch.save(found | {"adapter": last["adapter"], "resumed": resumed["adapter"]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tiny_pipeline, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("workers")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=worker, args=(r, str(tiny_pipeline), str(folder))) for r in range(WORKERS)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(600)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORKERS)]


def test_losses_are_those_of_data_parallel_training(found, tiny_pipeline):
    alone, state, _ = losses(str(tiny_pipeline), 0, 1, False, range(STEPS))
    for of_worker in found:
        assert torch.tensor(of_worker["sharded"]) == pytest.approx(torch.tensor(of_worker["parallel"]), rel=1e-5)
        assert torch.tensor(of_worker["sharded"]) == pytest.approx(torch.tensor(alone), rel=1e-4)
        for name, tensor in state["adapter"].items():
            torch.testing.assert_close(of_worker["adapter"][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_restart_changes_nothing(found):
    for of_worker in found:
        assert of_worker["in two parts"] == of_worker["sharded"]
        for name, tensor in of_worker["adapter"].items():
            torch.testing.assert_close(of_worker["resumed"][name], tensor, rtol=0, atol=0)


def test_each_worker_holds_its_part_of_the_frozen_weights(found):
    (first, total), (second, _) = (of_worker["held"] for of_worker in found)
    assert first + second == total
    assert 0.4 < first / total < 0.6


def test_one_worker_needs_no_shards(tiny_pipeline):
    objective, _, _ = training(str(tiny_pipeline), True)
    here, total = held(objective)
    assert here == total


def test_settings_that_shards_do_not_allow():
    shards, nf4 = {"shard": "fsdp", "gradient_accumulation": 3}, {"quantize": "bitsandbytes-nf4"}
    with pytest.raises(ValidationError, match="not a multiple of the 2 workers"):
        config(finetune=shards, resources={"train_workers": 2})
    with pytest.raises(ValidationError, match="shards need a fixed number of workers"):
        config(finetune=shards, resources={"train_workers": (1, 3)})
    with pytest.raises(ValidationError, match="bitsandbytes cannot be divided"):
        config(finetune=shards, resources={"train_workers": 3, "train_gpus": 1}, model=nf4)
    with pytest.raises(ValidationError, match=r"finetune\.shard is fsdp and finetune\.adapter is dora"):
        config(finetune=shards | {"adapter": "dora"}, resources={"train_workers": 3})
    sharded = config(finetune=shards, resources={"train_workers": 3})
    assert sharded.hash() == config(finetune=shards | {"shard": None}).hash()
