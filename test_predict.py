"""Tests of predict.py and demo.py, with digits that are drawn here."""

import os
import re
import shutil
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, ImageOps
from scipy.ndimage import center_of_mass

import predict
from mnist_cnn import load_model
from test_mnist_model import CHECKPOINT, SCRIPT, run_python, write_images

SEVEN = [(60, 40), (140, 40), (90, 160)]
ONE = [(100, 30), (100, 170)]


def with_lines(picture, lines, ink=30, width=14):
    """A copy of the picture on which lines are drawn."""
    copy = picture.copy()
    for line in lines:
        ImageDraw.Draw(copy).line(line, ink, width)
    return copy


def draw(strokes, paper=235, pen=30, width=14):
    """A digit of 200x200 grey pixels."""
    return with_lines(Image.new("L", (200, 200), paper), [strokes], pen, width)


def ellipse(width, height):
    angles = np.linspace(0, 2 * np.pi, 50)
    return [(100 + width * np.sin(a), 100 + height * np.cos(a)) for a in angles]


def in_a_cell(picture):
    """The cell of a printed form, drawn over a copy of the picture."""
    cell = [(0, 25, 200, 25), (0, 180, 200, 180), (25, 0, 25, 200), (180, 0, 180, 200)]
    return with_lines(picture, cell, 0, 4)


def page_of(size, *digits):
    """A page with digits: each is its strokes, and the corner where it lies."""
    page = Image.new("L", size, 235)
    for strokes, corner in digits:
        page.paste(draw(strokes), corner)
    return page


PAGE = page_of((600, 400), (ONE, (0, 10)), (SEVEN, (200, 0)), (SEVEN, (0, 200)))


def read(picture):
    digits, _, _ = predict.predict_page(load_model(CHECKPOINT), picture)
    return digits.tolist()


