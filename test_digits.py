"""Tests of digits.py, and of the shipped model on pictures of digits."""

import functools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from scipy import ndimage
from torch import Tensor

import benchmark
import digits
import mnist_cnn
from mnist_cnn import HyperParameters
from test_mnist_model import CHECKPOINT, MODULE, PIPES, mnist


@pytest.fixture(scope="module")
def shipped():
    return mnist_cnn.load_checkpoint(CHECKPOINT, HyperParameters())


@pytest.fixture(scope="module")
def some_digits():
    images, labels = mnist_cnn.load_images(mnist(), train=False)
    return images[:20], labels[:20]


def test_mnist_itself_passes_through_unchanged():
    images, _ = mnist_cnn.load_images(mnist(), train=False)
    assert torch.equal(digits.read_digits(images), images)


def scan(image: Tensor) -> Tensor:
    """(1, 28, 28) uint8 to a larger picture in 0..1, dark on light."""
    large = F.interpolate(image[None] / 255, scale_factor=7, mode="bilinear")
    return 1 - F.pad(large, [3, 90, 40, 11])[0]


def scanned(image: Tensor) -> Any:
    """As PIL takes it: (H, W) uint8."""
    return (255 * scan(image)[0]).byte().numpy()


KINDS = {kind: functools.partial(benchmark.photograph, kind=kind) for kind in benchmark.KINDS}
KINDS |= {
    "dots": lambda image, chance: 1 - np.pad(np.kron(image > 127, np.ones((4, 4))), 9),
    "thin pen": lambda image, chance: ndimage.grey_dilation(scanned(image[None]), 6),
    "thick pen": lambda image, chance: ndimage.grey_erosion(scanned(image[None]), 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_recognized_however_they_come(kind, shipped, some_digits):
    images, labels = some_digits
    chance = np.random.default_rng(0)
    pictures = [KINDS[kind](image[0], chance=chance) for image in images]
    guesses, probabilities = mnist_cnn.predict_digits(shipped, pictures)
    assert probabilities.shape == (20, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20))
    assert (guesses != labels).sum() <= 1


def test_several_digits_side_by_side_are_counted(some_digits):
    numbers = dict(zip(some_digits[1].tolist(), map(scan, some_digits[0]), strict=True))
    pair, three = (torch.cat([numbers[n] for n in row], 2) for row in ((1, 0), (7, 4, 1)))
    broken = numbers[0].index_fill(1, torch.arange(100, 110), 1)  # an upper and a lower part
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        digits.read_digits([pair, three, broken, *numbers.values()])
    expected = ["picture 0: 2 digits side by side", "picture 1: 3 digits side by side"]
    assert [str(warning.message)[:32] for warning in caught] == expected


def test_every_kind_of_picture_gives_the_same(shipped, some_digits, tmp_path):
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
        grey * np.where(np.arange(grey.shape[1]) < 100, 0.4, 1.0),  # half in shadow
        Image.fromarray(grey),
        grey,
        grey / 255,
        grey.astype(np.int64),
        grey > 127,
        grey[..., None],
        np.stack([grey] * 3),
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None] / 255,
        torch.from_numpy(grey).bfloat16(),
        (grey > 127).astype(np.uint8),
        os.scandir(tmp_path).__next__(),
        image,
        image // 128,
    ]
    guesses, probabilities = mnist_cnn.predict_digits(shipped, pictures)
    assert guesses.tolist() == [labels[0].item()] * len(pictures)
    assert probabilities.max(1).values.min() > 0.9
    for picture in (str(tmp_path / "grey.png"), tmp_path / "grey.png", Image.fromarray(grey), grey):
        assert mnist_cnn.predict_digits(shipped, picture)[0].tolist() == [labels[0].item()]
    none, probabilities = mnist_cnn.predict_digits(shipped, [])
    assert (none.shape, probabilities.shape) == ((0,), (0, 10))


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [
        (torch.ones(28, 28), "picture 1: blank"),
        (torch.zeros(1, 28, 28, dtype=torch.uint8), "picture 1: blank"),
        (torch.full((40, 60), 0.9) + 0.01 * torch.rand(40, 60), "picture 1: blank"),
        (torch.full((9, 9), math.nan), "picture 1: .*values nan"),
        (torch.randn(28, 28), "picture 1: .*values -.* not a picture"),
        (torch.rand(2, 3, 28, 28), r"picture 1: shape .*\(2, 3, 28, 28\)"),
        (torch.rand(0, 28), "picture 1: zero-size"),
        (torch.eye(3), "picture 1: too small: its ink is 3x3 pixels"),
        ("nothing.png", "nothing.png: .*No such file"),
    ],
)
def test_what_is_no_digit_is_named(picture, complaint, shipped, some_digits):
    with pytest.raises((OSError, ValueError), match=complaint):
        mnist_cnn.predict_digits(shipped, [some_digits[0][0], picture])


