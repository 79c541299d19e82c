"""Image sizes: the size that a model was trained at, and the other sizes that it can generate."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The image sizes of a model, in pixels; a size is (height, width)."""

    own: tuple[int, int]  # size that the model was trained at
    scale: int  # image pixels per latent pixel, along one side
    multiple: int  # height and width must be multiples of this number

    @classmethod
    def of_unet(cls, unet: Mapping, vae: Mapping) -> "Sizes":
        """The sizes of a UNet2DConditionModel with an AutoencoderKL, from their configs; missing keys: the defaults.

        Both halve the size after each block except the last, and the UNet doubles it again. With a size that is not
        divisible, the output would have another size than the input.

        Raises:
            ValueError: the UNet's config has no sample_size, or one of the values has another type.
        """
        sample = unet.get("sample_size")
        if sample is None:
            raise ValueError("has in unet/config.json no sample_size, the size of its latents; set it there")
        try:
            scale = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
            downsampling = 2 ** (len(unet.get("block_out_channels", (320, 640, 1280, 1280))) - 1)
            height, width = (sample, sample) if isinstance(sample, int) else map(int, sample)
        except (TypeError, ValueError) as error:
            wrong = "has a sample_size or block_out_channels that are not numbers"
            raise ValueError(f"{wrong}, in unet/config.json or vae/config.json; fetch both again") from error
        return cls((height * scale, width * scale), scale, scale * downsampling)

    def faults(self, height: int | None, width: int | None) -> list[str]:
        """Error messages for a size, one line each for height and width. None, the model's own size, is valid."""
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
        """The image size (height, width). None: the model's own height or width.

        Raises:
            ValueError: the size is not valid; the message has the lines of `faults`.
        """
        if faults := self.faults(height, width):
            raise ValueError("\n".join(faults))
        return height or self.own[0], width or self.own[1]

    def latent(self, image: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of an image of this size."""
        return image[0] // self.scale, image[1] // self.scale