def test_the_shipped_checkpoint_reads_pictures_of_every_kind(tmp_path):
    seven = draw(SEVEN)
    pixels = np.asarray(seven)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # to be shown upside down
    seven.rotate(180).save(tmp_path / "turned.jpg", exif=exif)
    transparent = Image.new("L", (200, 200))
    transparent.putalpha(Image.fromarray(255 - pixels))
    small = Image.fromarray((235 - pixels) // 2).resize((14, 14))
    lined = pixels.copy()
    lined[::20] = np.minimum(lined[::20], 200)
    box = [(20, 20, 180, 20, 180, 180, 20, 180, 20, 20)]
    circle = [ellipse(90, 90)]
    pictures = {
        "grey": seven,
        "in the cell of a form": in_a_cell(seven),
        "in a box": with_lines(seven, box, 60, 3),
        "in a circle": with_lines(seven, circle, 60, 3),
        "in a faint circle": with_lines(seven, circle, 190, 3),
        "with a fading stroke": with_lines(seven, [SEVEN[1:]], 155),
        "with a gap": with_lines(seven, [(0, 62, 200, 62)], 235, 4),
        "of 28x28 pixels": seven.resize((28, 28)),
        "in colour": np.asarray(seven.convert("RGB")),
        "light on dark": draw(SEVEN, paper=20, pen=220),
        "faint": draw(SEVEN, pen=190),
        "very bold": draw(SEVEN, width=45),
        "cut out": seven.crop((52, 32, 148, 168)),
        "thin and cut out": draw(SEVEN, width=1).crop((52, 32, 148, 168)),
        "on lined paper": lined,
        "in a dark box": np.pad(255 - pixels, 50, constant_values=255),
        "beside a dark edge": with_lines(seven, [(7, 0, 7, 200)], 0, 15),
        "in a shadow": (pixels * np.linspace(0.3, 1, 200)).astype(np.uint8),
        "turned": tmp_path / "turned.jpg",
        "transparent": transparent,
        "with opacity": np.asarray(transparent.convert("RGBA")),
        "of 16 bits": Image.fromarray(pixels.astype(np.uint16) * 256),
        "small, faint and in a corner": np.pad(small, [(1, 13), (13, 1)]),
    }
    model = load_model(CHECKPOINT)
    digits, probabilities = predict.predict_digits(model, list(pictures.values()))
    assert probabilities.numpy().sum(1) == pytest.approx(1)
    answers = dict(zip(pictures, digits.tolist(), strict=True))
    assert answers == dict.fromkeys(pictures, 7)


def test_the_digit_is_fitted_like_those_of_mnist():
    """Into 20x20 pixels, with its centre of mass in the middle of 28x28."""

    def fit(picture):
        return predict.read_page(picture)[0][0, 0].numpy()

    image = fit(draw(SEVEN))
    for fitted in (image, fit(image)):
        rows, _ = fitted.nonzero()
        assert (np.ptp(rows) + 1, fitted.max()) == (20, 255)
        assert center_of_mass(fitted) == pytest.approx((14, 14), abs=0.5)
    bar = np.zeros((28, 28), np.uint8)
    bar[4:24, 10:19] = 100
    bar[4:24, 12:17] = 255
    assert (fit(bar) == np.where(bar == 100, 145, bar)).all()  # 255 (100 / 255)^0.6
    jpeg = image | 9  # black is not quite black there
    jpeg[::27, ::27] = 0
    jpeg[10] = 9  # a broken stroke
    rows, _ = (fit(jpeg) > 50).nonzero()
    assert np.ptp(rows) + 1 == pytest.approx(20, abs=1)


def test_a_light_zero_in_a_dark_box_is_read():
    box = ImageOps.expand(ImageOps.invert(draw(ellipse(30, 70))), 50, "white")
    assert read(box) == [0]


@pytest.mark.parametrize("width", [2, 21])
def test_a_one_is_neither_a_ruled_line_nor_a_sheet(width):
    one = with_lines(page_of((60, 160)), [(30, 10, 30, 150)], width=width)
    assert read(one) == [1]


def test_two_thin_ones_are_no_ruled_lines():
    ones = [[(x, 30), (x, 170)] for x in (60, 140)]
    assert read(with_lines(draw([]), ones, width=6)) == [1, 1]


def on_squared_paper(picture):
    """Lines that the strokes cross, on paper that is slightly turned."""
    lines = []
    for at in range(10, 580, 33):
        lines += [(0, at, 600, at + 20), (at + 20, 0, at, 400)]
    return with_lines(picture, lines, 120, 3)


def on_a_table(picture):
    """The sheet on a darker table, slightly turned. A crumb lies beside it."""
    table = ImageOps.expand(picture, 200, 90).rotate(4, fillcolor=90)
    return with_lines(table, [(60, 60, 75, 60)], 235, 10)


def in_bad_light(picture):
    """The sheet is taller than half of the picture. Its right gets less light."""
    table = np.asarray(ImageOps.expand(picture, (200, 100, 200, 250), 60))
    return (table * np.linspace(1, 0.5, 1000)).astype(np.uint8)


def on_cards(picture):
    """Each digit lies on a card of its own, and the cards lie on a darker table."""
    cards = ImageOps.expand(picture, 60, 90)
    for line in ((0, 270, 720, 270), (260, 0, 260, 520)):
        cards = with_lines(cards, [line], 90, 36)
    return cards


def on_a_black_table(picture):
    """The sheet fills almost the whole picture."""
    return ImageOps.expand(picture, 60, 35).rotate(4, fillcolor=35)


def on_a_rough_table(picture):
    """Written with a pale pencil, in light that falls off to the right."""
    table = np.random.default_rng(0).normal(70, 20, (600, 1)) + np.zeros(900)
    table[100:500, 150:750] = np.maximum(picture, 150)
    return (table * np.linspace(1, 0.55, 900)).clip(0, 255).astype(np.uint8)


def underlined(picture):
    """Twice, with more ink than the digits have."""
    return with_lines(picture, [(20, y, 340, y + 4) for y in (198, 216)])


def framed(picture):
    """In the middle of a frame that has more ink than the digits."""
    frame = ImageOps.expand(picture, (600, 400), 235)
    ImageDraw.Draw(frame).rectangle((420, 330, 1380, 870), outline=60, width=15)
    return frame


def in_boxes(picture):
    """As in a form, where neighbours make a thick line. The 1 touches its box."""
    form = picture.copy()
    for left, top in (3, 9), (207, 9), (3, 227):
        box = left, top, left + 204, top + 167
        ImageDraw.Draw(form).rectangle(box, outline=60, width=4)
    return form


def on_a_large_sheet(picture):
    """The digits are 12 of its 600 pixels tall, like 4 mm on A4."""
    sheet = page_of((600, 600))
    sheet.paste(picture.resize((48, 32)))
    return sheet


def partly_faint(picture):
    """The first line of writing is a third as dark as the second."""
    pixels = np.array(picture)
    pixels[:200] = 235 - (235 - pixels[:200]) // 3
    return pixels


def with_signs(picture):
    """A minus, an equals sign and a colon stand between the digits."""
    signs = [(280, y, 340, y) for y in (260, 290, 320)]
    signs += [(190, y, 200, y) for y in (60, 130)]
    return with_lines(picture, signs, width=10)


def with_a_bar(picture):
    """It is taller than a dash, but much wider than a digit."""
    return with_lines(picture, [(300, 300, 580, 300)], width=50)


def cut_by_the_edge(picture):
    """The last 7 has lost its lower end, and a stroke at the top its upper end."""
    return with_lines(picture.crop((0, 0, 600, 340)), [(500, 0, 500, 60)])


def beside_a_pencil(picture):
    """It lies across the edge, and is darker and larger than the digits."""
    return with_lines(picture, [(500, 0, 500, 330)], 0, 40)


def with_a_dark_corner(picture):
    shade = np.linspace(1, 0, 400)[:, None] * np.linspace(1, 0, 600)
    return (np.asarray(picture) * (1 - shade**2)).astype(np.uint8)


def under_a_lamp(picture):
    """Most of the light falls on the middle."""
    y, x = np.mgrid[-1:1:400j, -1:1:600j]
    return (np.asarray(picture) * (1 - (x**2 + y**2) / 5)).astype(np.uint8)


def in_grain(picture):
    """Written with a pale pencil."""
    noise = np.random.default_rng(0).normal(0, 40, (400, 600))
    return (np.maximum(picture, 150) + noise).clip(0, 255).astype(np.uint8)


def with_dust(picture):
    dusty = np.array(picture)
    for corner in range(3):
        dusty[corner::15, corner::15] = 30
    return dusty


@pytest.mark.parametrize(
    "kind",
    [
        on_squared_paper,
        on_a_table,
        in_bad_light,
        on_cards,
        on_a_black_table,
        on_a_rough_table,
        underlined,
        framed,
        in_boxes,
        on_a_large_sheet,
        partly_faint,
        with_signs,
        with_a_bar,
        with_a_dark_corner,
        under_a_lamp,
        in_grain,
        with_dust,
        cut_by_the_edge,
        beside_a_pencil,
    ],
)
def test_a_page_of_every_kind_is_read(kind):
    assert read(kind(PAGE)) == [1, 7, 7]


@pytest.mark.parametrize("kind", [in_grain, on_a_table, in_bad_light, with_dust])
def test_nothing_is_read_on_a_blank_sheet(kind):
    with pytest.raises(ValueError, match="was found"):
        predict.read_page(kind(page_of((600, 400))))


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((2, 784), np.uint8),
        np.zeros((2, 28, 28)),
        torch.zeros(2, 28, 28, dtype=torch.uint8),
        [None],
        [np.zeros((28, 28, 1), np.uint8)],
        [np.zeros((28, 28, 2), np.uint8)],
        [np.zeros(784, np.uint8)],
    ],
)
def test_what_is_no_picture_is_refused(pictures):
    with pytest.raises(TypeError):
        predict.predict_digits(None, pictures)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="no pictures"):
        predict.predict_digits(None, [])


