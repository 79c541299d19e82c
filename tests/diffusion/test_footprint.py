"""Sizes of models without weights: published numbers, and counts against really allocated tensors."""

import copy

import pytest
import torch
from tiny_families import CASES
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.architectures import PREFIX, architecture_names
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families import FAMILIES
from mi_ray.diffusion.folders import check_model, load_encoders_on_meta, load_network_on_meta, resolve_model
from mi_ray.diffusion.footprint import FusedAttention, count, count_training, stored_numbers
from mi_ray.diffusion.weights import on_meta

COUNTED = [name for name, family in FAMILIES.items() if family.conditioning]
ADAPTER = {"rank": 4, "alpha": 4, "target_modules": ["to_q", "to_v"]}
# Numbers of the network in millions, and of the text encoders together: arXiv 2307.01952, table 1; the model cards of
# Stable Diffusion 3.5 (2.5 B, 8.1 B), FLUX.1 (12 B) and Qwen-Image (20 B); T5-XXL 4.7 B, Qwen2.5-VL 8.3 B.
PUBLISHED = {
    "sd15": (860, 123),
    "sd21": (865, 354 * 23 / 24),  # the paper counts all 24 layers, the folder has 23 of them
    "sdxl": (2600, 817),
    "sd35-medium": (2500, 123 + 695 + 4700),
    "sd35-large": (8100, 123 + 695 + 4700),
    "flux1-dev": (12000, 123 + 4700),
    "qwen-image": (20000, 8300),
}


def test_every_architecture_has_a_published_number():
    assert architecture_names() == [*PUBLISHED]


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_real_sizes_are_those_published(name):
    network, text = PUBLISHED[name]
    parts = load_encoders_on_meta(PREFIX + name)
    del parts["vae"]
    assert stored_numbers(load_network_on_meta(PREFIX + name)) / 1e6 == pytest.approx(network, rel=0.025)
    assert sum(map(stored_numbers, parts.values())) / 1e6 == pytest.approx(text, rel=0.025)


def test_an_architecture_is_no_model():
    with pytest.raises(ValueError, match="has no weights; it is for --dry-run and benchmarks"):
        check_model("architecture:sdxl")
    with pytest.raises(ValueError, match="is no architecture; the names are sd15"):
        resolve_model("architecture:sd99")


# ---------------------------------------------------------------------------------------------- counts
def prepared(name: str, rows: int):
    """A tiny network, its inputs at 16 by 16 latents and the arguments of `count`."""
    family, pipeline = FAMILIES[name], CASES[name].build()
    network = getattr(pipeline, family.network)
    with torch.no_grad():
        encoded = family.encode(pipeline, list(CASES[name].prompts)[:1], (64, 64))
    latent_shape = (family.channels(network.config), 16, 16)
    inputs = torch.randn(rows, *latent_shape), torch.full((rows,), 500.0), Conditioning(encoded).expand(rows)
    return family, network, inputs, latent_shape, encoded["embeds"].shape[1]


def counted_length(name: str, length: int) -> int:
    """Of the prompt alone: Stable Diffusion 3 adds the tokens of T5."""
    return length - 256 if name == "StableDiffusion3Pipeline" else length


def allocated(run) -> int:
    """Peak bytes that PyTorch's allocator gives out during a call, beyond those before it."""
    run()  # what is kept for the next call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    changes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(torch.tensor([0, *changes]).cumsum(0).max())


@pytest.mark.parametrize("name", COUNTED)
def test_shapes_of_the_conditioning_are_those_of_encoded_prompts(name):
    family, network, (_, _, conditioning), _, length = prepared(name, 1)
    length = counted_length(name, length)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in conditioning.tensors.items()}
    assert family.conditioning(network.config, length) == shapes
    assert family.text_limit in (None, length, length - 8)  # the tiny tokenizer has 8 more tokens in Krea 2's template


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_counted_activations_are_those_that_are_allocated(name):
    family, network, inputs, latent_shape, length = prepared(name, 8)
    meta, length = on_meta(type(network), network.config), counted_length(name, length)
    counted = count(family, copy.deepcopy(meta), latent_shape, length, torch.float32)
    with torch.no_grad():
        real = allocated(lambda: family.predict(network, *inputs))
    assert 8 * counted.activations == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_training_is_what_is_allocated(checkpointing):
    name = "StableDiffusion3Pipeline"
    family, network, inputs, latent_shape, length = prepared(name, 8)
    meta, length = on_meta(type(network), network.config), counted_length(name, length)
    counted = count_training(family, meta, latent_shape, length, torch.float32, ADAPTER, checkpointing)
    model = attach_adapter(network, **ADAPTER).train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert counted.trained == sum(map(torch.numel, trained))
    assert counted.state == 16 * counted.trained

    def step():
        family.predict(model, *inputs).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    assert 8 * counted.activations == pytest.approx(allocated(step), rel=0.15)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_counted_operations_are_those_of_the_real_network(name):
    family, network, inputs, latent_shape, length = prepared(name, 2)
    meta, length = on_meta(type(network), network.config), counted_length(name, length)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as products:
        family.predict(network, *inputs)
    assert 2 * count(family, meta, latent_shape, length, torch.float32).flops == products.get_total_flops()


def test_attention_is_counted_by_its_formula():
    query, key, value = (torch.empty(2, 3, length, 8, device="meta") for length in (10, 7, 7))
    with FusedAttention() as attention:
        output = functional.scaled_dot_product_attention(query, key, value=value)
    assert output.shape == (2, 3, 10, 8)
    assert attention.flops == 2 * 3 * (2 * 10 * 7 * 8 + 2 * 10 * 7 * 8)
