"""Compiled blocks: which they are, that outputs stay the same, and how batches are filled."""

import pytest
import torch
from tiny_families import CASES
from torch import nn

from mi_ray.config import ModelConfig
from mi_ray.diffusion.compiling import compile_blocks, repeated_blocks
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.families import FAMILIES
from mi_ray.scoring.sampler import specialise

# Classes of the blocks; of those in LEFT, diffusers' own helper refuses the network.
BLOCKS = {
    "StableDiffusionPipeline": {"BasicTransformerBlock"},
    "StableDiffusionXLPipeline": {"BasicTransformerBlock"},
    "StableDiffusion3Pipeline": {"JointTransformerBlock"},
    "FluxPipeline": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    "ChromaPipeline": {"ChromaTransformerBlock", "ChromaSingleTransformerBlock"},
    "Flux2KleinPipeline": {"Flux2TransformerBlock", "Flux2SingleTransformerBlock"},
    "QwenImagePipeline": {"QwenImageTransformerBlock"},
    "Krea2Pipeline": {"Krea2TransformerBlock"},
    "ZImagePipeline": {"ZImageTransformerBlock"},
    "SanaPipeline": {"SanaTransformerBlock"},
    "Lumina2Pipeline": {"Lumina2TransformerBlock"},
    "CogView4Pipeline": {"CogView4TransformerBlock"},
    "PixArtSigmaPipeline": {"BasicTransformerBlock"},
}
LEFT = {"StableDiffusion3Pipeline", "SanaPipeline", "Lumina2Pipeline", "CogView4Pipeline", "PixArtSigmaPipeline"}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_every_family(name):
    network = getattr(CASES[name].build(), FAMILIES[name].network)
    blocks = repeated_blocks(network)
    assert {type(block).__name__ for block in blocks} == BLOCKS[name]
    assert len(blocks) == sum(type(module).__name__ in BLOCKS[name] for module in network.modules())
    if name in LEFT:
        with pytest.raises(ValueError, match="_repeated_blocks"):
            network.compile_repeated_blocks()


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        compile_blocks(nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------- a denoiser
@pytest.fixture
def denoiser(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline), device="cpu")


@pytest.fixture
def compiled():
    """A backend of torch.compile that runs eagerly and records the first size of each graph's first input."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend.graphs = graphs
    yield backend
    torch._dynamo.reset()


def predicted(denoiser, count: int) -> torch.Tensor:
    conditioning = denoiser.encode_prompts(["a red circle"]).expand(count)
    x_t = torch.randn(count, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser.predict(x_t, torch.full((count,), 500), conditioning)


def test_compiled_blocks_predict_the_same_and_are_compiled_once_per_size(denoiser, compiled):
    plain = {count: predicted(denoiser, count) for count in (1, 3, 4, 5, 8, 9)}
    rows = []
    denoiser.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    denoiser.specialise(channels_last=False, compiled="blocks", rows=(4, 8), backend=compiled)
    for count, expected in plain.items():
        torch.testing.assert_close(predicted(denoiser, count), expected, rtol=1e-4, atol=1e-5)
    assert rows == [1, 4, 4, 8, 8, 9]  # 1 of 4 would be mostly filling, and 9 is beyond the largest
    graphs = len(compiled.graphs)
    assert graphs > 0
    for count in plain:
        predicted(denoiser, count)
    assert len(compiled.graphs) == graphs


def test_auto_compiles_nothing_on_a_cpu(denoiser):
    assert ModelConfig().compile == "auto"
    specialise(denoiser, ModelConfig(), 4)
    assert denoiser._compiled is None
    assert not any(module._compiled_call_impl for module in denoiser.network.modules())
