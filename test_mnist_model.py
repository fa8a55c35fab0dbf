"""Tests of mnist_cnn.py and of the checkpoint that is shipped with it.

They train on a few images that are made here. The one test that needs MNIST is skipped
where MNIST cannot be had; in CI it fails instead. "The reference" is the program whose
network and settings these are, https://github.com/rshekhar93/MNIST_TinyCNN_Optimizer.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, astuple, replace
from pathlib import Path
from unittest.mock import Mock

# Beside other work, several threads are many times slower than one.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation
from torch import nn

import mnist_cnn
from mnist_cnn import HyperParameters, TinyCNN, train_model

SCRIPT = Path(mnist_cnn.__file__)
CHECKPOINT = SCRIPT.with_name("best_mnist_model.pth")


def write_idx(path, array):
    """Write uint8 in the format of MNIST's files, http://yann.lecun.com/exdb/mnist."""
    header = np.array([0x800 + array.ndim, *array.shape], ">i4")
    path.write_bytes(header.tobytes() + array.astype(np.uint8).tobytes())


def write_images(folder, num_training):
    """Noise with a bright row that tells the label, in place of MNIST."""
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train", num_training), ("t10k", 200)):
        labels = np.arange(count) % 10
        images = random.integers(0, 100, (count, 28, 28))
        images[np.arange(count), 4 + 2 * labels] += 150
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return str(folder)


@pytest.fixture
def params(tmp_path, monkeypatch):
    """Three epochs of ten steps, on images that are made here. Changes to tmp_path."""
    monkeypatch.chdir(tmp_path)
    data_dir = write_images(tmp_path / "few", num_training=768)
    return HyperParameters(num_epochs=3, validation_size=128, data_dir=data_dir)


