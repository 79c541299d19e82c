"""Fine-tuning of a model that one GPU does not hold: the frozen weights are divided among the workers (FSDP2).

Each worker keeps a part of every weight. A block's weights are collected before it runs and freed afterwards. The
adapter is small, so every worker has all of it, as in data-parallel training. Its gradients are averaged once in a
step. Losses, checkpoints and adapters are therefore the same as in data-parallel training.
"""

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mi_ray.diffusion.compiling import repeated_blocks


def shard(model: PeftModel, device: torch.device) -> PeftModel:
    """Divide the frozen weights of a model among all workers, and move the model to the device, block by block.

    Args:
        model: on the CPU, with its adapter; the same on every worker.
        device: of this worker.

    Raises:
        ValueError: the network has no repeated blocks.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in repeated_blocks(model.get_base_model()):
        fully_shard(block, mesh=mesh, ignored_params=trained)
    return fully_shard(model, mesh=mesh, ignored_params=trained)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]):
    """Replace the gradients of parameters that every worker has by their means over the workers."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for parameter, mean in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)
