"""Tests of mnist_cnn.py and of the checkpoint that it comes with, on real MNIST.

Tests that need MNIST are skipped where it cannot be had; in CI they fail instead.
"""

import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mnist_cnn
from mnist_cnn import EpochMetrics, HyperParameters, TinyCNN

MODULE = Path(mnist_cnn.__file__)
CHECKPOINT = MODULE.with_name("best_mnist_model.pth")

# Each convolution's and linear layer's weight shape, then each BatchNorm's number of channels.
WEIGHTS = {
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
BATCH_NORMS = {"conv2.1": 12, "conv2.4": 16, "conv3.1": 20, "conv3.5": 16, "conv4.1": 16}


def mnist() -> HyperParameters:
    """The defaults, where MNIST is there or can be downloaded."""
    params = HyperParameters()
    try:
        mnist_cnn.load_images(params, train=True)
    except FileNotFoundError as error:
        (pytest.fail if "CI" in os.environ else pytest.skip)(str(error))
    return params


params = pytest.fixture(mnist, scope="session", name="params")


@pytest.fixture
def small_mnist(params: HyperParameters, monkeypatch: pytest.MonkeyPatch) -> HyperParameters:
    """One epoch on 1,000 training images, with 1,000 more for validation and 500 for the test."""
    sets = {train: mnist_cnn.load_images(params, train) for train in (True, False)}
    sizes = {True: 2_000, False: 500}
    monkeypatch.setattr(
        mnist_cnn,
        "load_images",
        lambda _, train: tuple(tensor[: sizes[train]] for tensor in sets[train]),
    )
    return replace(params, num_epochs=1, validation_size=1_000)


def run_script(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    data_dir = str(Path(HyperParameters().data_dir).resolve())
    return subprocess.run(
        [sys.executable, MODULE, *arguments],
        cwd=cwd,
        env=os.environ | {"MNIST_DATA_DIR": data_dir} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- The model ----------------------------------------------------------------------------------


def layers(kind: type[nn.Module]) -> list[nn.Module]:
    return [layer for layer in TinyCNN().modules() if isinstance(layer, kind)]


def test_parameter_count_is_19354_and_below_20000() -> None:
    count = sum(parameter.numel() for parameter in TinyCNN().parameters())
    assert count < 20_000
    assert count == 19_354


def test_uses_batch_normalization() -> None:
    assert [layer.num_features for layer in layers(nn.BatchNorm2d)] == list(BATCH_NORMS.values())


def test_uses_dropout() -> None:
    assert [layer.p for layer in layers(nn.Dropout2d) + layers(nn.Dropout)] == [0.25] * 3
    assert {layer.p for layer in TinyCNN(0.1).modules() if hasattr(layer, "p")} == {0.1}


def test_ends_in_a_fully_connected_layer() -> None:
    (linear,) = layers(nn.Linear)
    assert linear is not None
    assert (linear.in_features, linear.out_features) == (784, 10)


def test_state_dict_has_the_published_keys_and_shapes() -> None:
    expected = {f"{name}.weight": shape for name, shape in WEIGHTS.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in WEIGHTS.items()}
    for name, channels in BATCH_NORMS.items():
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{statistic}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()
    assert {key: tuple(t.shape) for key, t in TinyCNN().state_dict().items()} == expected


def test_torchsummary_table(capsys: pytest.CaptureFixture[str]) -> None:
    from torchsummary import summary

    summary(TinyCNN(), (1, 28, 28), device="cpu")
    table = capsys.readouterr().out
    rows = re.findall(r"^ +(\w+-\d+) +(\[.*\]) +([\d,]+)$", table, re.MULTILINE)
    assert rows[0] == ("Conv2d-1", "[-1, 4, 28, 28]", "40")
    assert rows[-1] == ("Linear-27", "[-1, 10]", "7,850")
    parameters = " ".join(row[2].replace(",", "") for row in rows)
    assert parameters == (
        "40 0 296 0 876 24 0 1744 32 0 0 2900 40 0 0 2896 32 0 0 2320 32 0 0 272 0 0 7850"
    )
    assert "Trainable params: 19,354" in table


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


def test_loads_a_state_dict_written_elsewhere_and_computes_what_it_means(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {
        key: torch.rand(tensor.shape) if tensor.is_floating_point() else tensor
        for key, tensor in TinyCNN().state_dict().items()
    }
    weights = {k: t - 0.5 if k.endswith(("weight", "bias")) else t for k, t in weights.items()}
    torch.save(weights, tmp_path / "elsewhere.pth")
    model = mnist_cnn.load_checkpoint(tmp_path / "elsewhere.pth", HyperParameters()).cpu()
    images = torch.randn(8, 1, 28, 28)
    logits = model(images)
    assert logits.shape == (8, 10)
    torch.testing.assert_close(logits, reference_forward(weights, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("blocks", "size"), [(1, 5), (2, 10), (3, 20), (4, 28)])
def test_receptive_field(blocks: int, size: int) -> None:
    """How far the gradient of one unit reaches back into an image larger than the field."""
    torch.manual_seed(0)
    model = TinyCNN().eval()
    images = torch.randn(64, 1, 64, 64, requires_grad=True)
    features = nn.Sequential(*list(model.children())[:blocks])(images)
    middle = features.shape[-1] // 2
    features[:, :, middle, middle].sum().backward()
    reached = images.grad.abs().sum(dim=(0, 1)) > 0
    rows, columns = reached.nonzero().unbind(dim=1)
    assert rows.max() - rows.min() + 1 == size
    assert columns.max() - columns.min() + 1 == size


# ---- The shipped checkpoint ---------------------------------------------------------------------


def test_shipped_checkpoint_is_more_than_99_4_percent_accurate(
    params: HyperParameters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = replace(params, data_dir=str(Path(params.data_dir).resolve()))
    monkeypatch.chdir(tmp_path)  # from any working directory
    model, accuracy = mnist_cnn.load_and_evaluate_model(CHECKPOINT, params)
    assert 99.4 < accuracy <= 100
    assert not model.training
    assert capsys.readouterr().out == f"Current test accuracy: {accuracy:.2f}%\n"


def test_shipped_checkpoint_is_a_small_plain_state_dict() -> None:
    assert CHECKPOINT.stat().st_size < 120_000
    weights = torch.load(CHECKPOINT, weights_only=True)  # no map_location: saved from the CPU
    for name, tensor in weights.items():
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32)


# ---- Configuration ------------------------------------------------------------------------------


def test_defaults_are_those_of_the_reference() -> None:
    params = HyperParameters()
    assert params.num_epochs <= 20
    reference = (20, 64, 0.0009, 0.25, 42)
    assert tuple(getattr(params, f.name) for f in fields(params))[:5] == reference


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0),
        ("num_epochs", 2.5),
        ("num_epochs", True),
        ("synthetic", 1),
        ("batch_size", -64),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("learning_rate", "0.1"),
        ("dropout_rate", -0.1),
        ("dropout_rate", 1.0),
        ("random_seed", -1),
        ("random_seed", 2**32),
        ("precision", "float16"),
        ("peak_factor", 0.5),
        ("max_rotation", 181.0),
        ("max_shift", -1.0),
        ("max_scaling", 1.0),
        ("validation_size", 60_000),
        ("data_dir", None),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}; it must be "):
        HyperParameters(**{name: value})


# ---- Data ---------------------------------------------------------------------------------------


def test_normalized_training_images_have_mean_0_and_sd_1(params: HyperParameters) -> None:
    images, labels = mnist_cnn.load_images(params, train=True)
    assert (images.shape, images.dtype) == ((60_000, 1, 28, 28), torch.uint8)
    # The class sizes that MNIST is known to have.
    sizes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == sizes
    normalized = mnist_cnn.normalize(images)
    assert normalized.mean().item() == pytest.approx(0, abs=2e-4)
    assert normalized.std().item() == pytest.approx(1, abs=2e-4)


def test_validation_split_is_apart_from_training_and_from_the_seed(params: HyperParameters) -> None:
    cpu = torch.device("cpu")
    (images, _), (held_out, labels), _ = mnist_cnn.load_splits(params, cpu)
    assert (len(images), len(held_out)) == (55_000, 5_000)
    _, (_, other_labels), _ = mnist_cnn.load_splits(replace(params, random_seed=1), cpu)
    assert torch.equal(labels, other_labels)
    # Together the two are MNIST: every image once.
    both = sorted(image.numpy().tobytes() for image in torch.cat([images, held_out]))
    mnist = mnist_cnn.load_images(params, train=True)[0]
    assert both == sorted(image.numpy().tobytes() for image in mnist)


def blob_measures(images: Tensor) -> Tensor:
    """(4, N): x and y of the centre in pixels, angle in degrees, and size, from the moments."""
    weight = images[:, 0].double()
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    cx, cy = (weight * x).sum((1, 2)), (weight * y).sum((1, 2))
    dx, dy = x - cx.view(-1, 1, 1), y - cy.view(-1, 1, 1)
    xx, yy, xy = ((weight * product).sum((1, 2)) for product in (dx * dx, dy * dy, dx * dy))
    angle = torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2)
    return torch.stack([cx, cy, angle, (xx + yy).sqrt()])


@pytest.mark.parametrize(
    ("field", "strength", "changed"),
    [("max_shift", 2.0, [0, 1]), ("max_rotation", 10.0, [2]), ("max_scaling", 0.1, [3])],
)
def test_augment_changes_each_image_within_its_bounds(
    field: str, strength: float, changed: list[int]
) -> None:
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    blob = (255 * torch.exp(-((x / 4) ** 2) / 2 - (y / 2) ** 2 / 2)).expand(2_000, 1, 28, 28)
    still = HyperParameters(max_shift=0.0, max_rotation=0.0, max_scaling=0.0)
    torch.testing.assert_close(mnist_cnn.augment(blob, still), blob)

    before = blob_measures(blob)
    after = blob_measures(mnist_cnn.augment(blob, replace(still, **{field: strength})))
    change = after - before
    change[3] = after[3] / before[3] - 1
    for measure, values in enumerate(change):
        bound = strength if measure in changed else 0.0
        # 2,000 uniform draws come within 1 % of both ends, and blurring adds a little.
        assert values.max() == pytest.approx(bound, rel=0.05, abs=0.02)
        assert values.min() == pytest.approx(-bound, rel=0.05, abs=0.02)
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05, abs=0.02)


def copy_of_mnist(data_dir: str, folder: Path) -> Path:
    """A data_dir in folder whose test images can be changed, and its MNIST/raw."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist_cnn.MNIST_FILES:
        (raw / name).symlink_to(Path(data_dir, "MNIST", "raw", name).resolve())
    images = raw / "t10k-images-idx3-ubyte"
    content = images.read_bytes()
    images.unlink()
    images.write_bytes(content)
    return raw


def altered(content: bytes, position: int = 5_000) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def swapped(_: bytes) -> bytes:
    return Path(HyperParameters().data_dir, "MNIST/raw/train-images-idx3-ubyte").read_bytes()


@pytest.mark.parametrize("damage", [altered, lambda data: data[:-1], lambda _: b"", swapped])
def test_damaged_data_is_named_with_the_remedy(
    damage: Callable[[bytes], bytes],
    params: HyperParameters,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = copy_of_mnist(params.data_dir, tmp_path) / "t10k-images-idx3-ubyte"
    mnist_cnn.load_images(HyperParameters(data_dir=tmp_path), train=False)
    images.write_bytes(damage(images.read_bytes()))
    with pytest.raises(ValueError, match=f"{images} is damaged .*: delete it"):
        mnist_cnn.load_images(HyperParameters(data_dir=tmp_path), train=False)

    checkpoint = tmp_path / "model.pth"
    assert mnist_cnn.main(["--data-dir", str(tmp_path), "--checkpoint", str(checkpoint)]) == 2
    assert re.fullmatch(f"error: {images} is damaged .*\n", capsys.readouterr().err)
    assert not checkpoint.exists()


def test_missing_data_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # where nobody answers
    assert mnist_cnn.main(["--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        f"error: MNIST is not in {tmp_path}/MNIST/raw .* MNIST_DATA_DIR .*\n", error
    )


# ---- Training -----------------------------------------------------------------------------------


def test_evaluate_model_counts_and_averages() -> None:
    class Indifferent(nn.Module):
        """Equal logits: a loss of ln 10, and 0 as the first of the largest."""

        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 10)

    images, labels = torch.zeros(500, 1, 28, 28, dtype=torch.uint8), torch.arange(500) % 8
    loss, accuracy = mnist_cnn.evaluate_model(Indifferent(), images, labels)
    assert loss == pytest.approx(math.log(10))
    assert accuracy == pytest.approx(100 * 63 / 500)


def epoch_metrics(epoch: int, validation_loss: float, validation_accuracy: float) -> EpochMetrics:
    test_accuracy = 100.0 - epoch  # of no influence
    return EpochMetrics(
        epoch, 0.1, 97.0, validation_loss, validation_accuracy, test_accuracy, 0.001
    )


def test_kept_epoch_is_the_best_on_validation_and_the_last_without_it() -> None:
    history = [
        epoch_metrics(1, 0.01, 99.1),
        epoch_metrics(2, 0.04, 99.2),
        epoch_metrics(3, 0.03, 99.2),
        epoch_metrics(4, 0.02, 99.0),
    ]
    assert mnist_cnn.kept_epoch(history).epoch == 3
    without = [entry._replace(validation_accuracy=math.nan) for entry in history]
    assert mnist_cnn.kept_epoch(without).epoch == 4


def test_learning_rate_rises_tenfold_and_falls_to_nearly_0() -> None:
    params = HyperParameters(num_epochs=10, batch_size=64)
    run = mnist_cnn.new_run(params, torch.device("cpu"), num_images=100 * 64 - 1)
    rates = []
    for _ in range(1_000):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.schedule.step()
    peak = rates.index(max(rates))
    assert (rates[0], rates[peak]) == (pytest.approx(0.0009), pytest.approx(0.009))
    assert peak == pytest.approx(300, abs=1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-6


def test_dropout_falls_to_0_in_equal_steps() -> None:
    params = HyperParameters(num_epochs=5, batch_size=8, device="cpu")
    run = mnist_cnn.new_run(params, torch.device("cpu"), num_images=8)
    training_set = torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.arange(8)
    rates = []
    for _ in range(5):
        mnist_cnn.train_epoch(run, training_set, params)
        run.history.append(epoch_metrics(0, 0.0, 0.0))
        rates.append({layer.p for layer in run.model.modules() if hasattr(layer, "p")})
    assert [rate for (rate,) in rates] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0])


def test_same_seed_same_weights_to_the_bit(small_mnist: HyperParameters, tmp_path: Path) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # whatever was drawn before
        params = replace(small_mnist, random_seed=seed)
        return mnist_cnn.train_model(params, tmp_path / "model.pth")[0].state_dict()

    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.1.weight"], other["fc.1.weight"])


def test_without_validation_images_the_last_epoch_is_kept(
    small_mnist: HyperParameters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = replace(small_mnist, num_epochs=2, validation_size=0)
    model, history = mnist_cnn.train_model(params, tmp_path / "model.pth")
    output = capsys.readouterr().out
    assert "Val Acc" not in output
    assert "epoch 2 with validation accuracy: none taken\n" in output
    test_set = mnist_cnn.load_images(params, train=False)
    assert mnist_cnn.evaluate_model(model, *test_set)[1] == history[-1].test_accuracy
    mnist_cnn.plot_history(history).savefig(tmp_path / "curves.png")


def test_mistakes_are_counted_and_shown_with_the_surest_first() -> None:
    labels = torch.tensor([3, 3, 5, 7, 7])
    guesses = torch.tensor([5, 5, 5, 1, 7])
    logits = F.one_hot(guesses, 10) * torch.tensor([1.0, 3.0, 9.0, 2.0, 9.0]).view(-1, 1)
    figure = mnist_cnn.plot_mistakes(torch.zeros(5, 1, 28, 28), labels, logits)
    confusion, *pictures = figure.get_axes()
    cells = {text.get_position(): int(text.get_text()) for text in confusion.texts}
    assert cells == {(5, 3): 2, (1, 7): 1}  # guess across, truth down
    titles = [axes.get_title() for axes in pictures if axes.get_title()]
    sure = [100 * math.e**x / (math.e**x + 9) for x in (3, 2, 1)]
    assert titles == [
        f"{pair}, {percent:.0f}%"
        for pair, percent in zip(["3 as 5", "7 as 1", "3 as 5"], sure, strict=True)
    ]
    assert figure.get_suptitle() == "3 of 5 images missed, the surest mistakes first"


def test_an_unusable_checkpoint_path_stops_before_training(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "model.pth"):
        with pytest.raises(OSError, match=str(path)):
            mnist_cnn.train_model(HyperParameters(), path)


# ---- Checkpoints --------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing.pth"):
        mnist_cnn.load_and_evaluate_model(tmp_path / "nothing.pth", HyperParameters())


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    whole = CHECKPOINT.read_bytes()
    contents = [whole[:size] for size in [*range(0, len(whole), 997), len(whole) - 1]]
    weights = whole.index(torch.load(CHECKPOINT)["fc.1.weight"].numpy().tobytes())
    contents += [
        altered(whole, weights),
        b"not a checkpoint",
        b"\x80\x02N.",
        random.Random(0).randbytes(9_000),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} is not a dict of tensors"):
            mnist_cnn.load_checkpoint(path, HyperParameters())
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        mnist_cnn.load_checkpoint(tmp_path, HyperParameters())


Weights = dict[str, Any]


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
def test_weights_that_do_not_fit_are_named(
    change: Callable[[Weights], Weights], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(change(torch.load(CHECKPOINT)), path)
    with pytest.raises(ValueError, match=rf"^{path} does not hold .* TinyCNN: .*{complaint}"):
        mnist_cnn.load_checkpoint(path, HyperParameters())


def test_a_wrapped_checkpoint_of_a_parallel_model_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "parallel.pth"
    weights = nn.DataParallel(TinyCNN()).state_dict()
    torch.save({"model_state_dict": weights, "epoch": 3}, path)
    loaded = mnist_cnn.load_checkpoint(path, HyperParameters()).cpu().state_dict()
    assert all(torch.equal(loaded[name], weights[f"module.{name}"].cpu()) for name in loaded)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"conv1.0.weight": Payload()}, tmp_path / "payload.pth")
    with pytest.raises(ValueError, match=r"payload\.pth is not a dict of tensors"):
        mnist_cnn.load_checkpoint(tmp_path / "payload.pth", HyperParameters())
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_old_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    code = (
        "import sys, torch, mnist_cnn, itertools, pathlib\n"
        "for number in itertools.count():\n"
        "    weights = torch.full((1_000_000,), number)\n"
        "    mnist_cnn.save({'weights': weights}, pathlib.Path(sys.argv[1]))\n"
        "    print(number, flush=True)"
    )
    path = tmp_path / "model.pth"
    for delay in (0, 3, 6):
        saver = subprocess.Popen(
            [sys.executable, "-c", code, path], cwd=MODULE.parent, stdout=subprocess.PIPE
        )
        for _ in range(5):
            saver.stdout.readline()
        time.sleep(delay / 1_000)
        saver.kill()
        saver.communicate()
        weights = torch.load(path)["weights"]
        assert weights[0] >= 4
        assert (weights == weights[0]).all()


# ---- Interrupted runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["first", "last"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    kept: str, small_mnist: HyperParameters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = replace(small_mnist, num_epochs=3)
    if kept == "first":
        monkeypatch.setattr(mnist_cnn, "kept_epoch", lambda history: history[0])
    else:
        params = replace(params, validation_size=0)
    whole, history = mnist_cnn.train_model(params, tmp_path / "whole.pth")

    def crash_in_epoch_3(run: mnist_cnn.Run, *arguments: Any) -> tuple[float, float]:
        if len(run.history) == 2:
            raise RuntimeError("a bug")
        return train_epoch(run, *arguments)

    train_epoch = mnist_cnn.train_epoch
    path = tmp_path / "model.pth"
    path.write_text("of an earlier run")
    with monkeypatch.context() as patch:
        patch.setattr(mnist_cnn, "train_epoch", crash_in_epoch_3)
        with pytest.raises(RuntimeError, match="a bug"):
            mnist_cnn.train_model(params, path)
    assert path.read_text() == "of an earlier run"

    for name, value in (("num_epochs", 4), ("random_seed", 1)):
        before = getattr(params, name)
        complaint = rf"cannot resume .*: it had .'{name}': {before}., not .'{name}': {value}.$"
        with pytest.raises(ValueError, match=complaint):
            mnist_cnn.train_model(replace(params, **{name: value}), path, resume=True)

    resumed, resumed_history = mnist_cnn.train_model(params, path, resume=True)
    torch.testing.assert_close(resumed_history, history, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.pth", "model.pth"}


def test_something_else_cannot_be_resumed(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT, tmp_path / "model.pth.resume")
    with pytest.raises(ValueError, match=r"model\.pth\.resume is not an interrupted run"):
        mnist_cnn.train_model(HyperParameters(), tmp_path / "model.pth", resume=True)


def test_a_diverging_run_stops_and_keeps_the_best(
    small_mnist: HyperParameters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(FloatingPointError, match="training diverged in epoch 1: .* lower"):
        mnist_cnn.train_model(replace(small_mnist, learning_rate=1e20), path)
    assert not path.exists()

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


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGTERM, "Training on"), (signal.SIGINT, "Epoch 1/20 ")]
)
def test_a_signal_stops_the_run_and_keeps_what_it_has(
    number: signal.Signals, line: str, params: HyperParameters, tmp_path: Path
) -> None:
    data_dir = str(Path(params.data_dir).resolve())
    run = subprocess.Popen(
        [sys.executable, MODULE, "--validation-size", "55000", "--data-dir", data_dir],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not run.stdout.readline().startswith(line):
        assert run.poll() is None
    time.sleep(0.5)
    run.send_signal(number)
    output, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (128 + number, "")
    if number == signal.SIGINT:
        path = tmp_path / "best_mnist_model.pth"
        assert output.startswith(f"Stopped after epoch 1. {path} has the best so far, epoch 1;")
        mnist_cnn.load_checkpoint(path, params)
        assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.resume"}
    else:
        assert output == "Stopped after epoch 0. There is nothing to keep\n"
        assert list(tmp_path.iterdir()) == []


# ---- Several processes --------------------------------------------------------------------------


def join(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if count > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)


def in_processes(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Run work(rank, count, *arguments) in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_cnn"])
    processes = [
        context.Process(target=work, args=(rank, count, *arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def save_gradients(rank: int, count: int, folder: Path) -> None:
    """Of one step on 61 images, without what processes do apart: warp, dropout, BatchNorm."""
    join(rank, count, folder)
    params = HyperParameters(
        batch_size=61,
        dropout_rate=0.0,
        max_rotation=0.0,
        max_shift=0.0,
        max_scaling=0.0,
        device="cpu",
        precision="float32",
    )
    run = mnist_cnn.new_run(params, torch.device("cpu"), num_images=61)
    for layer in run.model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().train = lambda _: None  # stays so
    training_set = torch.randint(256, (61, 1, 28, 28)).byte(), torch.randint(10, (61,))
    loss, accuracy = mnist_cnn.train_epoch(run, training_set, params)
    results = {name: weight.grad for name, weight in run.model.named_parameters()}
    results |= {"loss": torch.tensor(loss), "accuracy": torch.tensor(accuracy)}
    if rank == 0:
        torch.save(results, folder / f"of_{count}.pt")


@pytest.mark.parametrize("count", [2, 4])
def test_the_gradient_of_several_processes_is_that_of_one(count: int, tmp_path: Path) -> None:
    for size in (1, count):
        in_processes(size, save_gradients, tmp_path)
    one, several = (torch.load(tmp_path / f"of_{size}.pt") for size in (1, count))
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
    weights = model.state_dict()
    torch.save(
        {"weights": weights, "history": history[0][:], "warp": warped[0][0]}, folder / str(rank)
    )


@pytest.mark.parametrize(("count", "num_validation"), [(2, 1), (3, 50)])
def test_processes_end_an_epoch_alike_and_report_all_images(
    count: int, num_validation: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    splits = [
        (torch.randint(256, (size, 1, 28, 28)).byte(), torch.randint(10, (size,)))
        for size in (num_validation, 70)
    ]
    torch.save(splits, tmp_path / "splits.pt")
    params = HyperParameters(num_epochs=1, batch_size=48, device="cpu", precision="float32")
    in_processes(count, save_a_run, tmp_path, params)
    first, *others = (torch.load(tmp_path / str(rank)) for rank in range(count))
    for other in others:
        torch.testing.assert_close(other["weights"], first["weights"], rtol=0, atol=0)
        assert other["history"] == first["history"]
        assert not torch.equal(other["warp"], first["warp"])

    torch.testing.assert_close(torch.load(tmp_path / "model.pth"), first["weights"])
    metrics = EpochMetrics(*first["history"])
    model = TinyCNN().eval()
    model.load_state_dict(first["weights"])
    logits = [model((images / 255 - 0.1307) / 0.3081) for images, _ in splits]
    accuracies = [
        100 * (guess.argmax(1) == labels).double().mean().item()
        for guess, (_, labels) in zip(logits, splits, strict=True)
    ]
    assert [metrics.validation_accuracy, metrics.test_accuracy] == pytest.approx(accuracies)
    loss = F.cross_entropy(logits[0], splits[0][1]).item()
    assert metrics.validation_loss == pytest.approx(loss, rel=1e-4)


def refuse_a_batch(rank: int, count: int, folder: Path) -> None:
    join(rank, count, folder)
    mnist_cnn.load_splits = lambda *_: [(torch.zeros(28, 1, 28, 28), torch.zeros(28))] * 3
    params = HyperParameters(batch_size=9, device="cpu")  # leaves a last batch of one image
    with pytest.raises(ValueError, match="3 processes cannot share a last batch of 1$"):
        mnist_cnn.train_model(params, folder / "model.pth")


def test_batches_that_processes_cannot_share_are_an_error(tmp_path: Path) -> None:
    in_processes(3, refuse_a_batch, tmp_path)


SMALL_SCRIPT = """
import os, sys
sys.path.insert(0, {folder!r})
import mnist_cnn

print("process", os.getpid(), flush=True)
load_images = mnist_cnn.load_images
mnist_cnn.load_images = lambda *arguments, **named: [
    part[:2_000] for part in load_images(*arguments, **named)
]
sys.exit(mnist_cnn.main(["--data-dir", {data_dir!r}, "--validation-size", "500", *sys.argv[1:]]))
"""


def test_torchrun_ends_with_a_killed_process_and_one_process_carries_on(
    params: HyperParameters, tmp_path: Path
) -> None:
    script = tmp_path / "small.py"
    data_dir = str(Path(params.data_dir).resolve())
    script.write_text(SMALL_SCRIPT.format(folder=str(MODULE.parent), data_dir=data_dir))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    flags = ["--num-epochs", "4"]
    run = subprocess.Popen(
        [*torchrun, script, *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
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

    resumed = subprocess.run(
        [sys.executable, script, *flags, "--resume"], cwd=tmp_path, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"^Carrying on after epoch [123]$", resumed.stdout, re.MULTILINE)
    mnist_cnn.load_checkpoint(tmp_path / "best_mnist_model.pth", params)


# ---- The command line ---------------------------------------------------------------------------


ShortRun = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def short_run(params: HyperParameters, tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """One epoch on 10,000 images, in a folder of its own, with the output in pipes."""
    folder = tmp_path_factory.mktemp("short_run")
    flags = "--num-epochs 1 --validation-size 50000 --checkpoint digits.pth"
    return folder, run_script(*flags.split(), cwd=folder)


def test_a_short_run_learns_and_says_so(short_run: ShortRun) -> None:
    _, run = short_run
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # no progress bar in a log file
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
    assert validation > 95
    assert test > 95


def test_a_short_run_leaves_the_checkpoint_and_its_curves(short_run: ShortRun) -> None:
    folder, _ = short_run
    pictures = {"digits_curves.png", "digits_mistakes.png"}
    assert {path.name for path in folder.iterdir()} == {"digits.pth", *pictures}
    TinyCNN().load_state_dict(torch.load(folder / "digits.pth"))
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_synthetic_run_needs_no_mnist_and_says_what_it_is(tmp_path: Path) -> None:
    flags = "--synthetic --num-epochs 1 --validation-size 57000 --data-dir nowhere"
    (tmp_path / "best_mnist_model.pth").write_text("of an earlier run")
    run = run_script(*flags.split(), cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    table_ends = max(i for i, line in enumerate(lines) if set(line) == {"-"})
    assert all(line.startswith("synthetic digits: ") for line in lines[table_ends + 1 :])
    assert float(re.search(r"Current test accuracy: (\S+)%", run.stdout)[1]) > 90
    assert (tmp_path / "best_mnist_model.pth").read_text() == "of an earlier run"
    pictures = {"synthetic_model_curves.png", "synthetic_model_mistakes.png"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"best_mnist_model.pth", "synthetic_model.pth", *pictures}
    with pytest.raises(ValueError, match=r"best_mnist_model\.pth is for MNIST"):
        mnist_cnn.train_model(HyperParameters(synthetic=True))


def test_evaluate_counts_the_mistakes_of_each_digit(
    params: HyperParameters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pth"
    shutil.copy(CHECKPOINT, path)
    assert mnist_cnn.main(["evaluate", str(path), "--data-dir", params.data_dir]) == 0
    output = capsys.readouterr().out
    accuracy = float(re.match(r"Current test accuracy: (\d\d\.\d\d)%\n", output)[1])
    counts = re.findall(r"^(\d): (\S+)%, (\d+) of (\d+) missed$", output, re.MULTILINE)
    assert [int(total) for *_, total in counts] == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert sum(int(missed) for _, _, missed, _ in counts) == round(100 * (100 - accuracy))
    for _, percent, missed, total in counts:
        assert float(percent) == pytest.approx(100 - 100 * int(missed) / int(total), abs=0.006)
    assert (tmp_path / "model_mistakes.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_snippets_and_commands_work(
    small_mnist: HyperParameters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the README, on few images. What trains for long is left to .ci/run."""
    from PIL import Image

    monkeypatch.setattr(
        mnist_cnn, "HyperParameters", lambda **fields: replace(small_mnist, **fields)
    )
    monkeypatch.chdir(tmp_path)
    shutil.copy(CHECKPOINT, tmp_path)
    images, labels = mnist_cnn.load_images(small_mnist, train=False)
    for image, name in zip(images, ("seven.jpg", "scan.png"), strict=False):
        Image.fromarray(255 - image[0].numpy()).resize((200, 200)).save(name)

    readme = MODULE.with_name("README.md").read_text()
    variables: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(snippet, variables)
    assert variables["accuracy"] > 99
    assert [metrics.epoch for metrics in variables["history"]] == [1, 2, 3, 4, 5]
    assert torch.equal(variables["digits"], labels[:2])

    capsys.readouterr()
    commands = dict.fromkeys(re.findall(r"\bmnist_cnn\.py (\w.*?)[`\n]", readme))
    assert {command.split()[0] for command in commands} == {"evaluate", "predict"}
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["mnist_cnn.py", *command.split()])
        assert mnist_cnn.main() == 0
    output = capsys.readouterr().out
    assert re.search(r"^seven\.jpg: 7 .*\nscan\.png: 2 ", output, re.MULTILINE)
    assert re.search(r"^Current test accuracy: (99|100)\.", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--num-epochs 0", "num_epochs is 0; it must be 1 or more"),
        ("--batch-size many", "argument --batch-size: invalid int value: 'many'"),
        ("--epochs 3", "unrecognized arguments: --epochs 3"),
        ("--device cuda:9", "device 'cuda:9' is not there: "),
        ("--device gpu", "device 'gpu' is not there: "),
        ("--resume", "best_mnist_model.pth.resume"),
        ("--checkpoint missing/model.pth", "No such file or directory"),
    ],
)
def test_a_wrong_flag_is_explained_without_a_traceback(
    flags: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = mnist_cnn.main(flags.split())
    except SystemExit as stop:  # of argparse
        status = stop.code
    errors = capsys.readouterr().err
    assert status == 2
    assert complaint in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    run = run_script("--resume", cwd=tmp_path)
    assert run.returncode == 2
    assert re.fullmatch(r"error: nothing to resume: there is no \S+\.pth\.resume\n", run.stderr)


def test_import_does_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, mnist_cnn\n"
        "assert not {'torchvision', 'matplotlib', 'torchsummary'} & sys.modules.keys()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(MODULE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
