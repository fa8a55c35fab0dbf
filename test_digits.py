"""Tests of digits.py, and of the shipped model on pictures of digits."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor, nn

import digits
import mnist_cnn
from mnist_cnn import HyperParameters
from test_mnist_model import CHECKPOINT, mnist


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return mnist_cnn.load_checkpoint(CHECKPOINT, HyperParameters())


@pytest.fixture(scope="module")
def test_images() -> mnist_cnn.Split:
    return mnist_cnn.load_images(mnist(), train=False)


@pytest.fixture(scope="module")
def some_digits(test_images: mnist_cnn.Split) -> mnist_cnn.Split:
    images, labels = test_images
    return images[:30], labels[:30]


def test_mnist_itself_passes_through_unchanged(test_images: mnist_cnn.Split) -> None:
    images = test_images[0][::5]
    assert torch.equal(digits.read_digits(images), images)


def enlarged(image: Tensor, scale: int, margins: list[int]) -> Tensor:
    """(1, 28, 28) uint8 to a larger picture in 0..1, dark on light."""
    return (
        1 - F.pad(F.interpolate(image[None] / 255, scale_factor=scale, mode="bilinear"), margins)[0]
    )


def scan(image: Tensor) -> Tensor:
    return enlarged(image, 7, [3, 90, 40, 11])


def scanned(image: Tensor) -> Any:
    """As PIL takes it: (H, W) uint8."""
    return (255 * scan(image)[0]).byte().numpy()


def photo(image: Tensor) -> Tensor:
    """Light from one side, noise, and a coloured pen."""
    picture = enlarged(image, 5, [80, 20, 9, 60]).clamp(min=0.4)
    light = torch.linspace(0.5, 1, picture.shape[-1])
    noise = 0.02 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    return ((picture * light + noise) * torch.tensor([0.8, 0.9, 1.0]).view(3, 1, 1)).clamp(0, 1)


def blackboard(image: Tensor) -> Tensor:
    return 0.2 + 0.5 * (1 - scan(image))


def thin_pen(image: Tensor) -> Tensor:
    return digits.dilated(enlarged(image, 8, [50] * 4)[0], 4)


def thick_pen(image: Tensor) -> Tensor:
    return -digits.dilated(-enlarged(image, 8, [50] * 4)[0], 5)


def dotted(image: Tensor) -> Tensor:
    """Black and white, a block of 4x4 pixels for each of MNIST's."""
    return 1 - F.pad(image.gt(127).float().repeat_interleave(4, 1).repeat_interleave(4, 2), [9] * 4)


@pytest.mark.parametrize("picture", [scan, photo, blackboard, thin_pen, thick_pen, dotted])
def test_digits_are_recognized_however_they_come(
    picture: Callable[[Tensor], Tensor], shipped: nn.Module, some_digits: mnist_cnn.Split
) -> None:
    images, labels = some_digits
    guesses, probabilities = mnist_cnn.predict_digits(shipped, [picture(image) for image in images])
    assert probabilities.shape == (30, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(30))
    assert (guesses != labels).sum() <= 1


def test_every_kind_of_picture_gives_the_same(
    shipped: nn.Module, some_digits: mnist_cnn.Split, tmp_path: Path
) -> None:
    (image, *_), labels = some_digits
    grey = scanned(image)
    transparent = np.zeros((*grey.shape, 4), dtype=np.uint8)
    transparent[..., 3] = 255 - grey  # black ink, no paper
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(transparent).save(tmp_path / "transparent.png")
    Image.fromarray(255 - transparent[..., [3, 3, 3]]).save(tmp_path / "colour.jpg", quality=90)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen_bits.png")
    turned = Image.fromarray(grey).rotate(90, expand=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pictures = [
        *sorted(tmp_path.iterdir()),
        str(tmp_path / "grey.png"),
        Image.fromarray(grey),
        grey,
        grey / 255,
        grey.astype(np.int64),
        grey > 127,
        grey[..., None],
        np.stack([grey] * 3),
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None] / 255,
        image,
    ]
    guesses, probabilities = mnist_cnn.predict_digits(shipped, pictures)
    assert guesses.tolist() == [labels[0].item()] * len(pictures)
    assert probabilities.max(1).values.min() > 0.9


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [
        (torch.ones(28, 28), "picture 1: blank"),
        (torch.zeros(1, 28, 28, dtype=torch.uint8), "picture 1: blank"),
        (torch.full((40, 60), 0.9) + 0.01 * torch.rand(40, 60), "picture 1: blank"),
        (torch.full((9, 9), math.nan), "picture 1: has NaN"),
        (torch.randn(28, 28), "picture 1: has NaN, infinite or negative"),
        (torch.rand(2, 3, 28, 28), r"picture 1: shape .*\(2, 3, 28, 28\)"),
        (torch.rand(0, 28), r"picture 1: shape "),
        ("nothing.png", "nothing.png: .*No such file"),
    ],
)
def test_what_is_no_digit_is_named(
    picture: object, complaint: str, shipped: nn.Module, some_digits: mnist_cnn.Split
) -> None:
    with pytest.raises((OSError, ValueError), match=complaint):
        mnist_cnn.predict_digits(shipped, [some_digits[0][0], picture])


def test_predict_classifies_the_good_files_and_names_the_others(
    some_digits: mnist_cnn.Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, labels = some_digits
    for number in (0, 1):
        Image.fromarray(scanned(images[number])).save(tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("1", (8_000, 7_000)).save(tmp_path / "huge.png")
    names = ["0.png", "text.png", "missing.png", "huge.png", ".", "1.png"]
    paths = [str(tmp_path / name) for name in names]
    arguments = ["predict", "--checkpoint", str(CHECKPOINT)]
    assert mnist_cnn.main([*arguments, *paths]) == 2
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    for line, path, label in zip(lines, (paths[0], paths[-1]), labels[:2], strict=True):
        assert re.fullmatch(rf"{path}: {label} \(\d+\.\d%\), or \d \(\d+\.\d%\)", line)
    assert [
        line.startswith(f"error: {path}: ")
        for line, path in zip(errors.splitlines(), paths[1:-1], strict=True)
    ] == [True] * 4

    with open(paths[0], "rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        assert mnist_cnn.main([*arguments, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["file"], result["digit"]) == ("-", labels[0])
    assert sum(result["probabilities"]) == pytest.approx(1)


def test_synthetic_digits_are_like_mnist(shipped: nn.Module) -> None:
    images, labels = digits.draw_digits(2_000, seed=0)
    assert (images.shape, images.dtype) == ((2_000, 1, 28, 28), torch.uint8)
    assert labels.bincount().min() > 150
    assert mnist_cnn.evaluate_model(shipped, images, labels)[1] > 80  # has never seen a font