def test_a_digit_on_a_long_strip_is_found(shipped, some_digits):
    strip = F.pad(scan(some_digits[0][0]), [9_000, 9_000, 0, 0], value=1.0)
    assert mnist_cnn.predict_digits(shipped, [strip])[0].item() == some_digits[1][0]


def test_predict_classifies_the_good_files_and_names_the_others(some_digits, tmp_path):
    images, labels = some_digits
    names = ["é.png", "text.png", "missing.png", "huge.png", ".", "-", "1.png"]
    named = ["text.png", "missing.png", "huge.png", ".", "<stdin>"]
    for number, name in ((0, "é.png"), (1, "1.png")):
        Image.fromarray(scanned(images[number])).save(tmp_path / name)
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("1", (14_000, 13_000)).save(tmp_path / "huge.png")

    def predict(*arguments: str, stdin: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, MODULE, "predict", "--checkpoint", CHECKPOINT, *arguments]
        ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
        return subprocess.run(command, cwd=tmp_path, stdin=stdin, env=ascii_only, **PIPES)

    with open(tmp_path / "text.png") as text:
        run = predict(*names, stdin=text)
    assert run.returncode == 2
    good = zip(run.stdout.splitlines(), (r"\\xe9.png", "1.png"), labels[:2], strict=True)
    for line, name, label in good:
        assert re.fullmatch(rf"{name}: {label} \(\d+\.\d%\), or \d \(\d+\.\d%\)", line)
    for line, name in zip(run.stderr.splitlines(), named, strict=True):
        assert line.startswith(f"error: {name}: ")

    with open(tmp_path / "1.png", "rb") as picture:
        result = json.loads(predict("--json", "-", stdin=picture).stdout)
    assert (result["file"], result["digit"]) == ("-", labels[1])
    assert sum(result["probabilities"]) == pytest.approx(1)


def test_a_closed_standard_input_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert mnist_cnn.main(["predict", "--checkpoint", str(CHECKPOINT), "-"]) == 2
    assert re.fullmatch("error: .* not a picture\n", capsys.readouterr().err)


def test_the_demo_answers_a_drawing_and_an_empty_page(some_digits, monkeypatch):
    monkeypatch.chdir(MODULE.parent)
    from demo import recognize

    drawing = Image.fromarray(scanned(some_digits[0][0])).convert("RGBA")
    probabilities, seen = recognize({"composite": drawing})
    assert max(probabilities, key=probabilities.get) == "7"
    assert np.array_equal(seen.reduce(10), digits.read_digits(drawing)[0, 0])
    empty = {"composite": Image.new("RGBA", (800, 800))}
    assert recognize(empty) == ("blank: nothing is written on it", None)


def test_synthetic_digits_are_like_mnist(shipped):
    images, labels = digits.draw_digits(2_000, seed=0)
    assert (images.shape, images.dtype) == ((2_000, 1, 28, 28), torch.uint8)
    assert labels.bincount().min() > 150
    assert mnist_cnn.evaluate_model(shipped, images, labels)[1] > 80  # has never seen a font
