"""Tests of mnist_cnn.py and of the checkpoint that it comes with, on real MNIST.

Tests that need MNIST are skipped where it cannot be had; in CI they fail instead.
"""

import gzip
import io
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.ndimage import affine_transform
from torch import Tensor, nn

import digits
import mnist_cnn
from mnist_cnn import EpochMetrics, HyperParameters, TinyCNN

MODULE = Path(mnist_cnn.__file__)
CHECKPOINT = MODULE.with_name("best_mnist_model.pth")
PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

# Input and output channels of each 3x3 convolution, channels of each BatchNorm.
CONVOLUTIONS = {"conv1.0": (1, 4), "conv1.2": (4, 8), "conv2.0": (8, 12), "conv2.3": (12, 16)}
CONVOLUTIONS |= {"conv3.0": (16, 20), "conv3.4": (20, 16), "conv4.0": (16, 16)}
BATCH_NORMS = {"conv2.1": 12, "conv2.4": 16, "conv3.1": 20, "conv3.5": 16, "conv4.1": 16}


def mnist() -> HyperParameters:
    """The defaults, where MNIST is there or can be downloaded."""
    params = HyperParameters(data_dir=Path(HyperParameters().data_dir).resolve())
    try:
        mnist_cnn.load_images(params, train=True)
    except FileNotFoundError as error:
        (pytest.fail if "CI" in os.environ else pytest.skip)(str(error))
    return params


params = pytest.fixture(mnist, scope="session", name="params")


@pytest.fixture
def small_mnist(params, monkeypatch):
    """One epoch on 1,000 training images, with 1,000 more for validation and 500 for the test."""
    use_few_images(params, monkeypatch, 2_000)
    return replace(params, num_epochs=1, validation_size=1_000)


def use_few_images(params, monkeypatch, num_training):
    sets = {train: mnist_cnn.load_images(params, train) for train in (True, False)}
    sizes = {True: num_training, False: 500}
    few = {train: tuple(part[: sizes[train]] for part in sets[train]) for train in sets}
    monkeypatch.setattr(mnist_cnn, "load_images", lambda _, train: few[train])


def assert_equal(weights: object, expected: object) -> None:
    torch.testing.assert_close(weights, expected, rtol=0, atol=0, equal_nan=True)


# ---- The model ----------------------------------------------------------------------------------
def layers(kind: type[nn.Module]) -> list[nn.Module]:
    return [layer for layer in TinyCNN().modules() if isinstance(layer, kind)]


def test_parameter_count_is_19354_and_below_20000():
    count = sum(parameter.numel() for parameter in TinyCNN().parameters())
    assert count == 19_354 < 20_000


def test_uses_batch_normalization():
    assert [layer.num_features for layer in layers(nn.BatchNorm2d)] == list(BATCH_NORMS.values())


def test_uses_dropout():
    assert [layer.p for layer in layers(nn.Dropout2d) + layers(nn.Dropout)] == [0.25] * 3
    assert {layer.p for layer in TinyCNN(0.1).modules() if hasattr(layer, "p")} == {0.1}


def test_ends_in_a_fully_connected_layer():
    (linear,) = layers(nn.Linear)
    assert (linear.in_features, linear.out_features) == (784, 10)