def test_a_page_is_read_line_by_line():
    digits, probabilities, boxes = predict.predict_page(load_model(CHECKPOINT), PAGE)
    assert probabilities.numpy().sum(1) == pytest.approx(1)
    assert digits.tolist() == [1, 7, 7]
    assert [columns.start < 200 for _, columns in boxes] == [True, False, True]
    with pytest.raises(ValueError, match=r"pictures\[0\] has several digits"):
        predict.predict_digits(None, [PAGE])
    with pytest.raises(ValueError, match=r"pictures\[1\]: no writing was found"):
        predict.predict_digits(None, [draw(SEVEN), draw([])])
    with pytest.raises(ValueError, match=r"pictures\[0\]: no writing was found"):
        predict.predict_digits(None, np.zeros((1, 28, 28), np.uint8))


def test_thin_slanting_lines_are_erased_in_a_small_picture():
    lines = [(0, y, 100, y + 5) for y in range(10, 90, 20)]
    picture = np.asarray(with_lines(Image.new("1", (100, 100)), lines, 1, 1))
    assert not predict.erase_lines(picture, 0.5).any()


def test_lines_as_faint_as_the_threshold_are_erased():
    """Only 0.4 of their pixels are darker than it."""
    picture = np.zeros((100, 300))
    is_dark = np.random.default_rng(0).random((2, 300)) < 0.4
    picture[[30, 60]] = np.where(is_dark, 0.6, 0.4)
    assert not predict.erase_lines(picture, 0.5).any()


