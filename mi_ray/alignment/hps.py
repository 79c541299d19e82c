"""Human Preference Score v2.1 (Wu et al., 2023, arXiv 2306.09341)."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import is_zipfile

import numpy as np

from mi_ray.alignment.clip_judge import ClipJudge
from mi_ray.alignment.judges import device, padded, reason
from mi_ray.alignment.metric import Column, Unusable

if TYPE_CHECKING:
    import torch
    from transformers import CLIPModel

CHECKPOINT = "HPS_v2.1_compressed.pt"
ARCHITECTURE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model that was tuned: its config.json and its tokenizer

# Names of open_clip and of transformers' CLIPModel. The query, key and value of open_clip are rows of one matrix.
_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}  # transposed
_PREFIXES = {
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # spelt so in transformers
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_PARTS = {
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


class HpsV21(ClipJudge):
    """The cosine of prompt and image by the weights of HPS v2.1. Values of v2.0 have another scale.

    The text is the prompt, cut at 77 tokens. The image's long side is resized to 224 pixels, bicubic, and the rest of
    the square is black, as in the released code. The published weights have the layout of open_clip's ViT-H-14. A local
    folder holds them, and the config.json and the tokenizer of `ARCHITECTURE`.
    """

    default = "xswu/HPSv2"
    template = "{}"
    declared = (Column("hps_v21", "Human Preference Score v2.1: cosine of prompt and image", low=-1, high=1),)
    weights = (CHECKPOINT,)
    config_file = "README.md"  # the hub repository of the weights has no config.json

    def __init__(self, model: str = ""):
        super().__init__(model)
        self.built_from = {"pretrained_model_name_or_path": str(self.folder)}  # architecture and tokenizer
        if self.hub_id:
            commit = self._fetched(ARCHITECTURE, "config.json").parent.name
            self.built_from = {"pretrained_model_name_or_path": ARCHITECTURE, "revision": commit}
            revision = f"{self.revision}; {ARCHITECTURE}@{commit}"
            self.columns = tuple(replace(column, revision=revision) for column in self.columns)

    def _check_type(self, folder: Path):
        if Path(self.model).is_dir():
            super()._check_type(folder)

    @property
    def source(self) -> dict[str, str]:
        """The architecture and the tokenizer, as arguments of from_pretrained."""
        return self.built_from

    def _check_weights(self):
        """Compare names and shapes of the checkpoint with the class. The values are not read."""
        self._built("meta")

    def load(self, dtype: str = "float32") -> "CLIPModel":
        """The model with the published weights on its device, without dropout.

        Raises:
            Unusable: the checkpoint is damaged, or its weights do not fit the architecture.
        """
        import torch

        return self._built("cpu").to(device(), getattr(torch, dtype))

    def _built(self, place: str) -> "CLIPModel":
        """The model with the published weights on cpu, or on meta, which has shapes and no values."""
        import torch
        from transformers import CLIPConfig, CLIPModel

        checkpoint = self.folder / CHECKPOINT
        if self.hub_id:
            checkpoint = self._fetched(self.hub_id, CHECKPOINT, self.revision)
        try:
            # Only files in torch's zip form can be mapped into memory.
            how = {"map_location": place, "mmap": is_zipfile(checkpoint), "weights_only": True}
            published = torch.load(checkpoint, **how)
            with torch.device(place):
                clip = CLIPModel(CLIPConfig.from_pretrained(**self.source))
            clip.load_state_dict(clip_weights(published.get("state_dict", published)))
        except Exception as error:  # torch raises anything on a damaged or another file
            raise Unusable(
                f"cannot use {CHECKPOINT} of the model {self.model!r} ({reason(error)}): fetch it again, and the"
                f" config.json of {ARCHITECTURE}"
            ) from error
        return clip.eval()

    def fitted(self, image: np.ndarray, size: int) -> np.ndarray:
        return padded(image, size)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        return {"hps_v21": self.cosines(images, prompts).tolist()}


def clip_weights(published: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The weights of transformers' CLIPModel from those of open_clip's CLIP, fp32.

    Raises:
        KeyError: a name is not one of open_clip's CLIP.
    """
    found = {}
    for name, value in published.items():
        if name in _NAMES:
            found[_NAMES[name]] = value.float()
        elif name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = value.T.float().contiguous()
        elif name != "attn_mask":  # a constant
            prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
            if prefix is None:
                raise KeyError(f"{name} is not a weight of open_clip's CLIP")
            inside = f".{name.removeprefix(prefix)}"
            inside = next((inside.replace(a, b) for a, b in _PARTS.items() if a in inside), inside)[1:]
            if "attn.in_proj_" in inside:
                for part, rows in zip("qkv", value.float().chunk(3), strict=True):
                    found[_PREFIXES[prefix] + inside.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = rows
            else:
                found[_PREFIXES[prefix] + inside] = value.float()
    return found
