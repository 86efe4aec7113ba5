"""Image files as people have them -> bytes of one size: upright, 16 bits and floats scaled, transparency laid on white.

What has no known range of brightness, such as 32-bit integers, is refused.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kdq_lightning.errors import UserError

BACKGROUND = (255, 255, 255)
"""The colour that transparent images are laid on: white, as most programs show them."""

_WHOLE_16_BITS = ("PNG", "PPM")  # formats whose greys above 8 bits Pillow gives as 32-bit integers up to 65535


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
            return np.asarray(ImageOps.fit(_to_rgb(_upright(image), image.format), (size, size)))
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise UserError(f"{path} is not a readable image: repair or remove it ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF data say; a camera stores its picture as the sensor lay."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data say nothing, and the picture is whole
        return image


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Return an image of any mode as 8-bit RGB.

    Args:
        image: Upright.
        file_format: Of its file, as Pillow calls it.

    Raises:
        UserError: If its range of brightness isn't known.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_bytes(image, file_format)).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, (*BACKGROUND, 255)), coloured).convert("RGB")
    return image.convert("RGB")


def _to_bytes(image: Image.Image, file_format: str | None) -> NDArray[np.uint8]:
    """Return a grey image of integers or floats, scaled from its range to 0..255.

    Raises:
        UserError: If its range isn't known, or a number is outside of it.
    """
    if image.mode == "F":
        kind, highest = "floats", 1.0
    elif image.mode.startswith("I;16") or file_format in _WHOLE_16_BITS:
        kind, highest = "16-bit integers", 65535.0
    else:
        raise UserError("its 32-bit integers have no known range; save it with 8 or 16 bits")
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= highest):  # also of what is not a number
        raise UserError(f"its {kind} must lie between 0 and {highest:g}, and are {values.min():g} to {values.max():g}")
    return np.round(values * (255 / highest)).astype(np.uint8)
