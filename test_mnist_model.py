"""Tests of mnist_cnn.py and of the checkpoint that is shipped with it.

They train on a few images that are made here. The one test that needs MNIST is skipped
where MNIST cannot be had; in CI it fails instead.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

# Beside other work, several threads are many times slower than one.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.ndimage import affine_transform
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mnist_cnn
from mnist_cnn import EpochMetrics, HyperParameters, TinyCNN

SCRIPT = Path(mnist_cnn.__file__)
CHECKPOINT = SCRIPT.with_name("best_mnist_model.pth")


def write_idx(path, array):
    """Write uint8 in the format of MNIST's files, http://yann.lecun.com/exdb/mnist."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_images(folder, num_training):
    """Noise with a bright row that tells the label, in place of MNIST."""
    raw = folder / "MNIST" / "raw"
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
def params(tmp_path):
    """Three epochs of ten steps, on images that are made here."""
    data_dir = write_images(tmp_path / "few", num_training=768)
    return HyperParameters(num_epochs=3, validation_size=128, data_dir=data_dir)


def run(*command, cwd, **environment):
    """Run a program in the folder cwd, and keep what it prints."""
    environment = os.environ | environment
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True
    )


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- The model -----------------------------------------------------------------------


def layers(*kinds):
    return [layer for layer in TinyCNN().modules() if isinstance(layer, kinds)]


def test_parameter_count_of_the_published_architecture():
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


def test_keys_and_shapes_of_the_published_architecture():
    shapes = {
        "conv1.0": (4, 1, 3, 3),
        "conv1.2": (8, 4, 3, 3),
        "conv2.0": (12, 8, 3, 3),
        "conv2.3": (16, 12, 3, 3),
        "conv3.0": (20, 16, 3, 3),
        "conv3.4": (16, 20, 3, 3),
        "conv4.0": (16, 16, 3, 3),
        "conv4.4": (16, 16, 1, 1),
        "fc.1": (10, 784),
    }
    norms = {"conv2.1": 12, "conv2.4": 16, "conv3.1": 20, "conv3.5": 16, "conv4.1": 16}
    expected = {f"{name}.weight": shape for name, shape in shapes.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    for name, channels in norms.items():
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{statistic}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()
    state = TinyCNN().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_shipped_checkpoint_computes_what_the_published_architecture_says():
    weights = torch.load(CHECKPOINT, weights_only=True)
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x = images
    for conv, norm in (
        ("conv1.0", None),
        ("conv1.2", None),
        ("conv2.0", "conv2.1"),
        ("conv2.3", "conv2.4"),
        ("conv3.0", "conv3.1"),
        ("conv3.4", "conv3.5"),
        ("conv4.0", "conv4.1"),
        ("conv4.4", None),
    ):
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, weights[f"{conv}.bias"], padding=kernel.shape[-1] // 2)
        if norm:
            mean, var, weight, bias = (
                weights[f"{norm}.{key}"].view(-1, 1, 1)
                for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        x = x.relu()
        if norm in ("conv2.4", "conv3.5"):
            x = F.max_pool2d(x, 2)
    expected = x.flatten(1) @ weights["fc.1.weight"].T + weights["fc.1.bias"]

    model = mnist_cnn.load_model(CHECKPOINT, HyperParameters(device="cpu"))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_shipped_checkpoint_is_more_than_99_4_percent_accurate(capsys):
    try:
        mnist_cnn.load_images(HyperParameters(), train=False)
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
    assert list(asdict(params).values())[:5] == [20, 64, 0.0009, 0.25, 42]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0),
        ("learning_rate", math.nan),
        ("validation_size", 60_000),
        ("precision", "float16"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}, but must be "):
        HyperParameters(**{name: value})


# ---- Data ----------------------------------------------------------------------------


def test_validation_images_are_not_trained_on_and_do_not_depend_on_the_seed(params):
    device = torch.device("cpu")
    (training, _), (validation, _), _ = mnist_cnn.load_splits(params, device)
    assert len(validation) == 128
    parts = torch.cat([training, validation])
    images, _ = mnist_cnn.load_images(params, train=True)
    assert_equal(parts.sum((1, 2, 3)).msort(), images.sum((1, 2, 3)).msort())
    _, (again, _), _ = mnist_cnn.load_splits(replace(params, random_seed=1), device)
    assert_equal(again, validation)


def test_a_damaged_file_is_reported_with_the_folder_to_delete(params):
    raw = Path(params.data_dir, "MNIST/raw")
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OSError, match=f"{raw} is damaged.* Delete that folder"):
        mnist_cnn.load_images(params, train=True)


