"""The weights of a model's parts: whether the files have those that its class and configuration need, and no others.

Checked twice: from the headers of the files before anything starts, and by the loaders' reports when they are read.
"""

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of the names of files, by library
VARIANTS = (None, "fp16", "bf16")  # that are read, in this order
_SHOWN = 2  # keys in a message
_ADAPTER_KEYS = ("base_layer.", "lora_", ".lora.")
# Names of attention layers in files of earlier versions of diffusers; its loader knows them too.
_EARLIER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_UNUSED = "lm_head."  # of a language model whose file is used for a class that ends before its head

Shapes = dict[str, tuple[int, ...]]
Report = Mapping[str, Iterable]  # what `from_pretrained(..., output_loading_info=True)` returns beside a model


def part_class(index: Mapping[str, Any], part: str) -> type:
    """The class of a part, as a checked model_index.json names it."""
    library, name = index[part]
    return getattr(importlib.import_module(library), name)


def on_meta(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers without weights; takes no memory for them."""
    with torch.device("meta"):
        return kind.from_config(config)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Context in which diffusers and transformers show no progress bars and no report of the loaded weights. Otherwise
    every actor would show them. `report_faults` makes errors of the report."""
    logs = diffusers.utils.logging, transformers.utils.logging
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


# ---------------------------------------------------------------------------------------------- files
def weight_variant(folder: Path, index: Mapping[str, Any], part: str) -> str | None:
    """The variant of a part's weights, a word in the names of their files, such as model.fp16.safetensors. None: the
    names have none, and such files come first."""
    there = (v for v in VARIANTS if any((folder / part / name).is_file() for name in _file_names(index, part, v)))
    return next(there, None)


def _file_names(index: Mapping[str, Any], part: str, variant: str | None) -> tuple[str, str]:
    """The name of a part's weights in one file, and the name of the index of several files."""
    stem, word = _STEMS[index[part][0]], f".{variant}" if variant else ""
    return f"{stem}{word}.safetensors", f"{stem}.safetensors.index{word}.json"


def weight_names(folder: Path, index: Mapping[str, Any], part: str) -> list[str]:
    """The files of a part's weights: several if they have an index.

    Raises:
        ValueError: that index is damaged.
    """
    whole, split = _file_names(index, part, weight_variant(folder, index, part))
    if not (folder / part / split).is_file():
        return [whole]
    try:
        return sorted(set(json.loads((folder / part / split).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has a {part}/{split} that is not valid ({error!r}); fetch it again") from error


def weight_faults(folder: Path, index: Mapping[str, Any], part: str, config: dict | None) -> list[str]:
    """One line for each thing that is wrong with a part's safetensors: missing, damaged, or not as the part's
    configuration says. A part whose configuration cannot be read (None) is not compared with it."""
    faults, found = [], {}
    try:
        names = weight_names(folder, index, part)
    except ValueError as error:
        return [str(error)]
    for name in names:
        try:
            with safe_open(folder / part / name, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            faults.append(_missing_file(folder, part, name))
        except (SafetensorError, OSError) as error:
            faults.append(f"has a {part}/{name} that cannot be read ({error}); fetch it again, whole (git lfs pull?)")
    if faults or config is None:
        return faults
    if "quantization_config" in config:
        return [f"has a quantized {part}, which is not supported; give the model that is not quantized"]
    kind = part_class(index, part)
    try:
        with quiet_loading():
            if issubclass(kind, transformers.PreTrainedModel):
                report = _transformers_report(kind, folder / part, found)
            else:
                report = _diffusers_report(kind, config, found)
    except Exception as error:  # the libraries raise anything on a wrong value
        return [f"has a {part}/config.json that describes no model ({_short(error)}); fetch it again"]
    return report_faults(part, report)


def _transformers_report(kind: type, folder: Path, found: Shapes) -> Report:
    """The report of the loader itself, which gets weights without values. It knows the names of earlier versions, tied
    weights, and the weights that a class ignores."""
    weights = {key: torch.empty(shape, device="meta") for key, shape in found.items()}
    config = kind.config_class.from_pretrained(folder)
    settings = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True}
    return kind.from_pretrained(None, config=config, state_dict=weights, **settings)[1]


def _diffusers_report(kind: type, config: dict, found: Shapes) -> Report:
    """The report that the loader of diffusers would give. The loader itself takes only files, no weights."""
    wanted = {_now(key): tuple(value.shape) for key, value in on_meta(kind, config).state_dict().items()}
    found = {_now(key): shape for key, shape in found.items()}
    ignored = kind._keys_to_ignore_on_load_unexpected or ()
    others = found.keys() - wanted.keys()
    return {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": [key for key in others if not any(re.search(pattern, key) for pattern in ignored)],
        "mismatched_keys": [
            (key, found[key], shape) for key, shape in wanted.items() if found.get(key, shape) != shape
        ],
    }


def _now(key: str) -> str:
    """The name of a weight in the current version of diffusers."""
    for before, after in _EARLIER.items() if ".attentions." in key else ():
        key = key.replace(before, after)
    return key


def _missing_file(folder: Path, part: str, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    variants = sorted(path.name for path in (folder / part).glob(f"{stem}.*.{suffix}"))
    if variants:
        variant = variants[0].removeprefix(f"{stem}.").removesuffix(f".{suffix}")
        return (
            f"has {part}/{variants[0]} but not {part}/{name}; write it without the variant:"
            f" DiffusionPipeline.from_pretrained(FOLDER, variant={variant!r}).save_pretrained(NEW_FOLDER)"
        )
    return f"lacks {part}/{name}; complete the folder (only safetensors are read, no pickled weights)"


# ---------------------------------------------------------------------------------------------- reports
def report_faults(part: str, report: Report) -> list[str]:
    """One line for each kind of weights that a part lacks, has beside its own, or has in another shape."""
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(_UNUSED))
    other = sorted(report.get("mismatched_keys", ()))
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
        shown = "; ".join(f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in other[:_SHOWN])
        faults.append(f"has {len(other)} weights of another shape in its {part} ({shown}); correct {part}/config.json")
    return faults


def _examples(keys: list[str]) -> str:
    more = ", ..." if len(keys) > _SHOWN else ""
    return f" ({', '.join(key[:100] for key in keys[:_SHOWN])}{more})"


def _short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
