"""Arrays to bytes and back: the members of a shard.

Images are written as PNG, JPEG or WebP; dense labels and masks as PNG (8 or 16 bit) or as byte planes
(`data_pipeline.byte_planes`) and vectors as npy, all without loss; dense npy labels are read too. A member's suffix
tells its format, so the labels of one folder may be of several. A PNG's depth is taken from its own header: image
libraries reduce some 16-bit files to 8 bits without a word, and a label of the wrong depth would train a wrong model.
"""

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from configs.tasks import Encoding, TaskSpec
from data_pipeline import byte_planes
from data_pipeline.bounded import check_png_sums, image_pixels, load_npy
from data_pipeline.sample import AnyArray
from data_pipeline.skips import DamagedMember, MemberError, UnfitMember

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
LABEL_SUFFIXES = ("png", "npy", byte_planes.SUFFIX)

LabelCodec = Literal["png", "zstd"]
"""How dense labels and masks are written: PNG, or byte planes compressed by Zstandard."""

ImageFormat = Literal["png", "jpeg", "webp"]

_SUFFIXES = tuple(dict.fromkeys((*IMAGE_SUFFIXES, *LABEL_SUFFIXES)))
# Channels per colour type, PNG specification (ISO/IEC 15948) table 11.1; type 3 is a palette.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@dataclass(frozen=True)
class ImageCodec:
    """How images are written.

    Attributes:
        format: png is without loss; jpeg keeps colours at full resolution (4:4:4), webp halves it (4:2:0).
        quality: 1 to 100, for jpeg and webp; 100 is without loss for webp, the best that jpeg can do.

    Raises:
        UserError: another quality.
    """

    format: ImageFormat = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"image quality {self.quality}: give 1 to 100")

    @property
    def name(self) -> str:
        """Equal for codecs that write equal bytes: png, jpeg-95, webp-95, webp-lossless."""
        if self.format == "png":
            return "png"
        return f"{self.format}-{'lossless' if self._lossless_webp else self.quality}"

    def encode(self, rgb: NDArray[np.uint8]) -> tuple[str, bytes]:
        """Encode an (H, W, 3) uint8 image; return the suffix of its member and the bytes.

        Raises:
            UserError: another shape or dtype, or an image too large for the format.
        """
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise UserError(f"an image must be (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
        rgb = np.ascontiguousarray(rgb)
        try:
            match self.format:
                case "png":
                    return "png", _encode_png(rgb)
                case "jpeg":
                    return "jpg", simplejpeg.encode_jpeg(rgb, self.quality, "RGB", "444", fastdct=False)
                case "webp":
                    buffer = io.BytesIO()
                    quality = {"lossless": True} if self._lossless_webp else {"quality": self.quality}
                    Image.fromarray(rgb).save(buffer, format="WEBP", **quality)
                    return "webp", buffer.getvalue()
        except ValueError as error:
            raise UserError(f"an image of {rgb.shape[:2]} pixels cannot be stored as {self.name} ({error})") from None

    @property
    def _lossless_webp(self) -> bool:
        return self.format == "webp" and self.quality == 100


PNG = ImageCodec()


def encode_mask(mask: NDArray[np.uint8], codec: LabelCodec = "png") -> tuple[str, bytes]:
    """Encode an (H, W) uint8 mask (0 unknown, 255 known); return the suffix of its member and the bytes.

    Raises:
        UserError: another shape or dtype.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise UserError(f"mask_valid must be (H, W) uint8, not {mask.shape} {mask.dtype}")
    return _encode_dense(mask, codec)


def encode_label(spec: TaskSpec, array: AnyArray, codec: LabelCodec = "png") -> tuple[str, bytes]:
    """Encode a label in its task's stored encoding without loss; return the suffix of its member and the bytes.

    Args:
        spec: the task.
        array: dense (H, W) or (H, W, C), vectors (C,); dtype as in `spec.encoding`.
        codec: for dense labels.

    Raises:
        UserError: shape or dtype do not fit `spec.encoding`.
    """
    stored = _check_label(spec, array, f"label '{spec.name}'")
    if stored.dtype == np.uint8 or (stored.dtype == np.uint16 and stored.ndim == 2):
        return _encode_dense(stored, codec)
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(stored), allow_pickle=False)
    return "npy", buffer.getvalue()


def decode_member(suffix: str, data: bytes, where: str) -> AnyArray:
    """Decode an image or array member.

    Args:
        suffix: png, jpg, jpeg, webp, npy or plz.
        data: the member's bytes.
        where: shard, key and member, for messages.

    Returns:
        (H, W) uint8 or uint16, (H, W, 3) uint8, or whatever array an npy or plz holds.

    Raises:
        DamagedMember: the bytes are damaged, or declare more than `byte_planes.MOST_BYTES`.
        UnfitMember: the format is not one of these, or a depth that is not read.
    """
    try:
        match suffix:
            case "png":
                return _decode_png(data, where)
            case "jpg" | "jpeg":
                image_pixels(suffix, data)
                return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
            case "webp":
                image_pixels(suffix, data)
                return np.asarray(Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB"))
            case "npy":
                return load_npy(data)
            case byte_planes.SUFFIX:
                return byte_planes.decode_planes(data)
    except MemberError:
        raise
    except Exception as error:  # Fed with damaged bytes, decoders raise anything, down to errors of Python's tokenizer.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedMember(f"{where} is damaged ({reason}): restore the shard or pack it again") from None
    raise UnfitMember(f"{where} has an unknown format '{suffix}': use {', '.join(_SUFFIXES)}")


def decode_image(suffix: str, data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode an (H, W, 3) uint8 image; a grey file becomes three equal channels.

    Raises:
        MemberError: as `decode_member`, or the member is not an 8-bit image.
    """
    image = decode_member(suffix, data, where)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise UnfitMember(f"{where} must be an 8-bit grey or RGB image, but is {image.shape} {image.dtype}")
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def decode_label(spec: TaskSpec, suffix: str, data: bytes, where: str) -> AnyArray:
    """Decode a label and check it against its task's encoding.

    Args:
        spec: the task.
        suffix: png, npy or plz.
        data: the member's bytes.
        where: shard, key and member, for messages.

    Returns:
        Dense (H, W) or (H, W, C), vectors (C,); dtype as in `spec.encoding` (float16 vectors become float32).

    Raises:
        MemberError: damaged bytes, wrong bit depth, wrong number of channels, or a lossy format.
    """
    if suffix not in LABEL_SUFFIXES:
        raise UnfitMember(f"{where} has format '{suffix}', but labels must be {', '.join(LABEL_SUFFIXES)}")
    return _check_label(spec, decode_member(suffix, data, where), where)


def image_shape(suffix: str, data: bytes, where: str) -> tuple[int, int]:
    """Return (height, width) in pixels of an encoded image from its header alone.

    Raises:
        MemberError: not an image of that format, or a damaged header.
    """
    if suffix not in IMAGE_SUFFIXES:
        raise UnfitMember(f"{where} has format '{suffix}', but images must be {', '.join(IMAGE_SUFFIXES)}")
    try:
        return image_pixels(suffix, data)
    except Exception as error:  # As in `decode_member`.
        raise DamagedMember(
            f"{where} is not a readable {suffix} image ({error}): restore the shard or pack it again"
        ) from None


def _check_label(spec: TaskSpec, array: AnyArray, where: str) -> AnyArray:
    """Return `array` if it fits the task's encoding; float16 vectors become float32."""
    encoding = spec.encoding
    if not spec.dense and array.dtype == np.float16:
        array = array.astype(np.float32)
    if not spec.dense:
        shape_fits = array.shape == (encoding.channels,)
    elif encoding.channels == 1:
        shape_fits = array.ndim == 2
    else:
        shape_fits = array.ndim == 3 and array.shape[2] == encoding.channels
    if array.dtype != np.dtype(encoding.dtype) or not shape_fits:
        raise UnfitMember(
            f"{where} is {_describe(array)}, but task '{spec.name}' stores {_expected(spec, encoding)}: "
            "convert the label again from its source"
        )
    return array


def _describe(array: AnyArray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _expected(spec: TaskSpec, encoding: Encoding) -> str:
    if not spec.dense:
        return f"{encoding.dtype} of shape ({encoding.channels},)"
    return f"{encoding.dtype} of shape (H, W{f', {encoding.channels}' if encoding.channels > 1 else ''})"


def _encode_dense(array: AnyArray, codec: LabelCodec) -> tuple[str, bytes]:
    if codec == "zstd":
        try:
            return byte_planes.SUFFIX, byte_planes.encode_planes(array)
        except ValueError as error:
            raise UserError(f"{error}: store it as png") from None
    return "png", _encode_png(array)


def _encode_png(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return buffer.getvalue()


def _decode_png(data: bytes, where: str) -> AnyArray:
    image_pixels("png", data)
    depth, colour = data[24:26].ljust(2, b"\0")
    if (depth, colour) not in ((8, 0), (8, 2), (16, 0)):
        raise UnfitMember(
            f"{where} is a PNG of {depth} bits and {_PNG_CHANNELS.get(colour, 0)} channels (colour type {colour}): "
            "only grey of 8 or 16 bits and RGB of 8 bits are read without loss; convert it"
        )
    check_png_sums(data)
    array = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    if array.dtype != (np.uint16 if depth == 16 else np.uint8):
        raise UnfitMember(
            f"{where} was read as {array.dtype} from a PNG of {depth} bits: convert it to plain grey or RGB"
        )
    return array