def test_augment_is_the_affine_transform_of_scipy():
    images = torch.rand(20, 1, 28, 28)
    torch.manual_seed(1)
    warped = mnist_cnn.augment(images, 1.0)
    torch.manual_seed(1)
    drawn = 2 * torch.rand(6, 20).double().numpy() - 1
    for image, result, (turn, size, stretch, shear, right, down) in zip(
        images, warped, drawn.T, strict=True
    ):
        angle = math.radians(22 * turn)
        rotation = np.array(  # the coordinates are y, x
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        shearing = np.array([[1, 0], [0.38 * shear, 1]])
        stretching = np.diag([1.18**-stretch, 1.18**stretch])
        matrix = rotation @ shearing @ stretching / (1 + 0.22 * size)
        offset = np.array([3 * down, 3 * right]) + 13.5 - matrix @ [13.5, 13.5]
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


def test_best_epoch_is_chosen_by_validation_accuracy_then_loss():
    def best(*validation):
        history = [
            EpochMetrics(epoch, 0.1, 97.0, loss, accuracy, 100.0 - epoch)
            for epoch, (loss, accuracy) in enumerate(validation, start=1)
        ]
        return mnist_cnn.best_epoch(history).epoch

    assert best((0.01, 99.1), (0.04, 99.2), (0.03, 99.2), (0.02, 99.0)) == 3
    assert best((math.nan, math.nan), (math.nan, math.nan)) == 2


def test_mistakes_are_counted_and_sorted_by_confidence():
    labels = torch.tensor([3, 3, 5, 7])
    guesses = torch.tensor([5, 5, 5, 1])
    logits = F.one_hot(guesses, 10) * torch.tensor([[1.0], [3], [9], [2]])
    images = torch.zeros(4, 1, 28, 28)
    table, *pictures = mnist_cnn.plot_mistakes(images, labels, logits).axes
    cells = {text.get_position(): text.get_text() for text in table.texts}
    assert cells == {(5, 3): "2", (1, 7): "1"}  # the guess across, the truth down
    titles = [axes.get_title()[:6] for axes in pictures[:4]]
    assert titles == ["3 as 5", "7 as 1", "3 as 5", ""]


# ---- Training ------------------------------------------------------------------------


def test_schedules_of_the_learning_rate_the_warps_and_dropout(monkeypatch):
    params = HyperParameters(num_epochs=5, batch_size=4)
    model = TinyCNN()
    optimizer, schedule = mnist_cnn.make_optimizer(model, 80, params)
    rates, dropout = schedule.get_last_lr(), []
    optimizer.register_step_post_hook(lambda *_: rates.extend(schedule.get_last_lr()))
    training_set = torch.zeros(80, 1, 28, 28), torch.arange(80) % 10
    warps = []
    monkeypatch.setattr(
        mnist_cnn, "augment", lambda images, strength: warps.append(strength) or images
    )
    for epoch in range(1, 6):
        mnist_cnn.train_epoch(model, optimizer, schedule, training_set, epoch, params)
        dropout.append(model.fc[0].p)
    assert dropout == pytest.approx([0.15, 0.05, 0, 0, 0])
    assert warps[::20] == pytest.approx([1, 1, 0.8, 0.4, 0])
    assert (rates[0], max(rates)) == pytest.approx((0.0009, 0.009))
    assert rates.index(max(rates)) == pytest.approx(30, abs=1)
    assert rates[-1] < 1e-5


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("best", [0, -1])
def test_a_resumed_training_ends_like_an_uninterrupted_one(
    best, params, tmp_path, monkeypatch
):
    """With the best epoch before and after the interruption."""
    monkeypatch.setattr(mnist_cnn, "best_epoch", lambda history: history[best])
    whole, history = mnist_cnn.train_model(params, tmp_path / "whole.pth")

    augment, batches = mnist_cnn.augment, []

    def interrupt_in_epoch_3(*arguments):
        batches.append(arguments)
        return augment(*arguments) if len(batches) < 25 else interrupt()

    path = tmp_path / "resumed.pth"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mnist_cnn, "augment", interrupt_in_epoch_3)
        mnist_cnn.train_model(params, path)
    here = HyperParameters(data_dir=params.data_dir)
    resumed, again = mnist_cnn.train_model(here, path, resume=True)
    assert_equal(again, history)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_equal(torch.load(path), dict(whole.state_dict()))


# ---- Several processes ---------------------------------------------------------------


def save_gradients(rank, world_size, folder):
    """Take one step on 61 images, without dropout and batch statistics.

    Those two differ by process.
    """
    mnist_cnn.RANK, mnist_cnn.WORLD_SIZE = rank, world_size
    meeting = f"file://{folder}/meeting_of_{world_size}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    params = HyperParameters(
        batch_size=61, dropout_rate=0.0, augmentation=0.0, precision="float32"
    )
    model = TinyCNN()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().train = lambda _: None  # stays in eval mode
    training_set = torch.randint(256, (61, 1, 28, 28)), torch.randint(10, (61,))
    metrics = mnist_cnn.train_epoch(
        DistributedDataParallel(model),
        *mnist_cnn.make_optimizer(model, 61, params),
        training_set,
        1,
        params,
    )
    results = [weight.grad for weight in model.parameters()] + list(metrics)
    torch.save(results, folder / f"{rank}_of_{world_size}.pt")


