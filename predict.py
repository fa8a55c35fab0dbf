"""Read your own handwriting: digits in photos, scans and drawings.

python predict.py seven.jpg page.png
python predict.py --show page.png
python predict.py --checkpoint my_model.pth seven.jpg

A page is read from left to right, line by line. The percentage after the answer
is that of its least certain digit. If it is low, the answer is marked as not
sure.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor, nn

from mnist_cnn import CHECKPOINT, infer, load_model

Picture = str | Path | Image.Image | np.ndarray
Box = tuple[slice, slice]  # rows and columns
Piece = tuple[Box, np.ndarray]  # a box, and a mask of its pixels: (h, w) bool
NEIGHBOURS = np.ones((3, 3))

# A shorter side of 900 pixels or more is shrunk by a whole number, to 450 to 750; that
# of a JPEG, which is already shrunk while it is decoded, to 450 to 900. A pen's line of
# 0.4 mm on a page is still about one pixel wide then.
SIDE = 600
NOT_SURE = 0.97  # see RESULTS.md for how often an answer below it is wrong


def read_grey(picture: Picture) -> np.ndarray:
    """The picture as if on white paper: (H, W) float32 from 0 (black) to 1 (white).

    Raises OSError for a file that cannot be read, and TypeError for what is neither a
    file name, a PIL image nor a uint8 array (H, W), (H, W, 3) or, with opacity,
    (H, W, 4).
    """
    match picture:
        case str() | Path() | Image.Image():
            pass
        case np.ndarray(dtype=np.uint8, shape=(_, _) | (_, _, 3 | 4)):
            picture = Image.fromarray(picture)
        case _:
            raise TypeError(
                "a picture is a file name, a PIL image or a uint8 array (H, W), "
                "(H, W, 3) or (H, W, 4)"
            )
    try:
        if isinstance(picture, str | Path):
            picture = Image.open(picture)
            picture.draft("RGB", (SIDE, SIDE))  # decodes a large JPEG much faster
        picture = ImageOps.exif_transpose(picture)  # photos may lie on their side
        if picture.mode[0] == "I":  # 16 bits, of which convert would clip most
            picture = Image.fromarray(np.asarray(picture.convert("I")) // 256)
        picture = picture.convert("RGBA")
    except Exception as error:  # a damaged file can raise almost anything
        if getattr(error, "strerror", None):
            raise  # no such file, no permission: the message says so
        raise OSError(
            f"{error}; export it as a JPEG or PNG of less than 80 megapixels"
        ) from error
    shrink = max(1, round(min(picture.size) / SIDE))
    picture = picture.reduce(shrink)
    paper = Image.new("L", picture.size, "white")
    paper.paste(picture, mask=picture)
    return np.asarray(paper, np.float32) / 255


def find_pieces(dark: np.ndarray, glue: np.ndarray | bool = False) -> list[Piece]:
    """The pieces of dark pixels that touch, at a corner too, or are joined by glue.

    dark and glue: (H, W) bool.
    """
    numbers, _ = ndimage.label(dark | glue, NEIGHBOURS)
    numbers *= dark
    boxes = ndimage.find_objects(numbers)
    return [(box, numbers[box] == number) for number, box in enumerate(boxes, 1)]


def find_sheets(grey: np.ndarray) -> list[Piece]:
    """The sheets, cards or screens that are lighter than the table around them.

    In the negative of a picture, 1 - grey, these are the ones that are darker.
    """
    # This is slow, so it works on a smaller picture.
    picture = Image.fromarray(grey)
    shrink = 1 + min(grey.shape) // 50
    light = np.asarray(picture.reduce(shrink))
    # The table's brightness spreads from the edge of the picture, as far as the picture
    # is as bright: reconstruction by dilation (Vincent, 1993). The table is taken to be
    # at least as bright as the upper and lower edge are on average, because otherwise
    # the inside of a 0 would be a sheet.
    table = light.copy()
    table[1:-1, 1:-1] = light[[0, -1]].mean()
    previous = light
    while not np.array_equal(table, previous):
        previous = table
        table = np.minimum(ndimage.maximum_filter(table, 3), light)
    lighter = Image.fromarray(light - table > 0.15 * light).resize(picture.size)

    sheets = []
    for box, sheet in find_pieces(np.asarray(lighter)):
        height, width = sheet.shape
        is_large = sheet.size > 0.06 * grey.size
        # A square that is turned by 7 degrees fills 0.8 of its box. An ellipse, like a
        # pool of light or a bold 0, fills 0.785.
        is_solid = sheet.mean() > 0.79
        if is_large and is_solid and 0.4 < height / width < 2.5:
            sheet = ndimage.binary_fill_holes(sheet)  # the holes are the writing
            sheet = ndimage.binary_erosion(sheet, NEIGHBOURS, shrink)  # without its rim
            sheets.append((box, sheet))
    return sheets


def find_paper(grey: np.ndarray) -> np.ndarray:
    """The brightness that the paper has, or would have without the ink: (H, W)."""
    # The filters are slow, so they work on a smaller picture.
    picture = Image.fromarray(grey)
    small = np.asarray(picture.reduce(1 + min(grey.shape) // 75))
    # They remove dark things that are narrower than half of the picture. The picture is
    # continued beyond its edge, so what touches it counts as paper: a dark corner, the
    # table under the sheet. The minimum reaches one pixel farther, because the sheet's
    # outline is blurred here: the table beside it would look like ink.
    size = 1 + min(small.shape) // 4 * 2
    padded = np.pad(small, size, "edge")
    brightest = ndimage.maximum_filter(padded, size)
    paper = ndimage.minimum_filter(brightest, size + 2)
    paper = ImageOps.crop(Image.fromarray(paper), size)
    return np.asarray(paper.resize(picture.size, Image.Resampling.BILINEAR))


def find_lines(dark: np.ndarray) -> np.ndarray:
    """The lines of ruled paper, or of a single table or box: (H, W) bool.

    Such lines are about level or upright, thin, and most of the picture long, and there
    are two or more of them. Upright ones without level ones do not count, because they
    may be the strokes of 11. A stroke that crosses a line steeply is no part of it.
    """
    lines = np.zeros_like(dark)
    for ink, found in (dark, lines), (dark.T, lines.T):
        thick = 3 + min(ink.shape) // 25
        # A table's outer lines are the edge of the array: there is no ink beyond it.
        thin = ndimage.white_tophat(ink, (thick, 1), mode="constant")
        rows, columns = thin.nonzero()
        width = ink.shape[1]
        for slope in np.arange(-0.12, 0.12, 1 / width):  # up to 7 degrees
            line = (rows - slope * columns + width).astype(int)
            is_long = np.bincount(line) > 0.5 * width
            if is_long.any() and np.ptp(is_long.nonzero()) > 2 * thick:
                found[rows, columns] |= is_long[line]
        if not lines.any():
            break
    return lines


def erase_lines(ink: np.ndarray, threshold: float) -> np.ndarray:
    """The ink above the threshold, without ruled lines and frames: (H, W) bool.

    A frame encloses other ink, a tenth of its own or more. Of a table or a row of boxes
    only the lines are erased, because digits may touch them. What has no such lines,
    like a circle, is erased as a whole.
    """
    dark = ink > threshold
    clean = dark.copy()
    for box, piece in find_pieces(dark):
        filled = ndimage.binary_fill_holes(piece)
        if dark[box][filled].sum() > 1.1 * piece.sum():
            lines = find_lines(piece)
            clean[box] &= ~(lines if lines.any() else piece)
    # A line is often as faint as the threshold, and only parts of it would be found. So
    # the search is in fainter ink, without what was just erased.
    faint = ink > threshold / 1.5
    return clean & ~find_lines(faint ^ dark ^ clean)


def find_ink(grey: np.ndarray) -> np.ndarray:
    """How much the writing stands out from the paper: (H, W), up to about 1.

    It is 0 where nothing is written.
    """
    contrast = grey - ndimage.uniform_filter(grey, 1 + min(grey.shape) // 2)
    if (contrast * contrast**2).sum() > 0:  # contrast**3 would be slow
        grey = 1 - grey  # what stands out is lighter than the paper
    paper = find_paper(grey)
    ink = (paper - grey) / (paper + 0.02)
    ink = ndimage.gaussian_filter(ink, min(grey.shape) / SIDE)
    ink -= np.quantile(ink, 0.3)  # bare paper, even where most of it is covered
    # Ink is at least a quarter as dark as it usually is.
    faintest = ink[ink >= ink.max() / 2].mean() / 4
    # About the standard deviation of bare paper. With much ink it comes out too high.
    grain = 2.6 * np.quantile(abs(ink), 0.3)
    # Ink stands out from the grain, too.
    return ink * erase_lines(ink, max(faintest, 6 * grain))


def find_digits(dark: np.ndarray) -> list[Piece]:
    """The digits in reading order. Raises ValueError if there are none."""
    if not dark.any():
        raise ValueError("no writing was found, or it is too faint")
    # The height of each pixel's piece, and the longer side; 0 for the paper.
    height, size = np.zeros((2, *dark.shape))
    for box, piece in find_pieces(dark):
        height[box][piece] = len(piece)
        size[box][piece] = max(piece.shape)
    # A piece that does not touch the picture's edge is a hole in the paper.
    inside = ndimage.binary_fill_holes(~dark, NEIGHBOURS)

    # Half of the ink is in pieces of this size or less. Ink at the edge does not count,
    # nor do lines, which are four times as long as tall. But if there is hardly any
    # other ink, all of it counts.
    inner = size[dark & inside & (size < 4 * height)]
    tall = np.median(inner if inner.size > dark.sum() / 50 else size[dark])

    # Much smaller pieces are dirt. At the edge, a piece must be about as large as a
    # digit, or it is a shadow.
    dark = np.where(inside, size > 0.1 * tall, abs(size - tall) < 0.3 * tall)

    # A piece that is less tall than a digit belongs to what is very near to it.
    is_small = dark & (height < 0.6 * tall)
    near = ndimage.maximum_filter(is_small, 1 + int(tall / 8))
    digits = [
        (box, digit)
        for box, digit in find_pieces(dark, near)
        # Dots and dashes are less tall. What is four times as wide as tall is a line.
        if len(digit) >= max(8, tall / 3, digit.shape[1] / 4)
    ]
    if not digits:
        raise ValueError(
            "no digit was found, or it is too small: crop the picture, or enlarge a "
            "small one"
        )

    # A digit continues the first line whose last digit is at about the same level. So
    # lines may slant.
    sides = [(x.start, (y.start + y.stop) / 2) for (y, x), _ in digits]
    left, middle = np.transpose(sides)
    lines: list[list[int]] = []
    for digit in left.argsort(kind="stable"):  # the same on every CPU
        for line in lines:
            if abs(middle[line[-1]] - middle[digit]) < 0.7 * tall:
                line.append(digit)
                break
        else:
            lines.append([digit])
    lines.sort(key=lambda line: middle[line].mean())
    return [digits[number] for number in np.concatenate(lines)]


def like_mnist(ink: np.ndarray) -> Tensor:
    """The digit as an image like those of LeCun et al. (1998): (1, 28, 28) uint8.

    The ink fits into 20x20 pixels, and its centre of mass lies in the middle of 28x28.
    """
    side = max(ink.shape)
    square = Image.fromarray(ink).crop((0, 0, side, side))
    image = np.asarray(square.resize((20, 20))).clip(0)
    image = (image / image.max()) ** 0.6  # a thin stroke would be too faint
    y, x = ndimage.center_of_mass(image)
    frame = x - 14, y - 14, x + 14, y + 14
    pixels = 255 * np.asarray(Image.fromarray(image).crop(frame))
    return torch.from_numpy(pixels).round().byte()[None]


def read_page(picture: Picture) -> tuple[Tensor, list[Box]]:
    """The picture's N digits, from left to right, line by line, as MNIST's images.

    Returns the images (N, 1, 28, 28) uint8, and the box of each digit: its rows and
    columns in `read_grey(picture)`. A picture of 28x28 pixels, light on black as
    MNIST's, counts as one digit. Raises as `read_grey` does, and ValueError for a
    picture without a digit.
    """
    grey = read_grey(picture)
    if grey.shape == (28, 28) and grey.max() > 0.1 > np.median(grey):
        # Light ink on black, as MNIST has it. A JPEG's black is not quite black.
        ink = grey
        digits = find_pieces(ink > 0.1, glue=True)  # a single digit
    else:
        ink = np.zeros_like(grey)
        whole = np.s_[:, :], np.array(True)
        for box, sheet in find_sheets(grey) or find_sheets(1 - grey) or [whole]:
            ink[box] += find_ink(grey[box]) * sheet
        digits = find_digits(ink > 0)
    images = [like_mnist(ink[box] * digit) for box, digit in digits]
    return torch.stack(images), [box for box, _ in digits]


def predict_digits(
    model: nn.Module, pictures: list | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Read one digit from each of N pictures. For several, see `predict_page`.

    pictures: a list of what `read_grey` takes, or a uint8 array (N, 28, 28). Returns
    the digits (N,) int64 and the probabilities (N, 10). Raises as `read_page` does, and
    ValueError for several digits in a picture.
    """
    match pictures:
        case list() | np.ndarray(shape=(_, 28, 28)):
            pass
        case _:
            raise TypeError("pictures must be a list, or a uint8 array (N, 28, 28)")
    images = []
    for i, picture in enumerate(pictures):
        try:
            page, _ = read_page(picture)
        except ValueError as error:
            raise ValueError(f"pictures[{i}]: {error}") from error
        if len(page) > 1:
            raise ValueError(f"pictures[{i}] has several digits: use predict_page")
        images.append(page)
    if not images:
        raise ValueError("there are no pictures")
    probabilities = infer(model, torch.cat(images)).softmax(1)
    return probabilities.argmax(1), probabilities


