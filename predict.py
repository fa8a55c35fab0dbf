"""Read your own handwriting: digits on photos, scans and drawings.

python predict.py seven.jpg page.png
python predict.py --checkpoint my_model.pth seven.jpg

A page is read from left to right, line by line. The percentage is that of its
least certain digit.
"""

import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor, nn

from mnist_cnn import CHECKPOINT, HyperParameters, infer, load_model

Picture = str | Path | Image.Image | np.ndarray
Box = tuple[slice, slice]  # rows and columns
SIDE = 200  # a large picture is shrunk to about as many pixels on its shorter side
NEIGHBOURS = np.ones((3, 3))


def read_grey(picture: Picture) -> Any:
    """The picture as if on white paper: (H, W) float32 from 0 (black) to 1 (white)."""
    if isinstance(picture, str | Path):
        try:
            picture = Image.open(picture)
            picture.draft("RGB", (SIDE, SIDE))  # decodes a large JPEG much faster
            picture.load()
        except (UnidentifiedImageError, SyntaxError) as error:  # both of them Pillow's
            raise OSError(f"{error}; export it as JPEG or PNG") from error
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise TypeError(f"an array must be uint8, not {picture.dtype}")
        picture = Image.fromarray(picture)
    picture = ImageOps.exif_transpose(picture)  # photos may lie on their side

    shrink = max(1, round(min(picture.size) / SIDE))
    if picture.mode[0] in "IF":  # one channel of more than 8 bits
        values = np.asarray(picture.convert("F").reduce(shrink))
        return values / max(255, values.max())
    rgba = np.asarray(picture.convert("RGBA").reduce(shrink), np.float32) / 255
    grey = rgba[..., :3].mean(axis=2)
    alpha = rgba[..., 3]
    return 1 - alpha * (1 - grey)


def separate_ink(grey: Any, wide: int) -> tuple[Any, Any]:
    """How much darker each pixel is than the paper around it, and which ones are ink.

    The threshold lies between the mean of the ink and the mean of the other pixels.
    Raises ValueError if there is no ink.
    """
    paper = ndimage.grey_closing(grey, wide)  # the strokes go, the shadows stay
    ink = 1 - (grey + 0.02) / (paper + 0.02)
    if ink.max() < 0.1:
        raise ValueError("nothing is written on it")
    threshold = ink.max() / 2
    for _ in range(20):
        dark = ink > threshold
        threshold = (ink[dark].mean() + ink[~dark].mean()) / 2
    return ink, ink > threshold


