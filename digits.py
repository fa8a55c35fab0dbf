"""A picture of one digit, from anywhere, in the form of MNIST's images; digits drawn in fonts."""

import functools
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 50_000_000  # larger pictures would take gigabytes to decode


def read_brightness(picture: Any) -> Tensor:
    """(H, W) float32 in 0..1 of a path, an open file, a PIL image, an array or a tensor.

    Arrays and tensors are (H, W), or have 1, 3 or 4 channels, first or last; their values are in
    0..1 or 0..255, or integers from 0 up. Transparent places become paper.

    Raises:
        OSError: the file is missing, or is no picture.
        ValueError: the picture is too large, or has another shape, or has NaN or negative values.
    """
    if isinstance(picture, (str, os.PathLike)) or hasattr(picture, "read"):
        try:
            picture = Image.open(picture)
        except Image.DecompressionBombError as error:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels") from error
        except UnidentifiedImageError as error:
            raise ValueError("not a picture") from error
    if isinstance(picture, Image.Image):
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels: {picture.width}x{picture.height}")
        picture = ImageOps.exif_transpose(picture)  # photos may lie on their side
        if not picture.mode.startswith(("I", "F")):  # those have no colour, but more than 8 bits
            picture = picture.convert("RGBA")
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().float()
    values = torch.from_numpy(np.asarray(picture).astype(np.float32))
    if values.ndim == 2:
        values = values.unsqueeze(-1)
    elif values.ndim == 3 and values.shape[-1] not in (1, 3, 4):
        values = values.movedim(0, -1)
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4) or values.numel() == 0:
        raise ValueError(
            f"shape {tuple(np.shape(picture))}, where one picture is (H, W) or (H, W, 3)"
        )
    if not values.isfinite().all() or values.min() < 0:
        raise ValueError("has NaN, infinite or negative values")
    if values.max() > 1:
        values = values / max(255.0, values.max().item())
    if values.shape[-1] == 1:
        return values.squeeze(-1)
    grey = values[..., :3] @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    if values.shape[-1] == 3:
        return grey
    alpha = values[..., 3]
    paper = 1.0 if (grey * alpha).sum() < 0.5 * alpha.sum() else 0.0  # dark ink is on light paper
    return grey * alpha + paper * (1 - alpha)


def resized(image: Tensor, longest: int) -> Tensor:
    """(H, W), antialiased, to this many pixels along its longest side."""
    height, width = (max(1, round(side * longest / max(image.shape))) for side in image.shape)
    size = (height, width)
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def dilated(image: Tensor, pixels: int) -> Tensor:
    """(H, W): each pixel becomes the brightest of those so far around it."""
    return F.max_pool2d(image[None, None], 2 * pixels + 1, stride=1, padding=pixels)[0, 0]


def cropped(image: Tensor, ink: Tensor) -> Tensor:
    """(H, W) to the rows and columns that have ink."""
    (top, *_, bottom), (left, *_, right) = (
        2 * ink.any(axis).nonzero().flatten().tolist() for axis in (1, 0)
    )
    return image[top : bottom + 1, left : right + 1]


def find_ink(brightness: Tensor) -> Tensor:
    """(H, W) of any size, dark on light or light on dark, to ink in 0..1 on paper of 0, cropped.

    Raises:
        ValueError: nothing is written on it, or too small to tell.
    """
    if brightness.numel() > 192**2:
        shrink = 192 / brightness.numel() ** 0.5  # of the area: a digit on a long strip stays
        brightness = resized(brightness, round(shrink * max(brightness.shape)))
    # The light falls smoothly: a quadratic surface, fitted to the half that it fits best, is the
    # paper (least trimmed squares; Rousseeuw, 1984).
    y, x = torch.meshgrid(
        *(torch.linspace(-1, 1, side) for side in brightness.shape), indexing="ij"
    )
    surface = torch.stack([x**0, x, y, x * x, x * y, y * y], dim=-1)
    difference = brightness - brightness.median()
    for _ in range(10):
        paper = difference.abs() <= difference.abs().median()
        fit = torch.linalg.lstsq(surface[paper], brightness[paper].unsqueeze(1), driver="gelsd")
        difference = brightness - (surface @ fit.solution).squeeze(-1)
    ink = (difference if difference.pow(3).sum() > 0 else -difference).clamp(min=0)

    # Otsu's threshold (1979): the one that splits the pixels into the most distant two classes.
    levels = torch.linspace(0.02, 0.98, 49) * ink.max()
    above = (ink.flatten() > levels.unsqueeze(1)).float()
    shares = above.mean(1)
    high = (above * ink.flatten()).mean(1) / shares
    low = ((1 - above) * ink.flatten()).mean(1) / (1 - shares)
    best = (shares * (1 - shares) * (high - low) ** 2).nan_to_num().argmax()
    if not high[best] > 0.1:  # less contrast than a faint pencil's
        raise ValueError("blank: nothing is written on it")
    half = levels[best] / 2
    ink = ((ink - half) / (high[best] - half)).clamp(0, 1)

    # Connected parts, by spreading the largest label; what is small beside the largest is dirt.
    stroke = ink > 0.5
    spread = torch.arange(1.0, ink.numel() + 1).view(ink.shape) * stroke
    labels = torch.zeros_like(spread)
    while not torch.equal(labels, spread):
        labels, spread = spread, dilated(spread, 2) * stroke  # 2: over a gap of one pixel
    sizes = labels.long().flatten().bincount()
    sizes[0] = 0
    kept = (sizes >= 0.1 * sizes.max())[labels.long()]
    ink = cropped(ink * dilated(kept.float(), 1), kept)
    if max(ink.shape) < 8:
        raise ValueError(f"too small: its ink is {ink.shape[1]}x{ink.shape[0]} pixels")
    return ink


