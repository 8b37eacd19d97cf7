"""The section `data.augment` of a configuration: how training images are changed at random."""

from typing import Annotated

from pydantic import Field, model_validator

from configs.section import Section

Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class AugmentConfig(Section):
    """Random changes of training images, drawn anew for every sample and epoch: `data_pipeline.draws`.

    Geometry moves images and labels together; colours change images only. Ranges are [least, most], drawn uniformly.
    """

    flip: bool = True
    """Mirror half of the images."""
    crop_scale: Range = (0.49, 1.0)
    """Area of the window that is cut out, as a share of the image's; [1, 1] cuts nothing."""
    crop_ratio: Range = (1.0, 1.0)
    """Width over height of the window, uniform in its logarithm; at most what fits in the image."""
    zoom: Range = (1.0, 1.0)
    """Enlargement after cropping; below 1 the image gets a margin of unknown pixels."""
    rotate_degrees: float = Field(0.0, ge=0, le=180)
    """Rotation about the window's centre, by up to this angle either way; corners become unknown pixels."""
    brightness: float = Field(0.0, ge=0)
    """Colours are multiplied by a factor from [1 - x, 1 + x], at least 0."""
    contrast: float = Field(0.0, ge=0)
    """Factor on the distance from the image's mean grey, from [1 - x, 1 + x], at least 0."""
    saturation: float = Field(0.0, ge=0)
    """Factor on the distance from each pixel's grey, from [1 - x, 1 + x], at least 0."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Hues turn by up to this share of the colour circle either way."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Share of the images that lose their colours."""
    blur: float = Field(0.0, ge=0, le=0.1)
    """Largest standard deviation of a Gaussian blur, as a share of the side; drawn from [0, x]."""

    @model_validator(mode="after")
    def _check(self) -> "AugmentConfig":
        for field, (least, most) in (
            ("crop_scale", self.crop_scale),
            ("crop_ratio", self.crop_ratio),
            ("zoom", self.zoom),
        ):
            if least > most:
                raise ValueError(f"{field} [{least:g}, {most:g}]: give the smaller number first")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale {self.crop_scale[1]:g} exceeds the image: a zoom below 1 shows more than it")
        return self

    @property
    def pads(self) -> bool:
        """Whether an output pixel may lie outside the image."""
        return self.rotate_degrees > 0 or self.zoom[0] < 1
