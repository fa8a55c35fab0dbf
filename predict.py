"""Read your own handwriting: one digit per picture, from a photo, a scan or a drawing.

python predict.py seven.jpg scan.png
python predict.py --checkpoint my_model.pth seven.jpg
"""

import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor, nn

from mnist_cnn import CHECKPOINT, HyperParameters, infer, load_model

Picture = str | Path | Image.Image | np.ndarray
SIDE = 200  # pixels along the shorter side of a picture, after it is shrunk


def read_grey(picture: Picture) -> Any:
    """The picture as if on white paper: (H, W) float32 from 0 (black) to 1 (white)."""
    if isinstance(picture, str | Path):
        picture = Image.open(picture)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.draft("L", (SIDE, SIDE))  # decodes a large JPEG at a fraction of its size
    picture = ImageOps.exif_transpose(picture)  # photos may lie on their side

    if picture.mode[0] in "IF":  # one channel of more than 8 bits
        values = np.asarray(picture, np.float32)
        return values / max(255, values.max())
    shrink = max(1, round(min(picture.size) / SIDE))
    picture = picture.convert("RGBA").reduce(shrink)
    rgba = np.asarray(picture, np.float32) / 255
    grey = rgba[..., :3].mean(axis=2)
    alpha = rgba[..., 3]
    return 1 - alpha * (1 - grey)


def find_ink(grey: Any) -> Any:
    """Crop to the digit, with paper at 0. Warns of several digits side by side.

    Raises ValueError if nothing is written there, or if the digit is too small.
    """
    grey = ndimage.gaussian_filter(grey, min(grey.shape) / SIDE)
    wide = max(3, min(grey.shape) // 3)  # wider than a stroke of the pen
    contrast = grey - ndimage.uniform_filter(grey, wide)
    if (contrast**3).sum() > 0:  # what stands out is lighter than the paper
        grey = 1 - grey
    paper = ndimage.grey_closing(grey, wide)  # the strokes go, the shadows stay
    ink = 1 - (grey + 0.02) / (paper + 0.02)
    threshold = ink.max() / 2
    if threshold < 0.05:
        raise ValueError("nothing is written on it")

    # Keep the large pieces. One that touches the border is rather a table or a thumb.
    pieces, _ = ndimage.label(ink > threshold, np.ones((3, 3)))
    sizes = np.bincount(pieces.flat).astype(float)
    sizes[0] = 0  # this is the paper
    rows_on_border = pieces[[0, -1]]
    columns_on_border = pieces[:, [0, -1]]
    on_border = np.union1d(rows_on_border, columns_on_border)
    sizes[on_border] /= 50
    kept = sizes >= 0.1 * sizes.max()
    digit = kept[pieces]
    (box,) = ndimage.find_objects(digit.astype(int))
    ink = ink[box]
    height, width = ink.shape
    if max(height, width) < 8:
        raise ValueError(f"the digit is too small: {width} x {height} pixels")

    columns, _ = ndimage.label(digit.any(axis=0))
    side_by_side = 0
    for rows, _ in ndimage.find_objects(columns * digit):
        if rows.stop - rows.start > height / 2:
            side_by_side += 1
    if side_by_side > 1:
        warnings.warn(f"{side_by_side} digits are read as one", stacklevel=2)
    return ink


def read_digit(picture: Picture) -> Tensor:
    """The picture's digit in the form of MNIST's images: (1, 28, 28) uint8.

    It is made as LeCun et al. (1998) made them: the ink fits into 20x20 pixels, and its
    centre of mass lies in the middle of 28x28. A picture of that form stays as it is.

    Raises OSError for a file that is no picture and ValueError for one without a digit.
    """
    grey = read_grey(picture)
    corners = grey[::27, ::27]
    if grey.shape != (28, 28) or corners.any() or not grey.any():
        ink = find_ink(grey)
        scale = 20 / max(ink.shape)
        height, width = [max(1, round(scale * side)) for side in ink.shape]
        small = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
        ink = np.asarray(small).clip(0)
        ink = np.pad(ink / ink.max(), [(0, 28 - height), (0, 28 - width)])
        to_middle = np.subtract(14, ndimage.center_of_mass(ink))
        grey = ndimage.shift(ink, np.round(to_middle), order=0)
    return torch.from_numpy(255 * grey).round().byte().unsqueeze(0)


def predict_digits(
    model: nn.Module, pictures: Sequence[Picture]
) -> tuple[Tensor, Tensor]:
    """Read one digit from each of N pictures: paths, PIL images or uint8 arrays.

    An array is (H, W), or (H, W, 3) in colour. Returns the digits (N,) int64 and the
    probabilities (N, 10). Raises OSError or ValueError as `read_digit` does.
    """
    images = torch.stack([read_digit(picture) for picture in pictures])
    probabilities = infer(model, images).softmax(1)
    return probabilities.argmax(1), probabilities


def main() -> int:
    """Print one line per picture. Returns 2 if one of them cannot be read."""
    parser = ArgumentParser(
        usage="python predict.py [--checkpoint FILE] PICTURE...",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE",
        help="file that shows one digit, dark on light or light on dark",
    )
    parser.add_argument(
        "--checkpoint",
        default=CHECKPOINT,
        metavar="FILE",
        help="file of the weights (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        model = load_model(arguments.checkpoint, HyperParameters())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    status = 0
    for path in arguments.pictures:
        try:
            with warnings.catch_warnings(record=True) as caught:
                _, (probabilities,) = predict_digits(model, [path])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            print(f"error: {path}: {reason}", file=sys.stderr)
            status = 2
            continue
        for warning in caught:
            print(f"warning: {path}: {warning.message}", file=sys.stderr)
        (best, second), (digit, other) = probabilities.topk(2)
        print(f"{path}: {digit} ({100 * best:.1f}%), or {other} ({100 * second:.1f}%)")
    return status


if __name__ == "__main__":
    sys.exit(main())
