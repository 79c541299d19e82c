"""Options that save memory: text encoders that leave the device, and quantised weights under an adapter."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mi_ray.config import ModelConfig, RunConfig
from mi_ray.diffusion import quantisation
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.quantisation import check_quantisation, quantisation_of
from mi_ray.diffusion.residence import Residence
from mi_ray.scoring import trial

NAMES = ("bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8", "torchao-fp8")


# ---------------------------------------------------------------------------------------------- text encoders
class Moved(nn.Module):
    """Records where it is moved, and runs out of memory when it is moved to a full GPU."""

    def __init__(self, full: bool = False):
        super().__init__()
        self.places, self.full = [], full

    def to(self, device):
        if self.full and str(device) == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.places.append(str(device))
        return self


def test_encoders_stay_until_memory_runs_out_and_then_only_visit():
    module = Moved()
    encoders = Residence([module], torch.device("cuda"))
    with encoders.present():
        assert module.places == ["cuda"]
    assert encoders.leave()
    assert not encoders.leave()
    assert module.places == ["cuda", "cpu"]
    with encoders.present():
        assert module.places[2:] == ["cuda"]
    assert module.places[3:] == ["cpu"]


def test_encoders_that_do_not_fit_at_the_start_are_not_on_the_device():
    encoders = Residence([Moved(full=True)], torch.device("cuda"))
    assert encoders.left
    assert encoders.modules[0].places == ["cpu"]


def test_encoders_on_a_cpu_do_not_leave(tiny_pipeline):
    denoiser = load_denoiser(str(tiny_pipeline), device="cpu")
    assert not denoiser.make_room()
    other = load_denoiser(str(tiny_pipeline), device="cpu", beside=denoiser)
    assert other.encoders is denoiser.encoders


def test_memory_is_made_before_a_batch_is_halved():
    worker, room, tried = SimpleNamespace(batch_size=8), [True], []

    def run() -> int:
        tried.append(worker.batch_size)
        if room or worker.batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return worker.batch_size

    assert fitting(worker, run, make_room=lambda: bool(room) and room.pop()) == 4
    assert tried == [8, 8, 4]


@pytest.mark.parametrize(("fits_with", "sizes"), [(0, [8, 8, 16]), (8, [8, 16]), (64, [8, 16, 32, 64, 128])])
def test_the_trial_finds_whether_text_encoders_leave(monkeypatch, fits_with, sizes):
    """fits_with: the largest batch beside the encoders. Without them 8 fits, too, and 16 does not."""
    state, tried = SimpleNamespace(there=True), []

    def try_batch(denoiser, batch_size):
        tried.append(batch_size)
        if batch_size > (fits_with if state.there else 8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trial.Trial(batch_size, 1 / batch_size, 1.0, 0.0)

    def make_room() -> bool:
        left, state.there = state.there, False
        return left

    monkeypatch.setattr(trial, "try_batch", try_batch)
    found = trial.sweep(SimpleNamespace(make_room=make_room))
    assert state.there == (fits_with >= 8)
    assert tried == sizes
    assert [t.batch_size for t in found] == sorted(set(sizes))[:-1]


# ---------------------------------------------------------------------------------------------- quantised weights
def installed(monkeypatch, versions: dict[str, str]):
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_told_with_the_command(monkeypatch, name):
    installed(monkeypatch, {})
    with pytest.raises(ValueError, match=rf"needs the package {name.split('-')[0]}.*pip install 'mi-ray\[quantize\]'"):
        check_quantisation(name)
    installed(monkeypatch, {"bitsandbytes": "0.40.1", "torchao": "0.9.0"})
    with pytest.raises(ValueError, match=r"or newer, and 0\.\d+\.\d is installed"):
        check_quantisation(name)
    installed(monkeypatch, {"bitsandbytes": "0.50.2", "torchao": "0.18.0+cpu"})
    check_quantisation(name)


def test_only_known_quantisations_are_options():
    assert ModelConfig.model_fields["quantize"].default is None
    for name in NAMES:
        assert ModelConfig(quantize=name).quantize == name
    with pytest.raises(ValidationError):
        ModelConfig(quantize="int3")
    assert "quantize" not in ModelConfig().model_dump()  # the hash of other runs stays


def test_bitsandbytes_is_given_nf4_and_int8(monkeypatch):
    installed(monkeypatch, {"bitsandbytes": "0.50.2"})
    four = quantisation_of("bitsandbytes-nf4", "transformer", torch.bfloat16).quant_mapping
    assert list(four) == ["transformer"]
    given = four["transformer"].to_dict()
    assert (given["load_in_4bit"], given["load_in_8bit"]) == (True, False)
    assert (given["bnb_4bit_quant_type"], given["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert given["bnb_4bit_compute_dtype"] == "bfloat16"
    eight = quantisation_of("bitsandbytes-int8", "unet", torch.float16).quant_mapping["unet"].to_dict()
    assert (eight["load_in_4bit"], eight["load_in_8bit"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "kind"), [("torchao-int8", "Int8WeightOnlyConfig"), ("torchao-fp8", "Float8WeightOnlyConfig")]
)
def test_torchao_is_given_its_own_configuration(monkeypatch, name, kind):
    installed(monkeypatch, {"torchao": "0.18.0"})
    package = ModuleType("torchao.quantization")
    for each in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig"):
        setattr(package, each, type(each, (), {}))
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", package)
    given = []
    monkeypatch.setattr(quantisation, "TorchAoConfig", lambda settings: given.append(type(settings).__name__))
    monkeypatch.setattr(quantisation, "PipelineQuantizationConfig", lambda quant_mapping: quant_mapping)
    assert quantisation_of(name, "unet", torch.bfloat16) == {"unet": None}
    assert given == [kind]


def test_bitsandbytes_needs_a_gpu():
    given = {"run_dir": "unused", "prompts": {"file": "unused"}, "model": {"quantize": "bitsandbytes-nf4"}}
    with pytest.raises(ValidationError, match=r"needs a GPU and resources\.train_gpus is 0"):
        RunConfig.model_validate(given)
    RunConfig.model_validate(given | {"resources": {"train_gpus": 1}})


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_trains_over_quantised_weights(tiny_pipeline, name):
    pytest.importorskip(name.split("-")[0])
    if name.startswith("bitsandbytes") and not torch.cuda.is_available():
        pytest.skip("bitsandbytes needs a GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = load_denoiser(str(tiny_pipeline), "auto", device)
    denoiser = load_denoiser(str(tiny_pipeline), "auto", device, quantize=name)
    inputs = torch.randn(2, *plain.latent_shape), torch.tensor([10, 500]), plain.encode_prompts(["a red circle", ""])
    inputs = tuple(values.to(device) for values in inputs)
    with torch.no_grad():
        expected, found = plain.predict(*inputs), denoiser.predict(*inputs)
    assert 0 < (found - expected).norm() / expected.norm() < 0.3
    model = attach_adapter(denoiser.network, rank=2, alpha=2, target_modules=["to_q", "to_v"])
    denoiser.family.predict(model, *inputs).square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad.abs().max() > 0 for parameter in trained)
