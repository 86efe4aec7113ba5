"""Image files as people have them -> bytes of one size: upright, 16 bits and floats scaled, transparency laid on white.

What has no known range of brightness, such as 32-bit integers, is refused.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdq_lightning.errors import UserError

BACKGROUND = (255, 255, 255)
"""The colour that transparent images are laid on: white, as most programs show them."""

_WHOLE_16_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose greys above 8 bits Pillow gives as numbers up to 65535
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags and a value of TIFF 6.0


class Brightness(NamedTuple):
    """What the numbers of a grey image with more than 8 bits mean.

    Attributes:
        kind: What the numbers are, for messages.
        black: The number of a black pixel.
        white: The number of a white pixel.
    """

    kind: str
    black: float
    white: float


def decode_file(path: str, size: int) -> NDArray[np.uint8]:
    """Return an image file as uint8 (size, size, 3), RGB, scaled and cropped about its centre.

    Args:
        path: The file.
        size: Side in pixels.

    Raises:
        UserError: If it is not an image, it is damaged, or its range of brightness isn't known.
    """
    try:
        with Image.open(path) as image:
            brightness = find_brightness(image)  # first, as an image that is turned knows no more of its file
            return np.asarray(ImageOps.fit(_to_rgb(_upright(image), brightness), (size, size)))
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise UserError(f"{path} is not a readable image: repair or remove it ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF data say; a camera stores its picture as the sensor lay."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data say nothing, and the picture is whole
        return image


def find_brightness(image: Image.Image) -> Brightness | None:
    """Return what the numbers of a grey image with more than 8 bits mean; None of any other image.

    Args:
        image: As Pillow opens its file.

    Raises:
        UserError: If the file doesn't say it.
    """
    is_float = image.mode == "F"
    if not is_float and not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(_BITS, (32,))[0]
    if is_float:
        kind, highest = "floats", 1.0
    elif image.format in _WHOLE_16_BITS:
        kind, highest = "16-bit integers", 65535.0
    elif tags and image.mode.startswith("I;16"):  # unsigned
        kind, highest = f"{bits}-bit integers", 2.0**bits - 1
    else:
        raise UserError(f"its {bits}-bit integers have no known range; save it with 8 or 16 bits, unsigned")
    # Pillow inverts such images of up to 8 bits alone.
    is_inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return Brightness(kind, black=highest, white=0.0) if is_inverted else Brightness(kind, black=0.0, white=highest)


def _to_rgb(image: Image.Image, brightness: Brightness | None) -> Image.Image:
    """Return an image of any mode as 8-bit RGB.

    Args:
        image: Upright.
        brightness: What its numbers mean; None of an image of 8 bits.

    Raises:
        UserError: If a number is out of their range.
    """
    if brightness is not None:
        return Image.fromarray(_to_bytes(image, brightness)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, (*BACKGROUND, 255)), coloured).convert("RGB")
    return image.convert("RGB")


def _to_bytes(image: Image.Image, brightness: Brightness) -> NDArray[np.uint8]:
    """Return a grey image of integers or floats, scaled from its range to 0..255.

    Raises:
        UserError: If a number is outside of it.
    """
    kind, black, white = brightness
    highest = max(black, white)
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= highest):  # also of what is not a number
        raise UserError(f"its {kind} must lie between 0 and {highest:g}, and are {values.min():g} to {values.max():g}")
    return np.round((values - black) * (255 / (white - black))).astype(np.uint8)