def erase_lines(mask: Any) -> Any:
    """Erase the lines of a form, if at least two of them cross the whole picture."""
    height, width = mask.shape
    across = ndimage.binary_opening(mask, np.ones((1, width // 2)))
    down = ndimage.binary_opening(mask, np.ones((height // 2, 1)))
    for lines in (across, down.T):
        labels, _ = ndimage.label(lines)
        whole = np.intersect1d(labels[:, 0], labels[:, -1])
        if np.count_nonzero(whole) >= 2:
            return mask & ~ndimage.binary_dilation(across | down, NEIGHBOURS)
    return mask


def find_ink(grey: Any) -> Any:
    """The ink of the digits, with paper and everything else at 0: (H, W).

    Raises ValueError if nothing is written there, or if it is too small.
    """
    wide = max(3, min(grey.shape) // 3)  # wider than a stroke of the pen
    contrast = grey - ndimage.uniform_filter(grey, wide)
    if (contrast**3).sum() > 0:  # what stands out is lighter than the paper
        grey = 1 - grey
    frame = np.ones(grey.shape, bool)
    frame[1:-1, 1:-1] = False
    ink, dark = separate_ink(grey, wide)
    if dark[frame].mean() > 0.5:  # then it is the paper that stands out
        grey = 1 - grey
        ink, dark = separate_ink(grey, wide)

    # Drop what touches the border (a table, a thumb, a form), unless little is left.
    pieces, _ = ndimage.label(erase_lines(dark), NEIGHBOURS)
    sizes = np.bincount(pieces.flat)
    sizes[0] = 0  # this is the paper
    inside = sizes.copy()
    inside[np.unique(pieces[frame])] = 0
    if inside.max() > sizes.max() / 50:
        sizes = inside
    if not sizes.any():
        raise ValueError("nothing is written on it")
    kept = sizes >= 0.1 * sizes.max()  # the others are dirt
    written = kept[pieces]
    (box,) = ndimage.find_objects(written.astype(int))
    height, width = written[box].shape
    if max(height, width) < 8:
        part = 100 * max(height, width) / min(grey.shape)
        raise ValueError(
            f"the digit is too small, {part:.0f}% of the picture's side; "
            "crop the picture around it"
        )

    is_filled = written[box].mean() > 0.7 and 0.5 < height / width < 2
    if is_filled and height * width < 0.9 * written.size:
        ink = np.zeros_like(ink)
        ink[box] = find_ink(grey[box])  # a dark box with a light digit in it
        return ink
    soft_edge = max(1, min(grey.shape) // 60)
    written = ndimage.binary_dilation(written, NEIGHBOURS, soft_edge)
    return np.where(written, ink, 0)


def find_digits(ink: Any) -> list[Box]:
    """The box of each digit, from left to right, line by line."""
    # Pieces above one another are one digit. A small piece joins what is beside it.
    written = ink > 0
    pieces, _ = ndimage.label(written, NEIGHBOURS)
    heights = [rows.stop - rows.start for rows, _ in ndimage.find_objects(pieces)]
    tall = max(heights)
    is_small = np.array([0, *heights]) < tall / 2
    small = written & is_small[pieces]
    near = ndimage.binary_dilation(written, np.ones((1 + tall // 4, 1)))
    near |= ndimage.binary_dilation(small, np.ones((1, 1 + tall // 2)))
    digits, _ = ndimage.label(near, NEIGHBOURS)
    boxes = ndimage.find_objects(digits * written)

    lines: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box[0].start + box[0].stop):
        middle = (box[0].start + box[0].stop) / 2
        if lines and middle < lines[-1][0][0].stop:
            lines[-1].append(box)
        else:
            lines.append([box])
    for line in lines:
        line.sort(key=lambda box: box[1].start)
    return [box for line in lines for box in line]


def like_mnist(ink: Any) -> Any:
    """The digit as LeCun et al. (1998) made them: (28, 28) from 0 to 1.

    The ink fits into 20x20 pixels, and its centre of mass lies in the middle of 28x28.
    """
    (box,) = ndimage.find_objects((ink > 0).astype(int))
    ink = ink[box]
    scale = 20 / max(ink.shape)
    height, width = [max(1, round(scale * side)) for side in ink.shape]
    small = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
    ink = np.asarray(small).clip(0)
    ink = np.pad(ink / ink.max(), [(0, 28 - height), (0, 28 - width)])
    to_middle = np.subtract(14, ndimage.center_of_mass(ink))
    return ndimage.shift(ink, np.round(to_middle), order=0)


def read_digit(picture: Picture) -> Tensor:
    """The picture's digit in the form of MNIST's images: (1, 28, 28) uint8.

    A picture of that form stays as it is. Raises OSError for a file that is no picture
    and ValueError for a picture without a digit, and warns of several digits.
    """
    grey = read_grey(picture)
    corners = grey[::27, ::27]
    if grey.shape != (28, 28) or corners.any() or not grey.any():
        ink = find_ink(grey)
        if len(find_digits(ink)) > 1:
            warnings.warn("several digits: use predict_page for them", stacklevel=3)
        grey = like_mnist(ink)
    return torch.from_numpy(255 * grey).round().byte().unsqueeze(0)


def read_page(picture: Picture) -> tuple[Tensor, list[Box]]:
    """The picture's N digits, from left to right, line by line, as MNIST's images.

    Returns the images (N, 1, 28, 28) uint8, and the box of each digit: its rows and
    columns in `read_grey(picture)`. Raises as `read_digit` does.
    """
    ink = find_ink(read_grey(picture))
    boxes = find_digits(ink)
    digits = np.stack([like_mnist(ink[box]) for box in boxes])
    return torch.from_numpy(255 * digits).round().byte().unsqueeze(1), boxes


def predict_digits(model: nn.Module, pictures: Any) -> tuple[Tensor, Tensor]:
    """Read one digit from each of N pictures. For several, see `predict_page`.

    pictures: a list of paths, PIL images, or uint8 arrays (H, W) or (H, W, 3); or a
    uint8 array (N, 28, 28). Returns the digits (N,) int64 and the probabilities
    (N, 10). Raises OSError or ValueError as `read_digit` does.
    """
    is_batch = isinstance(pictures, np.ndarray) and pictures.shape[1:] == (28, 28)
    if not is_batch and not isinstance(pictures, list):
        raise TypeError("pictures must be a list, or a uint8 array (N, 28, 28)")
    images = torch.stack(list(map(read_digit, pictures)))
    probabilities = infer(model, images).softmax(1)
    return probabilities.argmax(1), probabilities


def predict_page(
    model: nn.Module, picture: Picture
) -> tuple[Tensor, Tensor, list[Box]]:
    """Read the N digits of a picture from left to right, line by line.

    Returns the digits (N,) int64, the probabilities (N, 10), and the boxes that
    `read_page` finds. Raises as `read_digit` does.
    """
    images, boxes = read_page(picture)
    probabilities = infer(model, images).softmax(1)
    return probabilities.argmax(1), probabilities, boxes


def main() -> int:
    """Print one line per picture. Returns 2 if one of them cannot be read."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="photo, scan or drawing"
    )
    shipped = Path(__file__).with_name(CHECKPOINT)
    parser.add_argument(
        "--checkpoint", default=shipped, metavar="FILE", help="file of the weights"
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
            digits, probabilities, _ = predict_page(model, path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            print(f"error: {path}: {reason}", file=sys.stderr)
            status = 2
            continue
        answer = " ".join(map(str, digits.tolist()))
        least = probabilities.max(1).values.min()
        print(f"{path}: {answer} ({100 * least:.1f}% sure)")
    return status


if __name__ == "__main__":
    sys.exit(main())