def like_mnist(brightness: Tensor) -> Tensor:
    """(H, W) in 0..1 to (1, 28, 28) uint8, made as MNIST was (LeCun et al., 1998).

    The ink fits into 20x20 pixels, with its centre of mass in the middle of 28x28. An image that
    is so already stays as it is.

    Raises:
        ValueError: nothing is written on it.
    """

    def centre(ink: Tensor) -> list[float]:
        return [
            ((ink.sum(1 - axis) * torch.arange(ink.shape[axis])).sum() / ink.sum()).item()
            for axis in (0, 1)
        ]

    if brightness.shape == (28, 28) and brightness.any():
        fits = max(cropped(brightness, brightness > 0).shape) in (19, 20)
        if fits and all(abs(middle - 14) < 0.55 for middle in centre(brightness)):
            return (brightness * 255).round().byte().unsqueeze(0)

    # Four dots a pixel. MNIST's strokes are mostly 1.4 to 2.7 pixels thick: others are made so.
    ink = F.pad(resized(find_ink(brightness), 80), [16] * 4)
    stroke = (ink > 0.5).float()
    outline = stroke.diff(dim=0).abs().sum() + stroke.diff(dim=1).abs().sum()
    thickness = (2 * stroke.sum() / outline).item() / 4
    grow = round(2 * (min(max(thickness, 1.4), 2.7) - thickness))
    ink = dilated(ink, grow) if grow >= 0 else -dilated(-ink, min(-grow, 2))

    ink = resized(cropped(ink, ink > 0.2), 20)
    top, left = (
        min(max(round(14 - middle), 0), 28 - side)
        for middle, side in zip(centre(ink), ink.shape, strict=True)
    )
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, top : top + ink.shape[0], left : left + ink.shape[1]] = (255 * ink / ink.max()).round()
    return image


def read_digit(picture: Any, name: object) -> Tensor:
    """(1, 1, 28, 28) uint8 of a picture.

    Raises:
        OSError, ValueError: see read_brightness and like_mnist; the message begins with the name.
    """
    try:
        return like_mnist(read_brightness(picture)).unsqueeze(0)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def read_digits(pictures: Any) -> Tensor:
    """(N, 1, 28, 28) uint8 of a list of pictures, a batch as an array or tensor, or one picture.

    Raises:
        OSError, ValueError: see read_digit; a picture without a file name is named by its number.
    """
    if isinstance(pictures, (str, os.PathLike, Image.Image)) or getattr(pictures, "ndim", 0) == 2:
        pictures = [pictures]
    images = [torch.empty(0, 1, 28, 28, dtype=torch.uint8)]
    for number, picture in enumerate(pictures):
        named = isinstance(picture, (str, os.PathLike))
        images.append(read_digit(picture, picture if named else f"picture {number}"))
    return torch.cat(images)


@functools.cache
def fonts() -> list[Image.Image]:
    """0 to 9 in each of matplotlib's fonts that has them."""
    drawn = []
    for file in sorted(Path(get_data_path(), "fonts", "ttf").glob("[DSc]*.ttf")):
        if not re.search("Display|STIXNonUni|STIXSiz|cmex|cmmi|cmsy", file.name):
            font = ImageFont.truetype(file, 80)
            for digit in "0123456789":
                image = Image.new("L", (100, 100))
                ImageDraw.Draw(image).text((50, 50), digit, 255, font, anchor="mm")
                drawn.append(Image.fromarray(like_mnist(read_brightness(image))[0].numpy()))
    return drawn


@functools.cache
def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8, turned and shifted at random, and labels (N,) int64."""
    chance = random.Random(seed)
    images, labels = [], []
    for _ in range(count):
        number = chance.randrange(len(fonts()))
        angle, shift = chance.uniform(-15, 15), (chance.randint(-2, 2), chance.randint(-2, 2))
        turned = fonts()[number].rotate(angle, Image.Resampling.BILINEAR, translate=shift)
        images.append(np.asarray(turned))
        labels.append(number % 10)
    return torch.from_numpy(np.stack(images)).unsqueeze(1), torch.tensor(labels)
