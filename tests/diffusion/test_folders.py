"""Model folders and files as people have them: half-precision variants, and checkpoints in a single file."""

import json
import re
import shlex
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import httpx
import pytest
import torch
from diffusers.pipelines import pipeline_utils
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from mi_ray.diffusion import folders
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import check_model, model_commit
from mi_ray.diffusion.weights import part_class

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def halves(tiny_pipeline, tmp_path):
    """A copy of the tiny model that has only weights in half precision, with fp16 in the names of the files."""
    copy = shutil.copytree(tiny_pipeline, tmp_path / "halves")
    for part, stem in STEMS.items():
        file = copy / part / f"{stem}.safetensors"
        weights = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(weights, copy / part / f"{stem}.fp16.safetensors", {"format": "pt"})
        file.unlink()
    return copy


# ---------------------------------------------------------------------------------------------- variants
def test_a_folder_with_fp16_files_only_is_the_model_rounded(halves, tiny_pipeline):
    check_model(str(halves))
    loaded, whole = (load_denoiser(str(folder), "float32", "cpu") for folder in (halves, tiny_pipeline))
    for part in STEMS:
        modules = [getattr(denoiser.pipeline, part) for denoiser in (loaded, whole)]
        rounded = {key: value.half().float() for key, value in modules[1].state_dict().items()}
        for key, value in modules[0].state_dict().items():
            torch.testing.assert_close(value.float(), rounded[key], rtol=0, atol=0, msg=f"{part} {key}")


def test_whole_weights_come_before_a_variant(halves, tiny_pipeline):
    for part, stem in STEMS.items():
        shutil.copy(tiny_pipeline / part / f"{stem}.safetensors", halves / part)
        (halves / part / f"{stem}.fp16.safetensors").write_bytes(b"not read")
    assert model_commit(str(halves)) == model_commit(str(tiny_pipeline))
    check_model(str(halves))


