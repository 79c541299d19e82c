"""Image features of a named encoder, for the kernel distance and the diversity of the report."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mi_ray.alignment.judges import Model, described, device
from mi_ray.alignment.metric import Column

if TYPE_CHECKING:
    import torch


class Encoder(Model):
    """An image model of transformers with one vector per image: DINOv2, ViT, the image part of CLIP or SigLIP.

    The features are the model's pooled output; for DINOv2 this is the normalised class token. Its own image processor
    prepares the images.

    Args:
        model: as `Model`, by default DINOv2 (Oquab et al., 2023, arXiv 2304.07193).
    """

    default = "facebook/dinov2-base"
    model_class = "AutoModel"
    reader = "image processor"
    network = None  # the model, loaded by `prepare`
    processor = None

    @property
    def column(self) -> Column:
        """The model, revision and library of the features, for the metadata of their column."""
        return described(Column("features", "image features of an encoder, for the quality measures"), self)

    def prepare(self):
        """Load the model and its image processor, once."""
        if self.network is None:
            self.processor, network = self.load_reader(), self.load()
            self.network = getattr(network, "vision_model", network)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features (n, d) fp32 of images (n, h, w, 3) uint8."""
        import torch

        self.prepare()
        found = []
        for rows in self.batches(len(images)):
            inputs = self.processor(images=list(images[rows]), return_tensors="pt")
            with torch.inference_mode():
                output = self.network(pixel_values=inputs["pixel_values"].to(device()))
            found.append(output.pooler_output.float().cpu().numpy())
        return np.concatenate(found)


class OwnLatents:
    """Features by the autoencoder of the generating model, see `quality.latent_features`.

    Args:
        encode: images (n, h, w, 3) uint8 to latents (n, c, h, w).
    """

    column = None

    def __init__(self, encode: "Callable[[np.ndarray], torch.Tensor]"):
        self.encode = encode

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features (n, d) fp32 of images (n, h, w, 3) uint8."""
        from mi_ray.alignment.quality import latent_features

        return latent_features(self.encode(images)).cpu().numpy()


def load_encoder(name: str | None, encode: "Callable[[np.ndarray], torch.Tensor]") -> Encoder | OwnLatents:
    """The named encoder, or without a name the generating model's own autoencoder, `encode`.

    Raises:
        Unusable: as `Model`.
    """
    return Encoder(name) if name else OwnLatents(encode)


def check_encoder(name: str | None):
    """Check a named encoder without loading it.

    Raises:
        Unusable: as `Model` and its `check`.
    """
    if name:
        Encoder(name).check()