def test_two_digits_that_almost_touch_look_as_if_each_were_alone():
    seven, one = [(40, 40), (160, 40), (110, 180)], [(92, 80), (92, 190)]
    both, _ = predict.read_page(with_lines(draw(seven), [one]))
    alone = [predict.read_page(draw(digit))[0] for digit in (seven, one)]
    assert torch.equal(both, torch.cat(alone))


def test_lines_may_slant():
    digits = [
        (strokes, (150 * i, top - 75 * i))
        for top in (300, 600)
        for i, strokes in enumerate((ONE, ONE, SEVEN, SEVEN))
    ]
    assert read(page_of((800, 900), *digits)) == [1, 1, 7, 7] * 2


@pytest.mark.parametrize("down", [180, 390])
def test_what_lies_below_is_the_next_line(down):
    sevens = (SEVEN, (0, down)), (SEVEN, (400, down))
    assert read(page_of((600, 600), (ONE, (200, 0)), *sevens)) == [1, 7, 7]


def test_one_bad_picture_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_a_cell(draw([])).save("empty.png")
    Path("text.png").write_text("no picture")
    draw(SEVEN).save("exif.png", exif=b"Exif\0\0garbage")
    draw(SEVEN).save("größe.png")  # not to be printed in ASCII
    draw(SEVEN).save("seven.png")
    names = ["empty.png", "text.png", "missing.png", "exif.png"]
    arguments = [*names, "--show", "--checkpoint", CHECKPOINT, "größe.png", "seven.png"]
    result = run_python(predict.__file__, *arguments, PYTHONIOENCODING="ascii")
    assert result.returncode == 2
    assert re.fullmatch(
        r"gr\\xf6\\xdfe.png: 7 \(.*% sure\)\nseven.png: 7 \(.*% sure\)\n",
        result.stdout,
    )
    errors = [line.split(": ")[1] for line in result.stderr.splitlines()]
    assert errors == names
    assert Image.open("seven_read.png").size == (800, 1000)


def test_the_least_certain_digit_decides_whether_an_answer_is_sure(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # the checkpoint lies beside the script
    PAGE.save("page.png")
    logits = torch.eye(10)[[1, 7, 7]] * torch.tensor([[9], [5.375], [9]])
    monkeypatch.setattr(predict, "infer", lambda *_: logits)
    monkeypatch.setattr(sys, "argv", ["predict.py", "page.png"])
    assert predict.main() == 0
    assert capsys.readouterr().out == "page.png: not sure: 1 7 7 (96.0% sure)\n"
    assert os.listdir() == ["page.png"]  # nothing is drawn


def test_a_missing_checkpoint_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py", "a.png", "--checkpoint", "no.pth"])
    with pytest.raises(SystemExit):
        predict.main()
    assert "No such file or directory: 'no.pth'" in capsys.readouterr().err


def test_the_snippets_of_the_readme_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CHECKPOINT, ".")
    draw(SEVEN).save("seven.jpg")
    draw(ONE).save("three.png")
    readme = SCRIPT.with_name("README.md").read_text()
    reading, evaluate, train, by_hand = re.findall(r"(?s)```python\n(.*?)```", readme)
    environment = {
        "PYTHONPATH": str(SCRIPT.parent),
        "MNIST_DATA_DIR": write_images(tmp_path / "few", num_training=5_128),
    }
    for program, answer in (
        (evaluate + train + "print(len(history))", "5"),
        (reading + "print(digits.tolist())", "[7, 1]"),
        (by_hand + "print(digit in range(10))", "True"),
    ):
        result = run_python("-c", program, **environment)
        assert result.stdout.splitlines()[-1:] == [answer], result.stderr


def test_the_demo_answers_a_drawing_a_photo_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the checkpoint lies beside the script
    from demo import UPLOADS, recognize

    draw(SEVEN).save("seven.png")
    drawing = b64encode(Path("seven.png").read_bytes()).decode()
    uploaded = shutil.copy("seven.png", UPLOADS.name)
    for picture in (drawing, {"path": uploaded}):
        probabilities, _ = recognize(picture)
        assert np.argmax(probabilities) == 7
    assert recognize(None) == ("", None)
    refusal = "This file cannot be read. Export it as a JPEG or PNG."
    outside = os.path.relpath("seven.png", UPLOADS.name)
    for path in "seven.png", f"{UPLOADS.name}/{outside}":  # the server's own file
        assert recognize({"path": path}) == (refusal, None)
    PAGE.save(Path(UPLOADS.name, "page.png"))
    answer, _ = recognize({"path": f"{UPLOADS.name}/page.png"})
    assert re.fullmatch(r"1 \(\d\d+%\), 7 \(\d\d+%\), 7 \(\d\d+%\)", answer)