def test_a_variant_in_several_files(halves):
    before = model_commit(str(halves))
    index = json.loads((halves / "model_index.json").read_text())
    for part in ("unet", "text_encoder"):
        model = part_class(index, part).from_pretrained(halves / part, variant="fp16", dtype=torch.float16)
        (halves / part / f"{STEMS[part]}.fp16.safetensors").unlink()
        model.save_pretrained(halves / part, variant="fp16", max_shard_size="4KB")
        assert len(list((halves / part).glob("*.fp16-*.safetensors"))) > 1
    check_model(str(halves))
    load_denoiser(str(halves), device="cpu")
    assert model_commit(str(halves)) != before
    sorted((halves / "unet").glob("*.fp16-*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"lacks unet/diffusion_pytorch_model\.fp16-00001-of-.*complete the folder"):
        check_model(str(halves))


@pytest.mark.parametrize("part", STEMS)
def test_weights_of_a_variant_are_compared_with_the_configuration(halves, part):
    file = halves / part / f"{STEMS[part]}.fp16.safetensors"
    weights = load_file(file)
    first, *others = sorted(weights)
    save_file({key: weights[key] for key in others}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights .* in its {part}"):
        check_model(str(halves))
    save_file(weights | {first: torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"has 1 weights of another shape in its {part}"):
        check_model(str(halves))


def test_another_variant_is_told(halves):
    file = halves / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(ValueError, match=r"has unet/diffusion_pytorch_model\.non_ema\.safetensors.*variant='non_ema'"):
        check_model(str(halves))


class Hub:
    """Stands for the hub: its functions that diffusers calls. It counts downloads and can fail in one of them."""

    def __init__(self, folder, monkeypatch, tmp_path, fails=()):
        self.folder, self.fails, self.cache, self.downloads = folder, fails, tmp_path / "cache", 0
        index = folders.read_index(folder)
        monkeypatch.setattr(folders.diffusers.DiffusionPipeline, "load_config", lambda *_, **__: index)
        for name in ("model_info", "hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(pipeline_utils, name, getattr(self, name))
        monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda name, revision, **_: revision)

    def model_info(self, name, token=None, revision=None):
        self._answer("model_info")
        files = [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def hf_hub_download(self, name, file, local_files_only=False, **settings):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing is cached")
        self.cache.mkdir(exist_ok=True)
        return str(shutil.copy(self.folder / file, self.cache / file))

    def snapshot_download(self, name, local_files_only=False, allow_patterns=None, **settings):
        self.downloads += 1
        if local_files_only:
            raise LocalEntryNotFoundError("nothing is cached")
        self._answer("snapshot_download")
        for path in (p for p in self.folder.rglob("*") if p.is_file()):
            file = str(path.relative_to(self.folder))
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (self.cache / file).parent.mkdir(exist_ok=True)
                shutil.copy(path, self.cache / file)
        return str(self.cache)

    def _answer(self, function):
        if function in self.fails:
            response = httpx.Response(503, request=httpx.Request("GET", "https://hub.test"))
            raise HfHubHTTPError(f"503 Service Unavailable in {function}", response=response)


def test_the_files_of_a_hub_model_are_chosen_by_what_it_has(halves, tiny_pipeline, monkeypatch, tmp_path):
    """With the download of diffusers itself, so that its answer to missing files is known."""
    hub = Hub(halves, monkeypatch, tmp_path)
    assert folders.fetch_model("me/tiny") == hub.cache
    assert hub.downloads == 1  # the first attempt ends before a download
    assert list(hub.cache.rglob("*.fp16.safetensors"))
    (tmp_path / "whole").mkdir()
    for part, stem in STEMS.items():
        shutil.copy(tiny_pipeline / part / f"{stem}.safetensors", halves / part)
    both = Hub(halves, monkeypatch, tmp_path / "whole")
    assert folders.fetch_model("me/tiny") == both.cache
    assert not list(both.cache.rglob("*.fp16.safetensors"))


def test_a_model_without_safetensors_is_told(halves, monkeypatch, tmp_path):
    for part, stem in STEMS.items():
        (halves / part / f"{stem}.fp16.safetensors").rename(halves / part / f"{stem}.bin")
    hub = Hub(halves, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub.* `safetensors` weights.*variant=None"):
        folders.fetch_model("me/tiny")
    assert hub.downloads == 0


@pytest.mark.parametrize("fails", ["model_info", "snapshot_download"])
def test_a_hub_that_fails_is_not_asked_for_fp16_files(tiny_pipeline, monkeypatch, tmp_path, fails):
    hub = Hub(tiny_pipeline, monkeypatch, tmp_path, (fails,))
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub: check the name and the network"):
        folders.fetch_model("me/tiny")
    assert hub.downloads == 1


def test_a_failure_while_fp16_files_are_fetched_is_told(halves, monkeypatch, tmp_path):
    hub = Hub(halves, monkeypatch, tmp_path, ("snapshot_download",))
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub.*503 Service Unavailable"):
        folders.fetch_model("me/tiny")
    assert hub.downloads == 1


# ---------------------------------------------------------------------------------------------- single files
RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
UNET = [
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"mid_block\.resnets\.0", "middle_block.0"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2"),
    (r"up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.1.conv"),
    (r"up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"up_blocks\.1\.attentions\.0", "output_blocks.2.1"),
    (r"up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
    (r"up_blocks\.1\.attentions\.1", "output_blocks.3.1"),
]
VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    (r"to_out\.0", "proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


def original(key: str, part: str) -> str:
    """The name of a weight in the files of the model's authors."""
    if part == "text_encoder":
        return f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"
    names = [(rf"\.{now}\.", f".{before}.") for now, before in RESNET] if ".resnets." in key else []
    for now, before in [*names, *UNET] if part == "unet" else VAE:
        key = re.sub(now, before, key)
    return ("model.diffusion_model." if part == "unet" else "first_stage_model.") + key


@pytest.fixture
def single_file(tiny_pipeline, tmp_path):
    weights = {}
    for part, stem in STEMS.items():
        for key, value in load_file(tiny_pipeline / part / f"{stem}.safetensors").items():
            of_image_attention = part == "vae" and "attentions" in key and value.dim() == 2
            weights[original(key, part)] = value[..., None, None] if of_image_attention else value
    save_file(weights, tmp_path / "v1.safetensors", {"format": "pt"})
    return tmp_path / "v1.safetensors"


def test_the_command_for_a_single_file_makes_the_folder(single_file, tiny_pipeline):
    with pytest.raises(ValueError, match="in a single file; convert it once") as error:
        check_model(str(single_file))
    python, option, code = shlex.split(str(error.value).partition("model): ")[2])
    assert (python, option) == ("python", "-c")
    exec(code.replace('.safetensors")', f'.safetensors", config={str(tiny_pipeline)!r})'))  # offline, as it advises
    folder = single_file.with_suffix("")
    check_model(str(folder))
    loaded, whole = (load_denoiser(str(path), "float32", "cpu").pipeline for path in (folder, tiny_pipeline))
    for part in STEMS:
        torch.testing.assert_close(
            dict(getattr(loaded, part).state_dict()), dict(getattr(whole, part).state_dict()), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            ["model.diffusion_model.a", "conditioner.embedders.0.a"],
            r"diffusers\.StableDiffusionXLPipeline\.from_single",
        ),
        (["model.diffusion_model.joint_blocks.0.a", "text_encoders.a"], r"diffusers\.StableDiffusion3Pipeline\.from_s"),
        (["double_blocks.0.a"], r"holds only a part of a model or an adapter \(1 weights, such as double_blocks\.0\.a"),
        (["lora_unet_a.lora_down.weight"], "holds only a part of a model or an adapter"),
        ([], "holds only a part of a model"),
    ],
)
def test_what_a_single_file_holds_is_told(tmp_path, keys, told):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "a b.safetensors")
    with pytest.raises(ValueError, match=told):
        check_model(str(tmp_path / "a b.safetensors"))


def test_other_files_are_told(tmp_path):
    for name in ("empty.safetensors", "old.ckpt", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"cannot be read \(.*\): fetch it again, whole; convert it once .*from_single"
    ):
        check_model(str(tmp_path / "empty.safetensors"))
    with pytest.raises(ValueError, match=r"in a single file; convert it once .*StableDiffusionPipeline\.from_single"):
        check_model(str(tmp_path / "old.ckpt"))
    with pytest.raises(ValueError, match="is a file; give the folder"):
        check_model(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"'models/v1\.safetensors' does not exist"):
        check_model("models/v1.safetensors")
