"""Compares the weights of a model folder with its configurations, from the headers of the files alone."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_SHOWN = 2  # keys in a message
_ADAPTER_KEYS = ("base_layer.", "lora_", ".lora.")
# Names in files of earlier versions of diffusers and transformers; the loaders know them too.
_EARLIER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

Shapes = dict[str, tuple[int, ...]]


def weight_names(folder: Path, part: str) -> list[str]:
    """The files of a part's weights: several if there is an index.

    Raises:
        ValueError: the index is damaged.
    """
    index = folder / part / f"{WEIGHTS[part]}.index.json"
    if not index.is_file():
        return [WEIGHTS[part]]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has a {part}/{index.name} that is not valid ({error!r}); fetch it again") from error


def weight_faults(folder: Path, part: str, config: dict | None) -> list[str]:
    """One line for each thing that is wrong with a part's safetensors: missing, damaged, or not as the part's
    configuration says. A part whose configuration cannot be read (None) is not compared with it."""
    faults, found = [], {}
    try:
        names = weight_names(folder, part)
    except ValueError as error:
        return [str(error)]
    for name in names:
        try:
            with safe_open(folder / part / name, framework="pt") as file:
                found |= {_now(key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            faults.append(_missing_file(folder, part, name))
        except (SafetensorError, OSError) as error:
            faults.append(f"has a {part}/{name} that cannot be read ({error}); fetch it again, whole (git lfs pull?)")
    if faults or config is None:
        return faults
    try:
        wanted = _shapes_of(part, config)
    except Exception as error:  # the libraries raise anything on a wrong value
        return [f"has a {part}/config.json that describes no model ({_short(error)}); fetch it again"]
    return _differences(part, wanted, found)


def width_faults(configs: dict[str, dict]) -> list[str]:
    """One line for each width in which the parts of a model do not agree; parts that are missing are not compared."""
    faults = []
    unet, vae, text = (configs.get(part) for part in ("unet", "vae", "text_encoder"))
    if unet is not None and vae is not None:
        channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
        wanted = vae.get("latent_channels", 4)
        if channels != (wanted, wanted):
            faults.append(
                f"has a UNet that takes {channels[0]} and gives {channels[1]} channels for latents of {wanted}"
                " (an inpainting or upscaling model?); give a text-to-image model"
            )
    if unet is not None and text is not None:
        width, read = text.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
        if any(one != width for one in (read if isinstance(read, list) else [read])):
            faults.append(
                f"has a text encoder of hidden_size {width} and a UNet of cross_attention_dim {read}: they are parts of"
                " different models; take both from the same one"
            )
    return faults


def refuse_report(part: str, report: dict[str, Any]):
    """Refuse a part that a loader of diffusers or transformers did not load as it is.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    missing, unexpected = ({_now(key) for key in report[f"{kind}_keys"]} for kind in ("missing", "unexpected"))
    other = [str(key) for key in report.get("mismatched_keys", ())]
    if faults := _listed(part, missing, {key for key in unexpected if key}, other):
        raise ValueError("\n".join(faults))


def _shapes_of(part: str, config: dict) -> Shapes:
    """The weights that a part of this configuration has; no memory is taken for them."""
    with torch.device("meta"):
        if part == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig(**config))
        else:
            model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
    return {_now(key): tuple(value.shape) for key, value in model.state_dict().items()}


def _now(key: str) -> str:
    """The name of a weight in the current versions; empty: it is not needed any more."""
    if key.endswith("position_ids"):
        return ""
    for before, after in _EARLIER.items() if ".attentions." in key else ():
        key = key.replace(before, after)
    return key.removeprefix("text_model.")


def _differences(part: str, wanted: Shapes, found: Shapes) -> list[str]:
    wanted, found = ({key: shape for key, shape in shapes.items() if key} for shapes in (wanted, found))
    other = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    return _listed(part, wanted.keys() - found.keys(), found.keys() - wanted.keys(), other)


def _listed(part: str, missing: Iterable[str], unexpected: Iterable[str], other: list[str]) -> list[str]:
    missing, unexpected = sorted(key for key in missing if key), sorted(unexpected)
    faults = []
    if missing or unexpected:
        lacks = f"lacks {len(missing)} weights{_examples(missing)}" if missing else ""
        has = f"has {len(unexpected)} weights{_examples(unexpected)} that its configuration does not have"
        what = " and ".join(text for text in (lacks, has if unexpected else "") if text)
        advice = "fetch the part again, or correct its config.json"
        if any(mark in key for key in unexpected for mark in _ADAPTER_KEYS):
            advice = "it was saved with an adapter attached: merge or unload the adapter, and save it again"
        faults.append(f"{what} in its {part}; {advice}")
    if other:
        shown = "; ".join(other[:_SHOWN])
        faults.append(f"has {len(other)} weights of another shape in its {part} ({shown}); correct {part}/config.json")
    return faults


def _examples(keys: list[str]) -> str:
    more = ", ..." if len(keys) > _SHOWN else ""
    return f" ({', '.join(key[:100] for key in keys[:_SHOWN])}{more})"


def _missing_file(folder: Path, part: str, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    variants = sorted(path.name for path in (folder / part).glob(f"{stem}.*.{suffix}"))
    if variants:
        variant = variants[0].removeprefix(f"{stem}.").removesuffix(f".{suffix}")
        return (
            f"has {part}/{variants[0]} but not {part}/{name}; write it without the variant:"
            f" StableDiffusionPipeline.from_pretrained(FOLDER, variant={variant!r}).save_pretrained(NEW_FOLDER)"
        )
    return f"lacks {part}/{name}; complete the folder (only safetensors are read, no pickled weights)"


def _short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