def test_the_gradient_of_three_processes_is_that_of_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [
        context.Process(target=save_gradients, args=(rank, size, tmp_path))
        for size in (1, 3)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one = torch.load(tmp_path / "0_of_1.pt")
    for rank in range(3):
        several = torch.load(tmp_path / f"{rank}_of_3.pt")
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-6)


def test_torchrun_trains_with_two_processes(params, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    flags = ["--num-epochs=1", "--validation-size=0", f"--data-dir={params.data_dir}"]
    result = run(*command, SCRIPT, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
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
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(os.urandom(9_000)), "damaged"),
        (lambda path: path.write_bytes(CHECKPOINT.read_bytes()[:-999]), "damaged"),
        (lambda path: torch.save({"fc.1.bias": Malicious()}, path), "damaged"),
        (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "Missing key"),
    ],
    ids=["missing", "empty", "garbage", "truncated", "malicious", "other"],
)
def test_a_file_that_is_no_checkpoint_is_named(write, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.pth"
    write(path)
    with pytest.raises((OSError, ValueError), match=complaint) as caught:
        mnist_cnn.load_and_evaluate_model(path, HyperParameters())
    assert str(path) in str(caught.value)
    assert not Path("executed").exists()


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    mnist_cnn.save({"epoch": 1}, path)

    def write_a_part(_, file):
        file.write(b"PK")
        interrupt()

    monkeypatch.setattr(torch, "save", write_a_part)
    with pytest.raises(KeyboardInterrupt):
        mnist_cnn.save({"epoch": 2}, path)
    assert mnist_cnn.load(path) == {"epoch": 1}


def test_save_replaces_nothing_but_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="fifo is not a regular file"):
        mnist_cnn.save({}, tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()


# ---- The command line ----------------------------------------------------------------


def test_the_script_alone_in_a_folder_trains_stops_resumes_and_evaluates(
    params, tmp_path
):
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, "mnist_cnn.py", f"--data-dir={params.data_dir}"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI job may ignore it
    training = subprocess.Popen(
        [*command, "--validation-size=100", "--num-epochs=9"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not training.stdout.readline().startswith("Epoch 2/9 - "):
        assert training.poll() is None
    training.send_signal(signal.SIGINT)
    _, errors = training.communicate()
    assert training.returncode == 130
    assert re.fullmatch(r"\nStopped\. --resume continues .*\.\n", errors)

    backend = "module://not_installed"  # as a notebook may leave it
    result = run(*command, "--resume", cwd=tmp_path, MPLBACKEND=backend)
    assert (result.returncode, result.stderr) == (0, "")  # no bar in a log file
    number = r"(\d+\.\d\d)%"
    lines = re.search(
        r"Model Summary:\n[\s\S]*"
        r"Continuing after epoch .* validation_size=100, .*\n[\s\S]*"
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
    history = json.loads((tmp_path / "best_mnist_model_history.json").read_text())
    assert [metrics["epoch"] for metrics in history] == list(range(1, 10))
    assert best_validation == max(metrics["validation_accuracy"] for metrics in history)

    result = run(*command, "--evaluate", cwd=tmp_path)
    of_digits = re.findall(rf"^Digit \d: {number} of 20", result.stdout, re.MULTILINE)
    assert np.mean([float(accuracy) for accuracy in of_digits]) == pytest.approx(tested)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"best_mnist_model_curves.png", "best_mnist_model_mistakes.png"} <= files


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--num-epochs 0", "num_epochs is 0, but must be at least 1"),
        ("--num-epochs many", "argument --num-epochs: invalid int value: 'many'"),
        ("--epochs 3", "unrecognized arguments: --epochs 3"),
        ("--device gpu", "device gpu cannot be used"),
        ("--device cuda:99", "device cuda:99 cannot be used"),
        ("--learning-rate 1e20", "diverged in epoch 1: lower learning_rate"),
        ("--resume", "No such file or directory: 'best_mnist_model.pth.resume'"),
        ("--evaluate", "No such file or directory: 'best_mnist_model.pth'"),
    ],
)
def test_a_wrong_flag_is_explained_in_a_line(
    flags, complaint, params, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags += f" --validation-size 100 --data-dir {params.data_dir}"
    monkeypatch.setattr(sys, "argv", ["mnist_cnn.py", *flags.split()])
    try:
        status = mnist_cnn.main()
    except SystemExit as stop:  # argparse's
        status = stop.code
    assert status == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
