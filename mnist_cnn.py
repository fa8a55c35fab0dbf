"""Train TinyCNN, a network of 19,354 parameters, to read handwritten digits.

python mnist_cnn.py                       train, and save the best weights
python mnist_cnn.py --num-epochs 5        change a setting: each one is a flag
python mnist_cnn.py --resume              continue an interrupted training
python mnist_cnn.py --evaluate            test the saved weights
torchrun --nproc-per-node=2 mnist_cnn.py  train with two processes, or two GPUs

Test accuracy on MNIST after 20 epochs: 99.569 ± 0.040 %, mean ± sd of ten seeds
(RESULTS.md).
"""

import ctypes
import json
import math
import os
import sys
import textwrap
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

# torchvision, torchsummary and matplotlib are imported where they are used, because
# loading a model needs none of them.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINT = "best_mnist_model.pth"
IN_NOTEBOOK = "IPython" in sys.modules

# torchrun sets both. Each process trains on its own share of every batch.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


# ---- Hyperparameters -----------------------------------------------------------------


def setting(default: Any, explanation: str, low: float = 0, high: float = 10**9) -> Any:
    return field(default=default, metadata={"help": explanation, "range": (low, high)})


@dataclass(frozen=True)
class HyperParameters:
    """The settings of a training. In Python they may be NumPy numbers or a Path, too.

    learning_rate is that of the first step, a tenth of the highest. dropout_rate and
    augmentation, the strength of the random distortions, fade during the training, so a
    single epoch has neither.

    Raises ValueError, with the name of the field, for a value of another type or out of
    range.
    """

    num_epochs: int = setting(20, "passes over the training images", 1, 999)
    batch_size: int = setting(64, "images per step, over all processes", WORLD_SIZE)
    learning_rate: float = setting(0.0009, "of the first step; it rises tenfold", 0, 1)
    dropout_rate: float = setting(
        0.25, "dropout in epoch e of n is this times max(0, 1 - 2e/n)", 0, 1
    )
    random_seed: int = setting(
        42, "seed of all random choices but the split", 0, 4_000_000
    )
    augmentation: float = setting(
        1.0, "random distortion in epoch e of n is this times min(1, 2 - 2e/n)", 0, 4
    )
    validation_size: int = setting(
        5_000, "images held out to choose the epoch", 1, 59_999
    )
    device: str = setting("auto", "cpu, cuda, ...; auto takes a GPU if there is one")
    precision: str = setting(
        "auto", "float32, or auto: bfloat16 on CPUs with AVX-512 BF16"
    )
    data_dir: str = setting(
        os.environ.get("MNIST_DATA_DIR", "data"), "folder with MNIST/raw"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            kind: Any = f.type
            value = getattr(self, f.name)
            if kind is str:
                rule = "text"
                fits = isinstance(value, str | Path | torch.device)
            else:
                low, high = f.metadata["range"]
                rule = f"{kind.__name__} from {low} to {high}"
                in_range = isinstance(value, Real) and low <= value <= high
                fits = in_range and kind(value) == value
            if not fits:
                raise ValueError(f"{f.name} is {value!r}, but must be {rule}")
            # A saved state can hold only Python's own types.
            object.__setattr__(self, f.name, kind(value))
        if self.precision not in ("auto", "float32"):
            raise ValueError(f"precision is {self.precision!r}, not auto or float32")


# ---- Data ----------------------------------------------------------------------------

Split = tuple[Tensor, Tensor]  # images (N, 1, 28, 28) uint8, labels (N,) int64


def read_mnist(data_dir: str, train: bool) -> Split:
    """The 60,000 training or the 10,000 test images, downloaded if they are not there.

    Raises OSError if they cannot be had.
    """
    from torchvision.datasets import MNIST

    try:
        dataset = MNIST(data_dir, train, download=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise OSError(
            f"MNIST cannot be read from {data_dir}/MNIST/raw, nor downloaded to it. "
            "Delete what is damaged there, put the four files there yourself, or "
            f"start with another --data-dir or MNIST_DATA_DIR. {error}"
        ) from error
    return dataset.data.unsqueeze(1), dataset.targets


def split_mnist(params: HyperParameters, device: torch.device) -> list[Split]:
    """Training, validation and test split, which do not depend on the random seed."""
    images, labels = read_mnist(params.data_dir, train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.tensor_split([params.validation_size])
    splits = [(images[part], labels[part]) for part in (rest, held_out)]
    splits.append(read_mnist(params.data_dir, train=False))
    return [(x.to(device), y.to(device)) for x, y in splits]


def normalize(images: Tensor) -> Tensor:
    """Scale pixels of 0 to 255 to mean 0 and deviation 1 over the training images."""
    return (images.float() / 255 - 0.1307) / 0.3081


# ---- Machine -------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device of that name. "auto" is the accelerator, if any, else the CPU.

    Raises ValueError if nothing can be computed on it.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        return torch.ones(1, device=name).exp().device
    except Exception as error:  # each kind of device raises its own
        raise ValueError(
            f"device {name} cannot be used, but --device cpu can: {error}"
        ) from error


def has_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16 by itself (AVX-512 BF16)."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def keep_freed_memory() -> None:
    """Make glibc keep, for the whole process, the memory that a step frees."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ---- Model ---------------------------------------------------------------------------


class TinyCNN(nn.Module):
    """Normalized images (N, 1, 28, 28) to logits (N, 10).

    The comments give the receptive field at the end of each block.
    """

    def __init__(self, dropout_rate: float = 0.25) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(  # 5x5
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.conv2 = nn.Sequential(  # 10x10
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.conv3 = nn.Sequential(  # 20x20
            nn.Conv2d(16, 20, 3, padding=1),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.Dropout2d(dropout_rate),
            nn.Conv2d(20, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.conv4 = nn.Sequential(  # 28x28
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout2d(dropout_rate),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
        )
        self.fc = nn.Sequential(nn.Dropout(dropout_rate), nn.Linear(16 * 7 * 7, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        x = self.conv2(x)
        x = self.conv3(x)
        x = self.conv4(x)
        return self.fc(x.flatten(1))


# ---- Evaluation ----------------------------------------------------------------------


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10), on the CPU, of images (N, 1, 28, 28) uint8.

    Leaves the model in eval mode. Raises TypeError for images of another type.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError("images must be a uint8 tensor, with pixels from 0 to 255")
    device = next(model.parameters()).device
    model.eval()
    # On a CPU core, 200 images at a time are faster than 1,000 (RESULTS.md).
    batches = [model(normalize(x.to(device))) for x in images.split(200)]
    return torch.cat(batches).cpu()


def measure(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in percent.

    logits: (N, 10), labels: (N,) int64, both on the CPU.
    """
    loss = F.cross_entropy(logits, labels).item()
    correct = logits.argmax(1) == labels
    return loss, 100 * correct.double().mean().item()


def evaluate_model(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in percent.

    images: (N, 1, 28, 28) uint8, labels: (N,) int64. Raises TypeError as `infer` does.
    """
    return measure(infer(model, images), labels.cpu())


# ---- Recipe --------------------------------------------------------------------------


def augment(images: Tensor, strength: float) -> Tensor:
    """Shift every image (N, 1, 28, 28), then rotate, shear, stretch and scale it.

    At strength 1: by a random amount of up to 3 pixels, 22 degrees, 0.38, 18 % and
    22 %. Stretching keeps the area.
    """
    uniform = torch.rand(6, len(images), device=images.device) * 2 - 1
    angle = math.radians(22 * strength) * uniform[0]
    size = 1 + 0.22 * strength * uniform[1]
    stretch = (1 + 0.18 * strength) ** uniform[2]
    shear = 0.38 * strength * uniform[3]
    shift = 3 / 14 * strength * uniform[4:]  # 3 pixels, in units of half an image

    # affine_grid wants the inverse map, from output to input, so the size divides.
    cos = angle.cos() / size
    sin = angle.sin() / size
    source_x = [cos * stretch, (cos * shear - sin) / stretch, shift[0]]
    source_y = [sin * stretch, (sin * shear + cos) / stretch, shift[1]]
    matrix = torch.stack(source_x + source_y, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def fade(epoch: int, params: HyperParameters) -> tuple[float, float]:
    """The dropout rate and the strength of the augmentation in an epoch, from 1 on.

    Rennie et al. (2014) let dropout fade. In short trainings, a constant one harms
    (RESULTS.md). Augmentation must end as well, because the images to be read are not
    distorted. So dropout falls to 0 in the first half of the training, and augmentation
    in the second.
    """
    remaining = 1 - epoch / params.num_epochs
    dropout_rate = params.dropout_rate * max(0, 2 * remaining - 1)
    return dropout_rate, params.augmentation * min(1, 2 * remaining)


def prepare_training(
    params: HyperParameters, num_images: int, device: torch.device
) -> tuple[TinyCNN, Adam, OneCycleLR]:
    """A new model, and Adam with a learning rate that rises tenfold, then falls.

    It rises in the first 30 % of the steps, and ends at almost 0. Adam's beta1 goes the
    other way. Smith and Topin, "Super-Convergence", 2018.

    For the whole process, PyTorch is seeded, freed memory is kept (on Linux), and cuDNN
    becomes deterministic: two trainings on a GPU would differ otherwise.
    """
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(1000 * params.random_seed)
    model = TinyCNN().to(device)  # `train_epoch` sets the dropout rate
    if device.type != "mps":  # there, BatchNorm would be wrong (PyTorch issue 175189)
        model.to(memory_format=torch.channels_last)  # faster on one thread (RESULTS.md)
    optimizer = Adam(model.parameters(), fused=True)
    schedule = OneCycleLR(
        optimizer,
        max_lr=10 * params.learning_rate,
        div_factor=10,
        total_steps=params.num_epochs * math.ceil(num_images / params.batch_size),
    )
    return model, optimizer, schedule


# ---- Training ------------------------------------------------------------------------

EPOCH_LINE = (
    "Loss: {train_loss:.4f}, Train Acc: {train_accuracy:.2f}%, "
    "Val Acc: {validation_accuracy:.2f}%, Test Acc: {test_accuracy:.2f}%"
)

# What an epoch achieved: losses in nats, accuracies in percent. Those of the training
# images are measured while training, with augmentation and dropout.
Metrics = dict[str, float]
METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
)


def best_epoch(history: list[Metrics]) -> Metrics:
    """The epoch with the highest validation accuracy; ties go to the lower loss."""
    return max(history, key=lambda e: (e["validation_accuracy"], -e["validation_loss"]))


def train_epoch(
    model: nn.Module,
    optimizer: Adam,
    schedule: OneCycleLR,
    training_set: Split,
    epoch: int,
    params: HyperParameters,
) -> tuple[float, float]:
    """Train on every image once. Returns the mean loss and the accuracy in percent.

    Of several processes, each trains on its share of every batch. A last batch that is
    too small for them is left out. Raises FloatingPointError if the loss is not finite.
    """
    images, labels = training_set
    # The seed depends on the epoch, so --resume needs no generator's state.
    seed = 1000 * params.random_seed + epoch
    torch.manual_seed(seed)
    order = torch.randperm(len(images)).to(images.device)
    batches = [b for b in order.split(params.batch_size) if len(b) >= WORLD_SIZE]
    if WORLD_SIZE > 1:  # only the order is common to all processes
        torch.manual_seed(seed + RANK * 10**9)

    dropout_rate, augmentation = fade(epoch, params)
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = dropout_rate

    autocast = torch.autocast(
        "cpu",
        torch.bfloat16,
        enabled=params.precision == "auto" and has_bfloat16(),
    )
    totals = torch.zeros(3, device=images.device)  # losses, correct answers, images
    with tqdm(
        desc=f"Epoch {epoch}/{params.num_epochs}",
        total=len(batches),
        # A log file needs no bar.
        disable=RANK > 0 or not (IN_NOTEBOOK or sys.stderr.isatty()),
    ) as progress:
        for step, batch in enumerate(batches, 1):
            share = batch[RANK::WORLD_SIZE]
            inputs = normalize(augment(images[share], augmentation))
            with autocast:
                logits = model(inputs)
                loss = F.cross_entropy(logits, labels[share], reduction="sum")
            optimizer.zero_grad()
            (loss * WORLD_SIZE / len(batch)).backward()  # DDP averages over processes
            optimizer.step()
            schedule.step()

            totals[0] += loss.detach()
            totals[1] += (logits.argmax(1) == labels[share]).sum()
            totals[2] += len(share)
            progress.update()
            if step % 50 == 0:  # not at every step: reading a number makes a GPU wait
                show(progress, totals)
        if WORLD_SIZE > 1:
            dist.all_reduce(totals)
        mean_loss, accuracy = show(progress, totals)
    if not math.isfinite(mean_loss):
        raise FloatingPointError(
            f"the loss is not finite in epoch {epoch}: lower the learning rate"
        )
    return mean_loss, accuracy


def show(progress: tqdm, totals: Tensor) -> tuple[float, float]:
    """Show the mean loss and the accuracy in percent in the bar, and return them."""
    loss, correct, num_images = totals.tolist()
    mean_loss = loss / num_images
    accuracy = 100 * (correct / num_images)
    progress.set_postfix_str(f"loss={mean_loss:.3f}, acc={accuracy:.2f}%")
    return mean_loss, accuracy


def train_model(
    params: HyperParameters, checkpoint: str | Path = CHECKPOINT, resume: bool = False
) -> tuple[TinyCNN, list[Metrics]]:
    """Train TinyCNN, and print its layers and one line per epoch.

    Whenever an epoch is the best so far, its weights are saved to `checkpoint`. The
    state of the training is saved to `<checkpoint>.resume`, before the first epoch and
    after every one, and stays there. resume=True continues from that file, and takes
    all settings but `device` and `data_dir` from it. On the same CPU, with the same
    number of threads and of processes (one or two), it ends in the weights of an
    uninterrupted training.

    Returns the model with the best weights, in eval mode, and all epochs' metrics. Only
    the first of several processes has them. What `prepare_training` sets for the whole
    process stays set.

    Raises OSError or ValueError for data or a file that cannot be used, and
    FloatingPointError if the loss is not finite.
    """
    from torchsummary import summary

    path = Path(checkpoint)
    if str(checkpoint).endswith("/") or (path.exists() and not path.is_file()):
        raise OSError(f"{checkpoint} is not the name of a file")
    state_path = Path(f"{path}.resume")
    history: list[Metrics] = []
    if resume:
        state = read_tensors(state_path)
        here = {"device": params.device, "data_dir": params.data_dir}
        params = HyperParameters(**state["params"] | here)
        history = state["history"]

    device = pick_device(params.device)
    training, validation, test = split_mnist(params, device)
    parts = prepare_training(params, len(training[0]), device)
    model, optimizer, schedule = parts
    best_model = TinyCNN(params.dropout_rate)
    if resume:
        load_weights(best_model, state["best"], state_path)
        for part in parts:
            part.load_state_dict(state[type(part).__name__])
    wrapped = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model

    def save_state() -> None:
        best = best_model.state_dict()
        state = {"params": asdict(params), "history": history, "best": best}
        state |= {type(part).__name__: part.state_dict() for part in parts}
        write_tensors(state, state_path)

    if RANK == 0:
        save_state()  # from now on, an older training cannot be resumed by mistake
        print("Model Summary:")
        summary(TinyCNN(), (1, 28, 28), device="cpu")
        if resume:
            print(f"Continuing after epoch {len(history)} with {params}", flush=True)
        elif path.exists():
            print(f"The first epoch will replace the weights in {path}", flush=True)

    for epoch in range(len(history) + 1, params.num_epochs + 1):
        start = time.perf_counter()
        trained = train_epoch(wrapped, optimizer, schedule, training, epoch, params)
        if RANK > 0:
            continue  # the first process evaluates and saves
        validated = evaluate_model(model, *validation)
        tested = evaluate_model(model, *test)
        values = epoch, *trained, *validated, *tested, time.perf_counter() - start
        history.append(dict(zip(METRICS, values, strict=True)))
        if best_epoch(history) is history[-1]:
            best_model.load_state_dict(model.state_dict())
            write_tensors(best_model.state_dict(), path)
        save_state()
        line = EPOCH_LINE.format(**history[-1])
        print(f"Epoch {epoch}/{params.num_epochs} - {line}", flush=True)

    if RANK == 0:
        seconds = sum(metrics["seconds"] for metrics in history)
        print(f"Training took {seconds:.0f} seconds on {device}")
        write_tensors(best_model.state_dict(), path)  # it may hold another training's
        best = best_epoch(history)
        accuracy = f"validation accuracy: {best['validation_accuracy']:.2f}%"
        print(f"Loaded best model from epoch {best['epoch']} with {accuracy}")
    return best_model.to(device).eval(), history


# ---- Checkpoints ---------------------------------------------------------------------


def write_tensors(content: dict[str, Any], path: Path) -> None:
    """torch.save, but a crash leaves the old file or the new one, never a part."""
    buffer = BytesIO()  # torch.save to a file raises RuntimeError if the disk is full
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> dict[str, Any]:
    """torch.load, but errors name the file, and a stranger's code never runs."""
    content = BytesIO(Path(path).read_bytes())
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise ValueError(f"{path} is damaged, or not a file of weights") from error


def load_weights(model: TinyCNN, weights: dict[str, Any], origin: str | Path) -> None:
    """load_state_dict, but the error for other content names the file of origin."""
    try:
        model.load_state_dict(weights)
    except Exception as error:  # each kind of content raises its own
        raise ValueError(
            f"{origin} does not fit this model: it holds other layers, or more than "
            "weights. If you changed TinyCNN, train it anew."
        ) from error


def load_model(model_path: str | Path, device: str = "auto") -> TinyCNN:
    """A TinyCNN, in eval mode, with the weights of a checkpoint.

    Raises OSError or ValueError, with the name of the file, if it has no such weights,
    and ValueError for a device that cannot be used.
    """
    model = TinyCNN()
    load_weights(model, read_tensors(model_path), model_path)
    return model.to(pick_device(device)).eval()


def report(model: TinyCNN, data_dir: str) -> tuple[float, Split, Tensor]:
    """Print the accuracy on the 10,000 test images.

    Returns it, in percent, and the images with their labels, and the logits.
    """
    images, labels = read_mnist(data_dir, train=False)
    logits = infer(model, images)
    _, accuracy = measure(logits, labels)
    print(f"Current test accuracy: {accuracy:.2f}%")
    return accuracy, (images, labels), logits


def load_and_evaluate_model(
    model_path: str | Path, params: HyperParameters
) -> tuple[TinyCNN, float]:
    """Load a checkpoint and print its accuracy on the 10,000 test images.

    Of the settings, only `device` and `data_dir` matter. Returns the model, in eval
    mode, and the accuracy in percent. Raises OSError or ValueError if the checkpoint or
    MNIST cannot be read.
    """
    model = load_model(model_path, params.device)
    accuracy, *_ = report(model, params.data_dir)
    return model, accuracy


# ---- Figures -------------------------------------------------------------------------


def plot_history(history: list[Metrics]) -> "Figure":
    """A matplotlib figure of the loss and the error rate of every epoch.

    history: the metrics that `train_model` returns, or the content of a history file.
    """
    import matplotlib.pyplot as plt

    figure, (loss, error) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    loss.set_title("Cross-entropy (nats)")
    error.set_title("Error rate (%)")
    epochs = [metrics["epoch"] for metrics in history]
    for split in ("train", "validation", "test"):
        losses = [metrics[f"{split}_loss"] for metrics in history]
        error_rates = [100 - metrics[f"{split}_accuracy"] for metrics in history]
        loss.plot(epochs, losses, ".-", label=split)
        error.plot(epochs, error_rates, ".-", label=split)
    best = best_epoch(history)["epoch"]
    for axes in (loss, error):
        axes.axvline(best, color="lightgray", label=f"best: epoch {best}")
        axes.locator_params("x", integer=True)
        axes.set_xlabel("epoch")
        axes.set_yscale("log", subs=(2, 3, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend()
    plt.close(figure)  # otherwise a notebook shows it twice
    return figure


def plot_mistakes(images: Tensor, labels: Tensor, logits: Tensor) -> "Figure":
    """A matplotlib figure of the 48 most confident mistakes, or of all if fewer.

    images: (N, 1, 28, 28), labels: (N,), logits: (N, 10).
    """
    import matplotlib.pyplot as plt

    confidence, guesses = logits.softmax(1).max(1)
    missed = (guesses != labels).nonzero().flatten()
    missed = missed[confidence[missed].argsort(descending=True)]

    figure, grid = plt.subplots(6, 8, figsize=(9, 8), layout="constrained")
    figure.suptitle(f"{len(missed):,} of {len(labels):,} images missed")
    for axes in grid.flat:
        axes.axis("off")
    for i, axes in zip(missed, grid.flat, strict=False):
        axes.imshow(images[i, 0].numpy(), cmap="gray_r")
        title = f"{labels[i]} as {guesses[i]}, {100 * confidence[i]:.0f}%"
        axes.set_title(title, fontsize=9)
    plt.close(figure)
    return figure


# ---- Command line --------------------------------------------------------------------


def parse_flags(argv: list[str] | None = None) -> dict[str, Any]:
    """The flags that were given. One that would be ignored is an error."""
    parser = ArgumentParser(
        usage="python %(prog)s [flags]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        argument_default=SUPPRESS,
    )
    parser.add_argument("--resume", action="store_true", help="continue a stopped run")
    parser.add_argument(
        "--evaluate", action="store_true", help="test saved weights, draw mistakes"
    )
    parser.add_argument("--checkpoint", help=f"weights file (default: {CHECKPOINT})")
    for f in fields(HyperParameters):
        explanation = f"{f.metadata['help']} (default: {f.default})"
        flag = f"--{f.name.replace('_', '-')}"
        parser.add_argument(flag, type=f.type, help=explanation.replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    others = flags.keys() - {"checkpoint", "device", "data_dir"}
    if len(others) > 1 and others & {"resume", "evaluate"}:
        parser.error(
            "--resume and --evaluate take no flags but --checkpoint, --device and "
            f"--data-dir; given together: {', '.join(sorted(others))}"
        )
    return flags


def join_processes(params: HyperParameters) -> None:
    """Meet the other processes of torchrun. Each takes one GPU, if there are any.

    Raises ValueError if there are fewer GPUs than processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = pick_device(params.device).type
    if kind != "cpu":
        torch.accelerator.set_device_index(pick_device(f"{kind}:{local_rank}"))
    # On a machine with a GPU, PyTorch would start the GPU's backend for the CPU, too.
    dist.init_process_group("gloo" if kind == "cpu" else None)
    if local_rank == 0:
        read_mnist(params.data_dir, train=True)  # one process downloads, others wait
    dist.barrier()


def main() -> None:
    """Do what the command line asks."""
    flags = parse_flags()
    resume = flags.pop("resume", False)
    evaluate = flags.pop("evaluate", False)
    checkpoint = flags.pop("checkpoint", CHECKPOINT)
    stem = str(Path(checkpoint)).removesuffix(".pth")
    try:
        params = HyperParameters(**flags)
        if WORLD_SIZE > 1:
            join_processes(params)
        if not evaluate:
            _, history = train_model(params, checkpoint, resume)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        if RANK > 0:
            return

        if not evaluate:
            Path(f"{stem}_history.json").write_text(json.dumps(history))
            plot_history(history).savefig(f"{stem}_curves.png")
            print(f"The curves are drawn in {stem}_curves.png")
            print("Evaluating saved best model:")
        model = load_model(checkpoint, params.device)
        _, test, logits = report(model, params.data_dir)
        plot_mistakes(*test, logits).savefig(f"{stem}_mistakes.png")
        print(f"Up to 48 mistakes are drawn in {stem}_mistakes.png")
        if not evaluate:
            Path(f"{checkpoint}.resume").unlink()  # only now is nothing left to do
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {textwrap.shorten(str(error), 500)}")
    except KeyboardInterrupt:
        hint = (
            " --resume continues a training that has begun.\nWith it, repeat "
            "--checkpoint, --data-dir and --device if you had set them."
        )
        sys.exit("\nStopped." + ("" if evaluate else hint))


if __name__ == "__main__":
    if not IN_NOTEBOOK:
        os.environ["MPLBACKEND"] = "agg"  # a notebook's own may be missing here
    main()