def run_python(*arguments, **environment):
    """Run Python, and keep what it prints."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_device=False)


# ---- The model -----------------------------------------------------------------------


def layers(*kinds):
    return [layer for layer in TinyCNN().modules() if isinstance(layer, kinds)]


def test_parameter_count_of_the_reference():
    count = sum(parameter.numel() for parameter in TinyCNN().parameters())
    assert count < 20_000
    assert count == 19_354


def test_uses_batch_normalization():
    assert len(layers(nn.BatchNorm2d)) == 5


def test_uses_dropout():
    assert [layer.p for layer in layers(nn.Dropout, nn.Dropout2d)] == [0.25] * 3


def test_ends_in_a_fully_connected_layer():
    (linear,) = layers(nn.Linear)
    assert linear.weight.shape == (10, 784)


LAYERS = """
conv1.0 relu conv1.2 relu
conv2.0 conv2.1 relu conv2.3 conv2.4 relu pool
conv3.0 conv3.1 relu conv3.4 conv3.5 relu pool
conv4.0 conv4.1 relu conv4.4 relu
"""


def test_shipped_checkpoint_has_the_keys_and_the_function_of_the_reference():
    weights = torch.load(CHECKPOINT, weights_only=True)
    images = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8)
    x = (images / 255 - 0.1307) / 0.3081
    for layer in LAYERS.split():
        weight, bias, mean, variance = (
            weights.get(f"{layer}.{key}")
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        if layer == "relu":
            x = x.relu()
        elif layer == "pool":
            x = F.max_pool2d(x, 2)
        elif mean is None:
            x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        else:
            x = F.batch_norm(x, mean, variance, weight, bias)
    expected = x.flatten(1) @ weights["fc.1.weight"].T + weights["fc.1.bias"]

    model = mnist_cnn.load_model(CHECKPOINT, device="cpu")
    assert not model.training
    logits = mnist_cnn.infer(model.train(), images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_shipped_checkpoint_is_more_than_99_4_percent_accurate(capsys):
    try:
        mnist_cnn.read_mnist(HyperParameters().data_dir, train=False)
    except OSError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
    _, accuracy = mnist_cnn.load_and_evaluate_model(CHECKPOINT, HyperParameters())
    assert 99.4 < accuracy <= 100
    assert capsys.readouterr().out == f"Current test accuracy: {accuracy:.2f}%\n"


# ---- Hyperparameters -----------------------------------------------------------------


def test_defaults_are_those_of_the_reference():
    params = HyperParameters()
    assert params.num_epochs <= 20
    assert astuple(params)[:5] == (20, 64, 0.0009, 0.25, 42)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0),
        ("num_epochs", 2.5),
        ("batch_size", "64"),
        ("learning_rate", math.nan),
        ("learning_rate", None),
        ("random_seed", 2**32),
        ("validation_size", 60_000),
        ("data_dir", None),
        ("precision", "float16"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, "):
        HyperParameters(**{name: value})


def test_numpy_numbers_and_paths_become_plain_python():
    params = HyperParameters(
        np.int64(3), learning_rate=np.float64(0.5), data_dir=SCRIPT
    )
    assert set(map(type, astuple(params))) == {int, float, str}
    assert (params.num_epochs, params.learning_rate) == (3, 0.5)
    assert params.data_dir == str(SCRIPT)


# ---- Data ----------------------------------------------------------------------------


def test_validation_images_are_not_trained_on_and_do_not_depend_on_the_seed(params):
    (training, _), (validation, _), _ = mnist_cnn.split_mnist(params, "cpu")
    assert len(validation) == 128
    parts = torch.cat([training, validation])
    images, _ = mnist_cnn.read_mnist(params.data_dir, train=True)
    assert_equal(parts.sum((1, 2, 3)).msort(), images.sum((1, 2, 3)).msort())
    _, (again, _), _ = mnist_cnn.split_mnist(replace(params, random_seed=1), "cpu")
    assert_equal(again, validation)


def test_missing_data_is_explained(params, monkeypatch):
    no_network = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    raw = Path(params.data_dir, "MNIST/raw")
    named = re.escape(f"{params.data_dir}/MNIST/raw")
    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    complaint = rf"cannot be read from {named}, nor downloaded.*Delete what is"
    with pytest.raises(OSError, match=complaint):
        mnist_cnn.read_mnist(params.data_dir, train=True)
    shutil.rmtree(raw)
    complaint = rf"{named}.*four files.*--data-dir or MNIST_DATA_DIR.*no network"
    with pytest.raises(OSError, match=complaint):
        mnist_cnn.read_mnist(params.data_dir, train=True)


def test_augment_is_the_affine_transform_of_scipy():
    images = torch.rand(20, 1, 28, 28)
    torch.manual_seed(1)
    warped = mnist_cnn.augment(images, 0.5)
    torch.manual_seed(1)
    drawn = 2 * torch.rand(6, 20).double().numpy() - 1
    for image, result, (turn, size, stretch, shear, right, down) in zip(
        images, warped, drawn.T, strict=True
    ):
        # The coordinates are y, x.
        rotation = Rotation.from_euler("z", -11 * turn, degrees=True)
        shearing = np.array([[1, 0], [0.19 * shear, 1]])
        stretching = np.diag([1.09**-stretch, 1.09**stretch])
        matrix = rotation.as_matrix()[:2, :2] @ shearing @ stretching
        matrix /= 1 + 0.11 * size
        offset = np.array([1.5 * down, 1.5 * right]) + 13.5 - matrix @ [13.5, 13.5]
        expected = affine_transform(
            image[0], matrix, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(result[0], expected, atol=1e-4)


# ---- Evaluation and figures ----------------------------------------------------------


def test_evaluate_model_averages_the_loss_and_counts_the_correct_answers():
    model = TinyCNN()
    for weights in model.parameters():
        nn.init.zeros_(weights)  # equal logits: the loss is ln 10, and the guess is 0
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    labels = torch.arange(500) % 8
    loss, accuracy = mnist_cnn.evaluate_model(model, images, labels)
    assert loss == pytest.approx(math.log(10))
    assert accuracy == pytest.approx(100 * 63 / 500)
    for others in images / 255, images.numpy():
        with pytest.raises(TypeError, match="must be a uint8 tensor"):
            mnist_cnn.evaluate_model(model, others, labels)


def test_best_epoch_is_chosen_by_validation_accuracy_then_loss():
    history = [
        {"validation_loss": loss, "validation_accuracy": accuracy}
        for loss, accuracy in ((0.01, 99.1), (0.04, 99.2), (0.03, 99.2), (0.02, 99.0))
    ]
    assert mnist_cnn.best_epoch(history) is history[2]


def test_mistakes_are_counted_and_sorted_by_confidence():
    labels = torch.tensor([3, 3, 5, 7])
    guesses = torch.eye(10)[[5, 5, 5, 1]]
    logits = guesses * torch.tensor([[1], [3], [9], [2]])
    images = torch.zeros(4, 1, 28, 28)
    figure = mnist_cnn.plot_mistakes(images, labels, logits)
    assert figure.get_suptitle() == "3 of 4 images missed"
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == ["3 as 5, 69%", "7 as 1, 45%", "3 as 5, 23%", ""]


# ---- Training ------------------------------------------------------------------------


def test_schedules_of_the_learning_rate_augmentation_and_dropout(monkeypatch):
    params = HyperParameters(num_epochs=5, batch_size=4)
    parts = mnist_cnn.prepare_training(params, 80, torch.device("cpu"))
    model, optimizer, _ = parts
    steps = []

    def augment(images, strength):
        assert model.training
        assert images.dtype == torch.uint8  # normalized afterwards
        dropout = {layer.p for layer in model.modules() if hasattr(layer, "p")}
        (group,) = optimizer.param_groups
        rates = group["lr"], group["betas"][0]
        steps.append((strength, *dropout, *rates, torch.rand(1).item()))
        return images

    monkeypatch.setattr(mnist_cnn, "augment", augment)
    images = torch.zeros(80, 1, 28, 28, dtype=torch.uint8)
    training_set = images, torch.arange(80) % 10
    for epoch in range(1, 6):
        mnist_cnn.train_epoch(*parts, training_set, epoch, params)
        model.eval()  # as the evaluation leaves it
    strengths, dropout, rates, betas, draws = np.transpose(steps)
    assert strengths[::20] == pytest.approx([1, 1, 0.8, 0.4, 0])
    assert dropout[::20] == pytest.approx([0.15, 0.05, 0, 0, 0])
    assert (rates[0], rates.max()) == pytest.approx((0.0009, 0.009))
    assert rates.argmax() == pytest.approx(30, abs=1)
    assert rates[-1] < 1e-5
    assert betas.argmin() == rates.argmax()
    assert len(set(draws[::20])) == 5  # no two epochs are distorted alike


def test_the_loss_and_accuracy_of_an_epoch_are_means_over_its_images(monkeypatch):
    """Nothing changes the weights, so the evaluation has the same ones."""
    monkeypatch.setattr(mnist_cnn, "augment", lambda images, _: images)
    monkeypatch.setattr(mnist_cnn, "has_bfloat16", lambda: True)
    params = HyperParameters(batch_size=7, precision="float32")
    images = torch.randint(256, (57, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (57,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    trained = mnist_cnn.train_epoch(model, Mock(), Mock(), (images, labels), 1, params)
    evaluated = mnist_cnn.evaluate_model(model, images, labels)
    assert trained == pytest.approx(evaluated)


def test_the_bar_ends_with_the_numbers_of_the_epoch(params, monkeypatch, capsys):
    """In a notebook without widgets, whose standard error is no terminal."""
    monkeypatch.setattr(mnist_cnn, "IN_NOTEBOOK", True)
    _, (metrics, *_) = train_model(replace(params, num_epochs=1), "a.pth")
    loss, accuracy = metrics["train_loss"], metrics["train_accuracy"]
    bar = capsys.readouterr().err.rstrip()
    assert bar.endswith(f", loss={loss:.3f}, acc={accuracy:.2f}%]")


@pytest.mark.parametrize("best", [0, -1])
@pytest.mark.parametrize("batches", [5, 25])
def test_a_resumed_training_ends_like_an_uninterrupted_one(
    batches, best, params, monkeypatch
):
    """Interrupted in the first and the third epoch, with the best before and after."""
    monkeypatch.setattr(mnist_cnn, "best_epoch", lambda history: history[best])
    monkeypatch.setattr("time.perf_counter", lambda: 0)
    whole, history = train_model(params, "whole.pth")
    _, accuracy = mnist_cnn.load_and_evaluate_model("whole.pth", params)
    assert accuracy == history[best]["test_accuracy"]
    _, validation, _ = mnist_cnn.split_mnist(params, "cpu")
    loss, _ = mnist_cnn.evaluate_model(whole, *validation)
    assert loss == pytest.approx(history[best]["validation_loss"])

    path = Path("resumed.pth")
    older = replace(params, random_seed=7)  # another training, given up
    for settings, count in ((older, 15), (params, batches)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            steps = Mock(side_effect=[None] * count + [KeyboardInterrupt])
            patch.setattr(mnist_cnn.tqdm, "update", steps)
            train_model(settings, path)

    path.unlink()  # an epoch has saved it
    shutil.copy(CHECKPOINT, path)  # another training's weights
    here = HyperParameters(data_dir=params.data_dir)
    for _ in range(2):  # the second time, all epochs are finished
        resumed, again = train_model(here, path, resume=True)
        assert again == history
        assert_equal(resumed.state_dict(), whole.state_dict())
        assert_equal(torch.load(path), whole.state_dict())
    assert str(whole) == str(resumed) == str(TinyCNN())  # with its dropout
    assert not resumed.training
    for model in (whole, resumed):
        assert all(weights.is_contiguous() for weights in model.state_dict().values())


# ---- Several processes ---------------------------------------------------------------


def test_the_mean_gradient_of_three_processes_is_that_of_one(monkeypatch):
    params = HyperParameters(batch_size=61, precision="float32")
    images, labels = torch.randint(256, (62, 1, 28, 28)), torch.randint(10, (62,))
    draws, totals = [], []
    monkeypatch.setattr(dist, "all_reduce", totals.append)

    def augment(images, _):
        draws.append(torch.rand(1).item())
        return images

    monkeypatch.setattr(mnist_cnn, "augment", augment)

    def gradient(rank, world_size, count=61):
        monkeypatch.setattr(mnist_cnn, "RANK", rank)
        monkeypatch.setattr(mnist_cnn, "WORLD_SIZE", world_size)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        training_set = images[:count], labels[:count]
        mnist_cnn.train_epoch(model, Mock(), Mock(), training_set, 1, params)
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    one = gradient(0, 1)
    several = torch.stack([gradient(rank, 3) for rank in range(3)])
    torch.testing.assert_close(several.mean(0), one, rtol=1e-4, atol=1e-6)
    assert len(set(draws)) == 4
    assert sum(totals)[2] == 61  # each process counts its own images
    for rank in range(3):
        gradient(rank, 3, count=62)
    assert len(draws) == 7  # each takes one step: the last batch of 1 is too small


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun is not for Windows")
def test_torchrun_trains_with_two_processes(params):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT]
    command += ["--num-epochs=1", "--validation-size=100", "--device=cpu"]
    result = run_python(*command, "--data-dir", params.data_dir)
    assert result.returncode == 0, result.stderr
    assert "FutureWarning" not in result.stderr
    assert result.stdout.count("Epoch 1/1 - ") == 1
    of_epoch, of_file = re.findall(r"(?:Acc|test accuracy): (.*%)\n", result.stdout)
    assert of_epoch.endswith(of_file)


# ---- Checkpoints ---------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(CHECKPOINT.read_bytes()[:9_000]), "damaged"),
        (lambda path: torch.save({"fc.1.bias": Malicious()}, path), "damaged"),
        (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "does not fit"),
    ],
    ids=["missing", "cut short", "malicious", "other"],
)
def test_a_file_that_is_no_checkpoint_is_named(write, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.pth"
    write(path)
    with pytest.raises((OSError, ValueError), match=complaint) as caught:
        mnist_cnn.load_and_evaluate_model(path, HyperParameters())
    assert str(path) in str(caught.value)
    assert not Path("executed").exists()


def test_a_state_of_another_model_is_named(params):
    elsewhere = asdict(replace(params, data_dir="nowhere", device="gpu"))
    state = {"params": elsewhere, "history": [], "best": {}}
    torch.save(state, "some.pth.resume")
    with pytest.raises(ValueError, match=r"some.pth.resume does not fit"):
        train_model(params, "some.pth", resume=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    error, tmp_path, monkeypatch
):
    path = tmp_path / "model.pth"
    mnist_cnn.write_tensors({"epoch": 1}, path)
    monkeypatch.setattr(Path, "replace", Mock(side_effect=error))
    with pytest.raises(error):
        mnist_cnn.write_tensors({"epoch": 2}, path)
    assert mnist_cnn.read_tensors(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---- The command line ----------------------------------------------------------------


def test_the_script_alone_in_a_folder_trains_and_evaluates(params):
    shutil.copy(SCRIPT, ".")
    shutil.copy(CHECKPOINT, ".")
    command = ["mnist_cnn.py", "--data-dir", params.data_dir]
    flags = ["--validation-size=100", "--num-epochs=9"]
    backend = "module://not_installed"  # as a notebook may leave it
    result = run_python(*command, *flags, MPLBACKEND=backend)
    assert (result.returncode, result.stderr) == (0, "")  # no bar in a log file
    number = r"(\d+\.\d\d)%"
    lines = re.search(
        r"Model Summary:\n[\s\S]*"
        r"The first epoch will replace the weights in best_mnist_model.pth\n[\s\S]*"
        rf"Epoch 9/9 - Loss: \d\.\d{{4}}, Train Acc: {number}, Val Acc: {number}, "
        rf"Test Acc: {number}\n"
        r"Training took \d+ seconds on .*\n"
        rf"Loaded best model from epoch \d with validation accuracy: {number}\n"
        r"The curves are drawn in best_mnist_model_curves.png\n"
        r"Evaluating saved best model:\n"
        rf"Current test accuracy: {number}\n",
        result.stdout,
    )
    assert lines, result.stdout
    best_validation, tested = map(float, lines.groups()[-2:])
    assert tested > 90
    history = json.loads(Path("best_mnist_model_history.json").read_text())
    assert [metrics["epoch"] for metrics in history] == list(range(1, 10))
    assert best_validation == max(metrics["validation_accuracy"] for metrics in history)
    assert mnist_cnn.plot_history(history).axes

    result = run_python(*command, "--evaluate")
    assert f"Current test accuracy: {tested:.2f}%\n" in result.stdout
    assert set(os.listdir()) == {
        "few",
        "mnist_cnn.py",
        "best_mnist_model.pth",
        "best_mnist_model_history.json",
        "best_mnist_model_curves.png",
        "best_mnist_model_mistakes.png",
    }
    assert run_python(*command, "--help").returncode == 0


@pytest.fixture
def main(params, monkeypatch, capsys):
    """The command line, in tmp_path: returns how it ended, its output and its errors.

    It ended with None, with argparse's 2, or with a text: then Python's status is 1.
    """

    def call(flags):
        argv = ["mnist_cnn.py", *flags.split(), "--data-dir", params.data_dir]
        monkeypatch.setattr(sys, "argv", argv)
        end = None
        try:
            mnist_cnn.main()
        except SystemExit as stop:
            end = stop.code
        return end, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("flags", "stem"),
    [("", "best_mnist_model"), (" --device cpu --checkpoint runs/a.pth", "runs/a")],
)
def test_a_training_that_stops_at_its_figures_can_be_resumed(
    flags, stem, main, monkeypatch
):
    interrupt = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr(mnist_cnn, "plot_history", interrupt)
        end, _, errors = main("--num-epochs 1 --validation-size 100" + flags)
    assert (end, errors) == (
        "\nStopped. --resume continues a training that has begun.\nWith it, repeat "
        "--checkpoint, --data-dir and --device if you had set them.",
        "",
    )
    end, output, errors = main("--resume" + flags)
    assert (end, errors) == (None, "")
    assert "Continuing after epoch 1 with HyperParameters(num_epochs=1" in output
    endings = ".pth", "_history.json", "_curves.png", "_mistakes.png"
    names = {f"{stem}{ending}" for ending in endings}
    assert {path.as_posix() for path in Path().glob(f"{stem}*")} == names
    monkeypatch.setattr(mnist_cnn, "report", interrupt)
    assert main("--evaluate" + flags) == ("\nStopped.", "", "")


def test_a_training_that_diverges_stops(main, monkeypatch):
    monkeypatch.setattr(mnist_cnn, "augment", lambda images, _: images * math.nan)
    end, _, errors = main("--num-epochs 1 --validation-size 100")
    assert end == "error: the loss is not finite in epoch 1: lower the learning rate"
    assert errors == ""


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--num-epochs 0", "num_epochs is 0, but must be int from 1 to 999"),
        ("--num-epochs many", "argument --num-epochs: invalid int value: 'many'"),
        ("--epochs 3", "unrecognized arguments: --epochs 3"),
        ("--device gpu", "device gpu cannot be used, but --device cpu can"),
        ("--device cuda:99", "device cuda:99 cannot be used, but --device cpu can"),
        ("--resume", "No such file or directory: 'best_mnist_model.pth.resume'"),
        ("--resume --num-epochs 5", "given together: num_epochs, resume"),
        ("--resume --evaluate", "given together: evaluate, resume"),
        ("--evaluate --num-epochs 5", "given together: evaluate, num_epochs"),
        ("--evaluate", "No such file or directory: 'best_mnist_model.pth'"),
        ("--checkpoint runs/", "runs/ is not the name of a file"),
        ("--checkpoint few", "few is not the name of a file"),
    ],
)
def test_a_wrong_flag_is_explained_in_a_line(flags, complaint, main):
    end, output, errors = main(flags)
    assert output == ""
    if errors.startswith("usage"):
        assert end == 2  # argparse's
        end = errors
    assert complaint in end.splitlines()[-1]


def test_a_gpu_that_this_torch_cannot_use_is_an_error(monkeypatch):
    no_kernel = Mock(side_effect=RuntimeError("no kernel image"))
    monkeypatch.setattr(torch.Tensor, "exp", no_kernel)
    with pytest.raises(ValueError, match="--device cpu can: no kernel image"):
        mnist_cnn.pick_device("auto")