def test_state_dict_has_the_published_keys_and_shapes():
    shapes = {name: (outputs, inputs, 3, 3) for name, (inputs, outputs) in CONVOLUTIONS.items()}
    shapes |= {"conv4.4": (16, 16, 1, 1), "fc.1": (10, 784)}
    expected = {f"{name}.weight": shape for name, shape in shapes.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    for name, channels in BATCH_NORMS.items():
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{statistic}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()
    assert {key: tuple(t.shape) for key, t in TinyCNN().state_dict().items()} == expected


def test_torchsummary_table(capsys):
    from torchsummary import summary

    summary(TinyCNN(), (1, 28, 28), device="cpu")
    rows = re.findall(r"^ +(\w+-\d+) +(\[.*\]) +[\d,]+$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 27
    assert (rows[0], rows[-1]) == (("Conv2d-1", "[-1, 4, 28, 28]"), ("Linear-27", "[-1, 10]"))


def reference_forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """TinyCNN in eval mode, written as one formula a layer from the published description."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            weights[f"{name}.{key}"].view(-1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = conv("conv1.2", conv("conv1.0", x).relu()).relu()
    x = norm("conv2.4", conv("conv2.3", norm("conv2.1", conv("conv2.0", x)).relu())).relu()
    x = F.max_pool2d(x, 2)
    x = norm("conv3.5", conv("conv3.4", norm("conv3.1", conv("conv3.0", x)).relu())).relu()
    x = F.max_pool2d(x, 2)
    x = conv("conv4.4", norm("conv4.1", conv("conv4.0", x)).relu()).relu()
    return x.flatten(1) @ weights["fc.1.weight"].T + weights["fc.1.bias"]


def test_shipped_checkpoint_is_more_than_99_4_percent_accurate(params, capsys):
    model, accuracy = mnist_cnn.load_and_evaluate_model(CHECKPOINT, params)
    assert 99.4 < accuracy <= 100
    assert not model.training
    assert capsys.readouterr().out == f"Current test accuracy: {accuracy:.2f}%\n"


def test_shipped_checkpoint_is_a_plain_state_dict_and_computes_what_it_means():
    weights = torch.load(CHECKPOINT, weights_only=True)  # no map_location: saved from the CPU
    for name, tensor in weights.items():
        assert tensor.device.type == "cpu"
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32)
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = mnist_cnn.load_checkpoint(CHECKPOINT, HyperParameters(device="cpu"))(images)
    torch.testing.assert_close(logits, reference_forward(weights, images), rtol=1e-4, atol=1e-4)


# ---- Configuration ------------------------------------------------------------------------------
def test_defaults_are_those_of_the_reference():
    params = HyperParameters()
    assert params.num_epochs <= 20
    reference = (20, 64, 0.0009, 0.25, 42)
    assert tuple(getattr(params, f.name) for f in fields(params))[:5] == reference


def test_numpy_numbers_and_paths_are_taken_for_what_they_are():
    given = {"num_epochs": np.int64(5), "learning_rate": np.float32(0.5), "augmentation": 1}
    params = HyperParameters(**given, data_dir=Path("there"))
    expected = {"num_epochs": 5, "learning_rate": 0.5, "augmentation": 1.0, "data_dir": "there"}
    assert repr(params) == repr(HyperParameters(**expected))


WRONG = {
    "num_epochs": (0, 2.5, True),
    "batch_size": (-64, 10**30),
    "learning_rate": (0.0, math.inf, math.nan, "0.1"),
    "dropout_rate": (-0.1, 1.0),
    "random_seed": (-1, 2**32),
    "peak_factor": (0.5, math.inf),
    "augmentation": (-0.1, 6.1),
    "validation_size": (-1, 60_000),
    "synthetic": (1,),
    "precision": ("float16",),
    "data_dir": (None,),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_wrong_value_is_named_with_its_rule(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}; it must be "):
        HyperParameters(**{name: value})


# ---- Data ---------------------------------------------------------------------------------------
def test_normalized_training_images_have_mean_0_and_sd_1(params):
    images, labels = mnist_cnn.load_images(params, train=True)
    assert (images.shape, images.dtype) == ((60_000, 1, 28, 28), torch.uint8)
    sizes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == sizes  # known of MNIST
    normalized = mnist_cnn.normalize(images)
    assert normalized.mean().item() == pytest.approx(0, abs=2e-4)
    assert normalized.std().item() == pytest.approx(1, abs=2e-4)


def test_validation_split_is_apart_from_training_and_from_the_seed(params):
    cpu = torch.device("cpu")
    (images, _), (held_out, labels), _ = mnist_cnn.load_splits(params, cpu)
    assert (len(images), len(held_out)) == (55_000, 5_000)
    _, (_, other_labels), _ = mnist_cnn.load_splits(replace(params, random_seed=1), cpu)
    assert torch.equal(labels, other_labels)
    whole = mnist_cnn.load_images(params, train=True)[0]
    assert images.long().sum() + held_out.long().sum() == whole.long().sum()


@pytest.mark.parametrize("chances", [*np.eye(6), *-np.eye(6), [0.5, -1, 1, -0.7, 0.3, 1]], ids=str)
def test_augment_is_scipys_affine_transform(params, monkeypatch, chances):
    images = mnist_cnn.load_images(params, train=False)[0][:5].float()
    uniform = (torch.tensor(chances).float()[:, None] + 1) / 2
    monkeypatch.setattr(torch, "rand", lambda *size, **_: uniform.expand(size))
    turn, size, stretch, shear, *shift = chances * np.array([math.pi / 12, 0.15, 1, 0.25, 2, 2])
    turned = [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]  # (y, x)
    matrix = (
        np.array(turned) @ [[1, 0], [shear, 1]] @ np.diag(1.12 ** np.array([-stretch, stretch]))
    )
    matrix /= 1 + size
    offset = np.array(shift[::-1]) + 13.5 - matrix @ [13.5, 13.5]
    for image, warped in zip(images, mnist_cnn.augment(images, 1.0), strict=True):
        expected = affine_transform(image[0], matrix, offset, order=1, mode="grid-constant")
        np.testing.assert_allclose(warped[0], expected, atol=0.01)
    torch.testing.assert_close(mnist_cnn.augment(images, 0.0), images, rtol=0, atol=0.01)


def copy_of_mnist(params, folder):
    """Its MNIST/raw, with nothing but the extracted files."""
    raw, archives = Path(params.data_dir, "MNIST/raw"), shutil.ignore_patterns("*.gz")
    return shutil.copytree(raw, folder / "MNIST/raw", ignore=archives)


def altered(content: bytes, position: int = 5_000) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_damaged_data_is_named_with_the_remedy(params, tmp_path, monkeypatch):
    images = copy_of_mnist(params, tmp_path) / "t10k-images-idx3-ubyte"
    content = images.read_bytes()
    archive, packed = images.with_name(f"{images.name}.gz"), gzip.compress(content, 1)
    for path, whole in ((images, content), (archive, packed)):
        for damaged in (altered(whole), whole[:-100], b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"^{path} is damaged: delete it"):
                mnist_cnn.load_images(HyperParameters(data_dir=tmp_path), train=False)
        images.unlink(missing_ok=True)
    archive.write_bytes(packed)  # which will do, also below the home folder
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("MNIST_DATA_DIR", f"~/{tmp_path.name}")
    read = mnist_cnn.load_images(HyperParameters(), train=False)
    assert_equal(read, mnist_cnn.load_images(params, train=False))


def test_missing_data_without_a_network(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # where nobody answers
    checkpoint = str(tmp_path / "model.pth")
    assert mnist_cnn.main(["--data-dir", str(tmp_path), "--checkpoint", checkpoint]) == 2
    pattern = f"error: MNIST is not in {tmp_path}/MNIST/raw .* MNIST_DATA_DIR, .*--synthetic\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert list((tmp_path / "MNIST/raw").iterdir()) == []


# ---- Training -----------------------------------------------------------------------------------
def test_evaluate_model_counts_and_averages():
    class Indifferent(nn.Module):
        """Equal logits: a loss of ln 10, and 0 as the first of the largest."""

        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 10)

    images, labels = torch.zeros(500, 1, 28, 28, dtype=torch.uint8), torch.arange(500) % 8
    loss, accuracy = mnist_cnn.evaluate_model(Indifferent(), images, labels)
    assert loss == pytest.approx(math.log(10))
    assert accuracy == pytest.approx(100 * 63 / 500)
    assert all(map(math.isnan, mnist_cnn.evaluate_model(Indifferent(), images[:0], labels[:0])))


def epoch_metrics(epoch: int, validation_loss: float, validation_accuracy: float) -> EpochMetrics:
    test = 100.0 - epoch  # of no influence
    return EpochMetrics(epoch, 0.1, 97.0, validation_loss, validation_accuracy, test, 0.001)


def test_kept_epoch_is_the_best_on_validation():
    validation = [(0.01, 99.1), (0.04, 99.2), (0.03, 99.2), (0.02, 99.0)]
    history = [epoch_metrics(i, *metrics) for i, metrics in enumerate(validation, start=1)]
    assert mnist_cnn.kept_epoch(history).epoch == 3


def test_learning_rate_rises_tenfold_then_falls_and_dropout_falls_to_0():
    params = HyperParameters(num_epochs=5, batch_size=4, device="cpu")
    run = mnist_cnn.Run(params, torch.device("cpu"), num_images=80)
    seeds, rates, dropout = set(), [run.optimizer.param_groups[0]["lr"]], []
    run.optimizer.register_step_post_hook(lambda *_: rates.append(run.schedule.get_last_lr()[0]))
    training_set = torch.zeros(80, 1, 28, 28, dtype=torch.uint8), torch.arange(80) % 10
    for _ in range(5):
        mnist_cnn.train_epoch(run, training_set, params)
        seeds.add(torch.initial_seed())
        run.history.append(epoch_metrics(0, 0.0, 0.0))
        dropout.append({layer.p for layer in run.model.modules() if hasattr(layer, "p")})
    assert len(seeds) == 5
    assert [rate for (rate,) in dropout] == pytest.approx([0.05, 0.0375, 0.025, 0.0125, 0])
    peak = rates.index(max(rates))
    assert (rates[0], rates[peak]) == (pytest.approx(0.0009), pytest.approx(0.009))
    assert peak == pytest.approx(30, abs=1)
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-6


def test_mistakes_are_counted_and_shown_with_the_surest_first():
    labels = torch.tensor([3, 3, 5, 7, 7])
    guesses = torch.tensor([5, 5, 5, 1, 7])
    logits = F.one_hot(guesses, 10) * torch.tensor([1.0, 3.0, 9.0, 2.0, 9.0]).view(-1, 1)
    figure = mnist_cnn.plot_mistakes(torch.zeros(5, 1, 28, 28), labels, logits)
    confusion, *pictures = figure.get_axes()
    cells = {text.get_position(): int(text.get_text()) for text in confusion.texts}
    assert cells == {(5, 3): 2, (1, 7): 1}  # guess across, truth down
    sure = [100 * math.e**x / (math.e**x + 9) for x in (3, 2, 1)]
    pairs = zip(["3 as 5", "7 as 1", "3 as 5"], sure, strict=True)
    titles = [axes.get_title() for axes in pictures if axes.get_title()]
    assert titles == [f"{pair}, {percent:.0f}%" for pair, percent in pairs]
    assert figure.get_suptitle().startswith("3 of 5 images missed")


# ---- Checkpoints --------------------------------------------------------------------------------
def test_an_unusable_checkpoint_path_stops_before_training(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a.pth.tmp").mkdir()
    (tmp_path / "b.pth.resume").mkdir()
    for name in ("", "missing/model.pth", "fifo", "a.pth", "b.pth", "x" * 250):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            mnist_cnn.train_model(HyperParameters(data_dir="nowhere"), tmp_path / name)
    assert (tmp_path / "fifo").is_fifo()


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "bad.pth"
    whole = CHECKPOINT.read_bytes()
    contents = [whole[:size] for size in [*range(0, len(whole), 997), len(whole) - 1]]
    contents += [altered(whole, 50_000), b"not a checkpoint", b"\x80\x02N.", os.urandom(9_000)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} is not a dict of tensors"):
            mnist_cnn.load_checkpoint(path, HyperParameters())
    for path in (tmp_path, tmp_path / "nothing.pth"):
        with pytest.raises(OSError, match=str(path)):
            mnist_cnn.load_and_evaluate_model(path, HyperParameters())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda _: nn.Linear(784, 10).state_dict(), 'Missing key.* "conv1.0.weight"'),
        (lambda w: w | {"fc.1.bias": w["fc.1.bias"][:9]}, "fc.1.bias: .* torch.Size"),
        (lambda w: w | {"fc.1.bias": w["fc.1.bias"].half()}, "fc.1.bias is not torch.float32"),
        (lambda w: w | {"fc.1.bias": w["fc.1.bias"].log()}, "fc.1.bias .* NaN or infinite values"),
        (lambda w: w | {"fc.1.bias": 1}, "fc.1.bias"),
        (lambda w: {"model": w, "epoch": 3}, "Missing key"),
        (lambda w: {"model_state_dict": 3}, "int"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, complaint, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(change(torch.load(CHECKPOINT)), path)
    with pytest.raises(ValueError, match=rf"^{path} does not hold .* TinyCNN: .*{complaint}.*$"):
        mnist_cnn.load_checkpoint(path, HyperParameters())
    # But those of a parallel model fit, and wrapped ones.
    parallel = {f"module.{name}": tensor for name, tensor in torch.load(CHECKPOINT).items()}
    torch.save({"model_state_dict": parallel, "epoch": 3}, path)
    assert mnist_cnn.load_checkpoint(path, HyperParameters())


def test_a_pickle_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"conv1.0.weight": Payload()}, tmp_path / "payload.pth")
    with pytest.raises(ValueError, match=r"payload\.pth is not a dict of tensors"):
        mnist_cnn.load_checkpoint(tmp_path / "payload.pth", HyperParameters())
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    mnist_cnn.save(TinyCNN().state_dict(), path)
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=f"cannot write {path}: No space left"):
        mnist_cnn.save(TinyCNN().state_dict(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def crash_in_epoch_3(monkeypatch, params, path):
    def train_or_crash(run: mnist_cnn.Run, *arguments: Any) -> tuple[float, float]:
        if len(run.history) == 2:
            raise RuntimeError("a bug")
        return train_epoch(run, *arguments)

    train_epoch = mnist_cnn.train_epoch
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(mnist_cnn, "train_epoch", train_or_crash)
        mnist_cnn.train_model(params, path)


@pytest.mark.parametrize("kept", ["first", "last"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    kept, small_mnist, tmp_path, monkeypatch, capsys
):
    params = replace(small_mnist, num_epochs=3)
    if kept == "first":
        monkeypatch.setattr(mnist_cnn, "kept_epoch", lambda history: history[0])
    else:
        params = replace(params, validation_size=0)
    whole, history = mnist_cnn.train_model(params, tmp_path / "whole.pth")
    kept_accuracy = mnist_cnn.evaluate_model(whole, *mnist_cnn.load_images(params, False))[1]
    assert kept_accuracy == mnist_cnn.kept_epoch(history).test_accuracy
    if kept == "last":
        output = capsys.readouterr().out
        assert "Val Acc" not in output
        assert output.endswith("from epoch 3 with validation accuracy: none taken\n")
    mnist_cnn.plot_history(history).savefig(io.BytesIO())  # NaN too
    torch.rand(5)  # whatever is drawn elsewhere
    path = tmp_path / "model.pth"
    path.write_text("of an earlier run")
    crash_in_epoch_3(monkeypatch, params, path)
    assert path.read_text() == "of an earlier run"

    complaint = r"cannot resume .*: it had {'random_seed': 42}, not {'random_seed': 1}$"
    with pytest.raises(ValueError, match=complaint):
        mnist_cnn.train_model(replace(params, random_seed=1), path, resume=True)

    same_device = replace(params, device=mnist_cnn.pick_device(params).type)  # in place of "auto"
    resumed, resumed_history = mnist_cnn.train_model(same_device, path, resume=True)
    assert_equal(resumed_history, history)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert {file.name for file in tmp_path.iterdir()} == {"whole.pth", "model.pth"}


def test_something_else_cannot_be_resumed(small_mnist, tmp_path, monkeypatch):
    params, path = replace(small_mnist, num_epochs=3), tmp_path / "model.pth"
    crash_in_epoch_3(monkeypatch, params, path)
    run_path = tmp_path / "model.pth.resume"
    state = torch.load(run_path)
    wrong = [{key: state[key] for key in state if key != missing} for missing in state]
    wrong += [state | {"run": 5}, state | {"best": {}}, state | {"history": state["history"][:1]}]
    wrong += [state | {"history": [(1, 2)] * 2}, torch.load(CHECKPOINT)]
    for content in wrong:
        torch.save(content, run_path)
        with pytest.raises(ValueError, match=rf"^{run_path} is not an interrupted run$"):
            mnist_cnn.train_model(params, path, resume=True)


def test_a_diverging_run_stops_and_keeps_the_best(small_mnist, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.pth"
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 1: .* lower learning_rate"):
        mnist_cnn.train_model(replace(small_mnist, learning_rate=1e20), path)
    assert "Stopped after epoch 0. There is nothing to keep\n" in capsys.readouterr().out

    def diverge_in_epoch_2(run: mnist_cnn.Run, *arguments: Any) -> tuple[float, float]:
        metrics = train_epoch(run, *arguments)
        if len(run.history) == 1:
            nn.init.constant_(next(run.model.parameters()), math.inf)  # by the last step
        return metrics

    train_epoch = mnist_cnn.train_epoch
    monkeypatch.setattr(mnist_cnn, "train_epoch", diverge_in_epoch_2)
    with pytest.raises(FloatingPointError, match="in epoch 2"):
        mnist_cnn.train_model(replace(small_mnist, num_epochs=2), path)
    stopped = f"Stopped after epoch 1. {path} has the best so far, epoch 1\n"
    assert capsys.readouterr().out.endswith(stopped)
    mnist_cnn.load_checkpoint(path, small_mnist)


def test_a_reader_that_goes_away_stops_the_run(small_mnist, tmp_path, monkeypatch):
    def print_to_reader(line: str, **_: Any) -> None:
        if line.startswith("Epoch"):
            raise BrokenPipeError

    path = tmp_path / "model.pth"
    monkeypatch.setattr(mnist_cnn, "print", print_to_reader, raising=False)
    with pytest.raises(BrokenPipeError):
        mnist_cnn.train_model(small_mnist, path)
    mnist_cnn.load_checkpoint(path, small_mnist)
    assert (tmp_path / "model.pth.resume").exists()


def test_a_signal_stops_the_run_and_keeps_what_it_has(params, tmp_path):
    flags = ["--validation-size", "59000", "--data-dir", params.data_dir]
    run = subprocess.Popen([sys.executable, MODULE, *flags], cwd=tmp_path, **PIPES)
    while not run.stdout.readline().startswith("Epoch 1/20 "):
        assert run.poll() is None
    run.send_signal(signal.SIGHUP)  # as a closed terminal does
    output, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (128 + signal.SIGHUP, "")
    path = tmp_path / "best_mnist_model.pth"
    assert output.startswith(f"Stopped after epoch 1. {path} has the best so far, epoch 1;")
    mnist_cnn.load_checkpoint(path, params)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.resume"}


# ---- Several processes --------------------------------------------------------------------------
def join(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if count > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)


def in_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_cnn"])
    processes = [context.Process(target=work, args=(i, count, *arguments)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def save_gradients(rank: int, count: int, folder: Path) -> None:
    """Of one step on 61 images, without what processes do apart: warp, dropout, BatchNorm."""
    join(rank, count, folder)
    params = HyperParameters(
        batch_size=61, device="cpu", precision="float32", augmentation=0.0, dropout_rate=0.0
    )
    run = mnist_cnn.Run(params, torch.device("cpu"), num_images=61)
    for layer in run.model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().train = lambda _: None  # stays so
    training_set = torch.randint(256, (61, 1, 28, 28)).byte(), torch.randint(10, (61,))
    loss, accuracy = mnist_cnn.train_epoch(run, training_set, params)
    results = {name: weight.grad for name, weight in run.model.named_parameters()}
    results |= {"loss": torch.tensor(loss), "accuracy": torch.tensor(accuracy)}
    if rank == 0:
        torch.save(results, folder / f"of_{count}.pt")


def test_the_gradient_of_several_processes_is_that_of_one(tmp_path):
    for size in (1, 3):
        in_processes(size, save_gradients, tmp_path)
    one, several = (torch.load(tmp_path / f"of_{size}.pt") for size in (1, 3))
    torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-6)


def save_a_run(rank: int, count: int, folder: Path, params: HyperParameters) -> None:
    """What a process has after one epoch on a picture that is always the same, but for its warp."""
    join(rank, count, folder)
    picture = torch.randint(256, (1, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    training_set = picture.expand(192, -1, -1, -1), torch.arange(192) % 10
    splits = [training_set, *torch.load(folder / "splits.pt")]
    mnist_cnn.load_splits = lambda *_: splits
    augment, warped = mnist_cnn.augment, []
    mnist_cnn.augment = lambda *arguments: warped.append(augment(*arguments)) or warped[-1]
    model, history = mnist_cnn.train_model(params, folder / "model.pth")
    torch.save([model.state_dict(), history[0][:], warped[0][0]], folder / str(rank))


@pytest.mark.parametrize(("count", "num_validation"), [(2, 1), (3, 50)])
def test_processes_end_an_epoch_alike_and_report_all_images(count, num_validation, tmp_path):
    torch.manual_seed(1)
    splits = [
        (torch.randint(256, (size, 1, 28, 28)).byte(), torch.randint(10, (size,)))
        for size in (num_validation, 70)
    ]
    torch.save(splits, tmp_path / "splits.pt")
    params = HyperParameters(num_epochs=1, batch_size=48, device="cpu", precision="float32")
    in_processes(count, save_a_run, tmp_path, params)
    (weights, history, warp), *others = (torch.load(tmp_path / str(i)) for i in range(count))
    for other_weights, other_history, other_warp in others:
        assert_equal(other_weights, weights)
        assert other_history == history
        assert not torch.equal(other_warp, warp)
    assert_equal(torch.load(tmp_path / "model.pth"), dict(weights))
    model = TinyCNN().eval()
    model.load_state_dict(weights)
    metrics = EpochMetrics(*history)
    for (images, labels), accuracy in zip(splits, metrics[4:6], strict=True):
        logits = model((images / 255 - 0.1307) / 0.3081)
        right = (logits.argmax(1) == labels).sum().item()
        assert accuracy == pytest.approx(100 * right / len(labels))
        if len(labels) == num_validation:
            loss = F.cross_entropy(logits, labels).item()
            assert metrics.validation_loss == pytest.approx(loss, rel=1e-4)


SMALL_SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(MODULE.parent)!r})
import mnist_cnn

print("process", os.getpid(), flush=True)
load_images = mnist_cnn.load_images
mnist_cnn.load_images = lambda params, train: [part[:2_000] for part in load_images(params, train)]
sys.exit(mnist_cnn.main(["--num-epochs", "4", "--validation-size", "500", *sys.argv[1:]]))
"""


def test_torchrun_ends_with_a_killed_process_and_one_carries_on(params, tmp_path, monkeypatch):
    monkeypatch.setenv("MNIST_DATA_DIR", params.data_dir)
    script = tmp_path / "small.py"
    script.write_text(SMALL_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.Popen([*torchrun, script], cwd=tmp_path, **PIPES)
    output = ""
    while "Epoch 2/4" not in output:
        output += run.stdout.readline()
        assert run.poll() is None, output
    assert output.count("Epoch 1/4") == output.count("Training on") == 1
    processes = [int(number) for number in re.findall(r"^process (\d+)$", output, re.MULTILINE)]
    assert len(processes) == 2
    os.kill(processes[1], signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    resumed = subprocess.run([sys.executable, script, "--resume"], cwd=tmp_path, **PIPES)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"^Carrying on after epoch [123]$", resumed.stdout, re.MULTILINE)
    mnist_cnn.load_checkpoint(tmp_path / "best_mnist_model.pth", params)

    evaluated = subprocess.run([*torchrun, script, "evaluate"], cwd=tmp_path, **PIPES)
    assert evaluated.stdout.count("Current test accuracy") == 1


# ---- The command line ---------------------------------------------------------------------------
def test_a_short_run_learns_and_says_so(params, tmp_path):
    flags = "--num-epochs 1 --validation-size 50000 --checkpoint digits.pth --data-dir"
    command = [sys.executable, MODULE, *flags.split(), params.data_dir]
    run = subprocess.run(command, cwd=tmp_path, **PIPES)
    assert (run.returncode, run.stderr) == (0, "")  # no progress bar in a log file
    assert "Total params: 19,354" in run.stdout
    percent = r"(\d\d\.\d\d)%"
    lines = re.search(
        rf"^Epoch 1/1 - Loss: \d\.\d{{4}}, Train Acc: {percent}, Val Acc: {percent}, "
        rf"Test Acc: {percent}\n"
        rf"Loaded best model from epoch 1 with validation accuracy: {percent}\n"
        rf"(?:\d: {percent}, .* missed\n){{10}}Drawn in digits_mistakes.png\n"
        "Evaluating saved best model:\n"
        rf"Current test accuracy: {percent}\n\Z",
        run.stdout,
        re.MULTILINE,
    )
    assert lines, run.stdout
    _, validation, test, best_validation, _, saved_test = map(float, lines.groups())
    assert (validation, test) == (best_validation, saved_test)
    assert min(validation, test) > 95
    files = ["digits.pth", "digits_curves.png", "digits_mistakes.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    TinyCNN().load_state_dict(torch.load(tmp_path / "digits.pth"))


def test_a_synthetic_run_needs_no_mnist_and_says_what_it_is(tmp_path, monkeypatch, capsys):
    draw = digits.draw_digits
    monkeypatch.setattr(digits, "draw_digits", lambda count, seed: draw(count // 15, seed))
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "best_mnist_model.pth"
    kept.write_text("of an earlier run")
    flags = "--synthetic --num-epochs 1 --validation-size 500 --data-dir nowhere"
    assert mnist_cnn.main(flags.split()) == 0
    output = capsys.readouterr().out
    assert re.search(r"^Training on .*, synthetic digits(; on a busy .*THREADS=1)?$", output, re.M)
    assert re.search(r"\nCurrent test accuracy: (9\d|100)\.\d\d% of synthetic digits\n\Z", output)
    assert mnist_cnn.main(["evaluate", "--synthetic"]) == 0  # the model trained just now
    assert kept.read_text() == "of an earlier run"
    with pytest.raises(ValueError, match=r"best_mnist_model\.pth is for MNIST"):
        mnist_cnn.train_model(HyperParameters(num_epochs=1, synthetic=True), kept)


def test_evaluate_counts_the_mistakes_of_each_digit_before_it_draws(params, tmp_path, capsys):
    path = tmp_path / "model.pth"
    shutil.copy(CHECKPOINT, path)
    picture = tmp_path / "model_mistakes.png"
    picture.mkdir()  # cannot be written
    assert mnist_cnn.main(["evaluate", str(path), "--data-dir", params.data_dir]) == 2
    output, error = capsys.readouterr()
    assert re.fullmatch(f"error: .*{picture}.*\n", error)
    accuracy = float(re.match(r"Current test accuracy: (\d\d\.\d\d)%\n", output)[1])
    counts = re.findall(r"^(\d): (\S+)%, (\d+) of (\d+) missed$", output, re.MULTILINE)
    sizes = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert [int(total) for *_, total in counts] == sizes
    assert sum(int(missed) for _, _, missed, _ in counts) == round(100 * (100 - accuracy))


def test_the_readme_snippets_work(params, tmp_path, monkeypatch):
    from PIL import Image

    use_few_images(params, monkeypatch, 6_000)
    monkeypatch.chdir(tmp_path)
    shutil.copy(CHECKPOINT, tmp_path)
    images, labels = mnist_cnn.load_images(params, train=False)
    for image, name in zip(images, ("seven.jpg", "scan.png"), strict=False):
        Image.fromarray(255 - image[0].numpy()).resize((200, 200)).save(name)
    readme = MODULE.with_name("README.md").read_text()
    variables: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(snippet, variables)
    assert variables["accuracy"] > 99
    assert [metrics.epoch for metrics in variables["history"]] == [1, 2, 3, 4, 5]
    assert torch.equal(variables["digits"], labels[:2])


WRONG_FLAGS = {
    "--num-epochs 0": "num_epochs is 0; it must be 1 or more",
    "--batch-size many": "argument --batch-size: invalid int value: 'many'",
    "--epochs 3": "unrecognized arguments: --epochs",
    "evalute": "evaluate [CHECKPOINT] or predict FILE... is expected",
    "--device cuda:9": "device 'cuda:9' is not there: ",
    "--device gpu": "device 'gpu' is not there: ",
    "--device meta": "device 'meta' is not there: ",
    "--resume": "nothing to resume: there is no ",
    "--checkpoint missing/model.pth": "No such file or directory",
}


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_a_wrong_flag_is_explained_without_a_traceback(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = mnist_cnn.main(flags.split())
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2
    assert WRONG_FLAGS[flags] in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_import_does_nothing(tmp_path):
    code = (
        "import sys, mnist_cnn\n"
        "assert not {'torchvision', 'matplotlib', 'PIL', 'torchsummary', 'scipy'} & {*sys.modules}"
    )
    environment = os.environ | {"PYTHONPATH": str(MODULE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, **PIPES)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
