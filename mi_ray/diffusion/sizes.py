"""Image sizes: the one that a model was trained at, and which others it can make."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The image sizes of a model, in pixels; a size is (height, width)."""

    own: tuple[int, int]  # that it was trained at
    scale: int  # pixels along one side of a latent pixel
    multiple: int  # of which a height or width must be a multiple

    @classmethod
    def of_unet(cls, unet: Mapping, vae: Mapping) -> "Sizes":
        """Of a UNet2DConditionModel with an AutoencoderKL, from their configurations (missing: the default).

        Both halve the size after each block but the last, and the UNet doubles it again: a size that cannot be halved
        would come back as another one.

        Raises:
            ValueError: the UNet's configuration does not say its own size.
        """
        sample = unet.get("sample_size")
        if sample is None:
            raise ValueError("has in unet/config.json no sample_size, the size of its latents; set it there")
        scale = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
        downsampling = 2 ** (len(unet.get("block_out_channels", (320, 640, 1280, 1280))) - 1)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return cls((height * scale, width * scale), scale, scale * downsampling)

    def faults(self, height: int | None, width: int | None) -> list[str]:
        """What is wrong with a size, one line for the height and one for the width; None, the model's own, is right."""
        lines = []
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and pixels % self.multiple:
                below = pixels - pixels % self.multiple
                nearest = [str(side) for side in (below, below + self.multiple) if side]
                lines.append(
                    f"{name}: {pixels} pixels are not a multiple of {self.multiple}, which this model needs; take"
                    f" {' or '.join(nearest)}"
                )
        return lines

    def image(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size of images; None: the model's own height or width.

        Raises:
            ValueError: with the lines of `faults`.
        """
        if faults := self.faults(height, width):
            raise ValueError("\n".join(faults))
        return height or self.own[0], width or self.own[1]

    def latent(self, image: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of images of a size."""
        return image[0] // self.scale, image[1] // self.scale