def predict_page(
    model: nn.Module, picture: Picture
) -> tuple[Tensor, Tensor, list[Box]]:
    """Read the N digits of a picture from left to right, line by line.

    Returns the digits (N,) int64, the probabilities (N, 10), and the boxes that
    `read_page` finds. Raises as `read_page` does.
    """
    images, boxes = read_page(picture)
    probabilities = infer(model, images).softmax(1)
    return probabilities.argmax(1), probabilities, boxes


def save_answer(path: str, images: Tensor, boxes: list[Box], digits: list[int]) -> None:
    """Write seven_read.png for seven.jpg: the answers, and what the network sees."""
    from matplotlib.figure import Figure  # slow to import
    from torchvision.utils import make_grid

    figure = Figure(figsize=(8, 10), layout="constrained")
    page, seen = figure.subplots(2, height_ratios=(4, 1))
    page.imshow(read_grey(path), "gray")
    for digit, (y, x) in zip(digits, boxes, strict=True):
        columns = x.start, x.stop
        page.fill_between(columns, y.start, y.stop, facecolor="none", edgecolor="red")
        page.text(x.start, y.start, digit, color="red")
    seen.imshow(make_grid(images, nrow=20)[0], "gray")
    figure.savefig(f"{Path(path).with_suffix('')}_read.png")


def main() -> int:
    """Print one line per picture. Returns 2 if there was an error."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", nargs="+", help="photo, scan or drawing")
    parser.add_argument(
        "--checkpoint",
        default=Path(__file__).with_name(CHECKPOINT),
        help=f"weights file (default: {CHECKPOINT} beside this program)",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="draw what was read: seven_read.png for seven.jpg",
    )
    arguments = parser.parse_intermixed_args()
    try:
        model = load_model(arguments.checkpoint, device="cpu")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    status = 0
    for path in arguments.picture:
        try:
            images, boxes = read_page(path)
            certainty, digits = infer(model, images).softmax(1).max(1)
            least = certainty.min()
            doubt = " not sure:" if least < NOT_SURE else ""
            print(f"{path}:{doubt}", *digits.tolist(), f"({least:.1%} sure)")
            if arguments.show:
                save_answer(path, images, boxes, digits.tolist())
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names it cannot print
    sys.exit(main())
