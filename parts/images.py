"""Pictures of any kind -> RGB with their tones kept: the one door for training and evaluation.

Pillow reads 16-bit greys, but shows nearly all of them white when it converts them; numbers of 32
bits, signed ones and floats it cuts off at 0 and 255. Here the former keep their tones, and the
latter, for which no header says what is black and white, are refused. Every complaint is a
ValueError of one sentence with the picture's name.
"""
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 80_000_000              # a file that claims more is refused unread
MAX_ASPECT = 200                     # Qwen's own limit


@contextmanager
def reading(name):
    """Broken files let Pillow raise nearly anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of size (our limit is lower) and of odd metadata
            yield
    except FileNotFoundError:
        raise ValueError(f"{name} is missing.") from None
    except MemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be read as an image ({reason}).") from None


def check_size(width, height, name):
    if width * height > MAX_PIXELS:
        complaint = f"above the limit of {MAX_PIXELS:,}"
    elif max(width, height) > MAX_ASPECT * min(width, height):
        complaint = f"a ratio above {MAX_ASPECT}"
    else:
        return
    raise ValueError(f"{name} has {width} x {height} pixels, {complaint}.")


def tone_range(image, name):
    """The values of black and white: 0 and 255, or of a 16-bit grey what its header says."""
    tags = getattr(image, "tag_v2", {})          # TIFF: 258 bits, 262 what 0 means, 339 number
    unsigned = tags.get(339, (1,))[0] in (1, 4)
    if unsigned and image.mode[0] not in "IF":
        return 0, 255
    grey16 = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    if not (unsigned and grey16 and image.format in (None, "PNG", "PPM", "JPEG2000", "TIFF")):
        raise ValueError(f"{name} has tones of mode {image.mode} and does not say which is white; "
                         "make it 8 or 16 bits.")
    white = 2 ** tags.get(258, (16,))[0] - 1
    return (white, 0) if tags.get(262) == 0 else (0, white)


def open_image(source, name=None):
    """A path or an open file, its header read and checked, nothing decoded."""
    name = name or (str(source) if isinstance(source, (str, Path)) else "the image")
    with reading(name):
        image = Image.open(source)
    check_size(*image.size, name)
    tone_range(image, name)
    return image


def upright_size(image, name):
    """(width, height) of what open_image gave, as read_image will turn it; nothing is decoded."""
    with reading(name):                          # not PNG's own getexif, which decodes
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"       # whose size is turned
    return image.size[::-1] if turned else image.size


def flattened(image, tones=None, on_white=True):
    """Any mode -> RGB; what is transparent is composited on white, or shows what lies under it.
    tones: tone_range() of the file, if `image` is a copy that has forgotten it."""
    black, white = tones or tone_range(image, "the image")
    if (black, white) != (0, 255):
        values, key = np.asarray(image).astype(np.int64), image.info.get("transparency")
        image = Image.fromarray(np.rint((values - black) * 255 / (white - black)).astype(np.uint8))
        if key is not None:                      # the one value that is transparent
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    if on_white and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def read_image(source, name=None, on_white=True):
    """A path, an open file or a PIL image -> RGB.

    Like transformers, turns a file upright by its EXIF orientation and takes a PIL image as it is.
    Of an animation the first frame counts."""
    is_file = not isinstance(source, Image.Image)
    image = open_image(source, name) if is_file else source
    name = name or (str(source) if isinstance(source, (str, Path)) else "the image")
    tones = tone_range(image, name)
    with reading(name):
        return flattened(ImageOps.exif_transpose(image) if is_file else image, tones, on_white)
