"""A picture of one digit, from anywhere, in the form of MNIST's images; digits drawn in a font."""

import os
import random
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage
from torch import Tensor

PATH = (str, os.PathLike)
SIDE = 200  # pixels: a file is shrunk to about this along its shorter side


def read_grey(picture: Any) -> np.ndarray:
    """(H, W) in 0..1 of a path, an open file, a PIL image, an array or a tensor.

    Arrays are (H, W), or have 1, 3 or 4 channels, first or last; in 0..1, 0..255, or from 0 up.
    OSError, ValueError: it is missing, not a picture, or has another shape or other values.
    """
    if isinstance(picture, PATH) or hasattr(picture, "read"):
        picture = Image.open(picture)
    if isinstance(picture, Image.Image):
        picture.draft("L", (SIDE, SIDE))  # a large JPEG is decoded at an eighth of its size
        picture = ImageOps.exif_transpose(picture)  # photos may lie on their side
        if picture.mode[0] not in "IF":  # those have no colour, but more than 8 bits
            picture = picture.convert("RGBA").reduce(max(1, round(min(picture.size) / SIDE)))
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().float()
    values = np.atleast_3d(np.asarray(picture, np.float32))
    values = np.moveaxis(values, 0 if values.shape[2] > 4 else 2, 2)
    low, high = values.min(), values.max()
    if values.shape[2:] not in ((1,), (3,), (4,)) or not 0 <= low <= high < np.inf:
        raise ValueError(f"shape {tuple(np.shape(picture))}, values {low} to {high}: not a picture")
    values = values / (max(high, 255) if high > 1 else 1)
    return 1 - values[..., 3:].min(2, initial=1) * (1 - values[..., :3].mean(2))  # on white paper


def find_ink(grey: np.ndarray, name: object) -> np.ndarray:
    """(H, W) in 0..1, dark on light or light on dark, to ink on paper of 0, cropped to the digit.

    ValueError: nothing is written on it, or too small to tell. Warns of several digits.
    """
    grey = ndimage.gaussian_filter(grey, min(grey.shape) / SIDE)  # noise, thin lines
    wide = max(3, min(grey.shape) // 3)  # wider than a stroke
    if ((grey - ndimage.uniform_filter(grey, wide)) ** 3).sum() > 0:  # few pixels stand out: ink
        grey = 1 - grey
    ink = 1 - (grey + 0.02) / (ndimage.grey_closing(grey, wide) + 0.02)  # of paper, also in shadow
    if (half := ink.max() / 2) < 0.05:
        raise ValueError("blank: nothing is written on it")
    labels, _ = ndimage.label(ink > half, np.ones((3, 3)))
    sizes = np.append(0.0, np.bincount(labels.flat)[1:])
    sizes[np.unique([*labels[[0, -1]].flat, *labels[:, [0, -1]].flat])] /= 50  # a table, a finger
    digit = (sizes >= 0.1 * sizes.max())[labels]  # the rest is dirt
    ink = ink[ndimage.find_objects(digit.astype(int))[0]]
    if max(ink.shape) < 8:
        raise ValueError(f"too small: its ink is {ink.shape[1]}x{ink.shape[0]} pixels")
    boxes = ndimage.find_objects(ndimage.label(digit.any(axis=0))[0] * digit)
    if (count := sum(2 * (rows.stop - rows.start) > len(ink) for rows, _ in boxes)) > 1:
        warnings.warn(f"{name}: {count} digits side by side are read as one", stacklevel=2)
    return ink


def like_mnist(grey: np.ndarray, name: object) -> Tensor:
    """(H, W) in 0..1 to (1, 28, 28) uint8, made as MNIST was (LeCun et al., 1998).

    The ink fits into 20x20 pixels, and its centre of mass lies in the middle of 28x28. What is
    28x28 with black corners is MNIST's, and stays as it is. ValueError, warning: see find_ink.
    """
    if grey.shape != (28, 28) or grey[::27, ::27].any() or not grey.any():
        ink = find_ink(grey, name)
        size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
        ink = np.asarray(Image.fromarray(ink).resize(size[::-1], Image.Resampling.BICUBIC)).clip(0)
        ink = np.pad(ink / ink.max(), [(0, 28 - side) for side in size])
        grey = ndimage.shift(ink, np.round(np.subtract(14, ndimage.center_of_mass(ink))), order=0)
    return torch.from_numpy(255 * grey).round().byte()[None]


def read_digits(pictures: Any) -> Tensor:
    """(N, 1, 28, 28) uint8 of a list of pictures, a batch as an array or tensor, or one picture.

    OSError, ValueError: see read_grey and find_ink; a picture without a name has its number.
    """
    if isinstance(pictures, (*PATH, Image.Image)) or getattr(pictures, "ndim", 0) == 2:
        pictures = [pictures]
    images = [torch.empty(0, 1, 28, 28, dtype=torch.uint8)]
    for number, picture in enumerate(pictures):
        name = picture if isinstance(picture, PATH) else getattr(picture, "name", None)
        name = name or f"picture {number}"
        try:
            images.append(like_mnist(read_grey(picture), name)[None])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    return torch.cat(images)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 of digits in a font, turned at random, and labels (N,) int64."""
    chance = random.Random(seed)
    fonts = [ImageFont.load_default(size) for size in range(18, 27)]
    images, labels = [], chance.choices(range(10), k=count)
    for label in labels:
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text((14, 14), str(label), 255, chance.choice(fonts), "mm")
        images.append(np.asarray(canvas.rotate(chance.uniform(-15, 15), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(images)).unsqueeze(1), torch.tensor(labels)
