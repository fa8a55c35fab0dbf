"""TinyCNN on MNIST: 19,354 parameters, 20 epochs, far past 99.4 % test accuracy.

Test accuracy: 99.540 ± 0.046 %, mean ± sd over 10 seeds (`python benchmark.py seeds --n 10`). Time:
4 minutes. On 2 cores of an AMD EPYC, torch 2.15.0, November 2026.

Usage:
    python mnist_cnn.py                    train, save best_mnist_model.pth, draw the curves
    python mnist_cnn.py --num-epochs 5     every field of HyperParameters is a flag: see --help
    python mnist_cnn.py --synthetic        try it without MNIST, on digits drawn in fonts
    python mnist_cnn.py --resume           carry on after Ctrl-C, a crash or a power failure
    torchrun --nproc-per-node=2 mnist_cnn.py    train with two processes, or on two GPUs
    python mnist_cnn.py evaluate           test accuracy of best_mnist_model.pth, by digit
    python mnist_cnn.py predict photo.jpg  which digit is on a picture of your own
    pytest test_mnist_model.py -v          check the module and the shipped checkpoint
"""

import argparse
import ctypes
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

# torchvision, matplotlib and torchsummary are imported where they are used: `import mnist_cnn`
# then takes as long as `import torch`, not half as long again.
if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ---- Configuration ------------------------------------------------------------------------------


def setting(default: Any, allowed: str, explanation: str) -> Any:
    """A dataclass field, what it may be (an interval like "[0, 1)", or a word), what it is for."""
    return field(default=default, metadata={"allowed": allowed, "help": explanation})


def is_allowed(value: float | str, allowed: str) -> bool:
    if isinstance(value, bool):
        return allowed == "True|False"
    if isinstance(value, str):
        return allowed in ("path", "device") or value in allowed.split("|")
    low, high = (float(bound) for bound in allowed[1:-1].split(","))
    above = low <= value if allowed[0] == "[" else low < value
    below = value <= high if allowed[-1] == "]" else value < high
    return above and below


@dataclass(frozen=True)
class HyperParameters:
    """Everything that a run depends on.

    Raises:
        ValueError: a value has the wrong type, or is not what its field allows.
    """

    # The reference configuration.
    num_epochs: int = setting(20, "[1, inf)", "passes over the training images")
    batch_size: int = setting(64, "[1, inf)", "images a step")
    learning_rate: float = setting(0.0009, "(0, inf)", "Adam's rate at the first step")
    dropout_rate: float = setting(0.25, "[0, 1)", "share of activations zeroed; falls to 0")
    random_seed: int = setting(42, "[0, 4294967295]", "seeds weights, shuffle, warp and dropout")
    optimizer: str = setting("Adam", "Adam", "Kingma and Ba, 2015")
    loss: str = setting("cross_entropy", "cross_entropy", "of the softmax, in nats an image")
    # What the recipe adds to it.
    peak_factor: float = setting(10.0, "[1, inf)", "highest learning rate / learning_rate")
    max_rotation: float = setting(10.0, "[0, 180]", "augmentation: degrees, either way")
    max_shift: float = setting(2.0, "[0, 28]", "augmentation: pixels, along each axis")
    max_scaling: float = setting(0.1, "[0, 1)", "augmentation: share of size, up or down")
    validation_size: int = setting(5_000, "[0, 59999]", "training images that choose the epoch")
    # What it is computed of, and how.
    synthetic: bool = setting(False, "True|False", "digits drawn in fonts in place of MNIST")
    device: str = setting("auto", "device", "cpu, cuda, cuda:1, mps, ...; auto: the fastest")
    precision: str = setting("auto", "auto|float32", "of training; auto: the CPU's fastest")
    data_dir: str = field(
        default_factory=lambda: os.environ.get("MNIST_DATA_DIR") or "data",
        metadata={"allowed": "path", "help": "holds MNIST/raw; $MNIST_DATA_DIR if that is set"},
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            kind: Any = f.type
            right_type = isinstance(value, (int, float) if kind is float else kind)
            if not right_type or not is_allowed(value, allowed):
                raise ValueError(f"{f.name} is {value!r}; allowed is {kind.__name__} {allowed}")


# ---- Data ---------------------------------------------------------------------------------------

# MD5 sums of the extracted files: torchvision checks only the archives that it downloads.
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SPLIT_SEED = 0  # of the validation split: the same images whatever the run's own seed


def load_mnist(data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    """Read the 60,000 training or the 10,000 test images, and download them if they are missing.

    Returns:
        images (N, 1, 28, 28) uint8, 255 is ink; labels (N,) int64.

    Raises:
        FileNotFoundError: they are missing, and could not be downloaded.
        ValueError: a file is not the official one, bit for bit.
    """
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity

    raw = Path(data_dir, "MNIST", "raw").resolve()
    if not all((raw / name).is_file() for name in MNIST_FILES):
        try:
            raw.mkdir(parents=True, exist_ok=True)
            # In a folder of its own: other processes may be downloading too.
            with tempfile.TemporaryDirectory(dir=raw) as folder:
                own_raw = Path(folder, "MNIST", "raw")
                own_raw.mkdir(parents=True)
                for archive in raw.glob("*.gz"):
                    shutil.copy(archive, own_raw)
                MNIST(folder, download=True)
                for name in MNIST_FILES:
                    (own_raw / name).replace(raw / name)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"MNIST is not in {raw} and cannot be downloaded ({str(error).splitlines()[-1]}): "
                f"put {', '.join(MNIST_FILES)} there, or set MNIST_DATA_DIR to the folder "
                "whose MNIST/raw has them, or try everything on drawn digits with --synthetic"
            ) from error
    for name, md5 in MNIST_FILES.items():
        if name.startswith("train" if train else "t10k") and not check_integrity(raw / name, md5):
            raise ValueError(
                f"{raw / name} is damaged (its MD5 sum is not {md5}): delete it, and the next run "
                "downloads it again"
            )
    dataset = MNIST(data_dir, train=train)
    return dataset.data.unsqueeze(1), dataset.targets


@functools.cache
def draw_digits(train: bool) -> tuple[Tensor, Tensor]:
    """60,000 or 10,000 digits in the fonts of matplotlib, warped at random: as load_mnist's."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    fonts = sorted(Path(get_data_path(), "fonts", "ttf").glob("[DSc]*.ttf"))
    without_digits = re.compile("Display|STIXNonUni|STIXSiz|cmex|cmmi|cmsy")
    drawn = []
    for file in fonts:
        if without_digits.search(file.name):
            continue
        font = ImageFont.truetype(file, 80)
        for digit in "0123456789":
            image = Image.new("L", (100, 100))
            ImageDraw.Draw(image).text((50, 50), digit, 255, font, anchor="mm")
            drawn.append(like_mnist(read_brightness(image)))
    warp = HyperParameters(max_rotation=15.0, max_shift=2.0, max_scaling=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(train))
        chosen = torch.randint(len(drawn), (60_000 if train else 10_000,))
        warped = [augment(batch, warp).byte() for batch in torch.stack(drawn)[chosen].split(1_000)]
    return torch.cat(warped), chosen % 10


def load_images(params: HyperParameters, train: bool) -> tuple[Tensor, Tensor]:
    return draw_digits(train) if params.synthetic else load_mnist(params.data_dir, train)


def load_splits(params: HyperParameters, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, as load_mnist gives them, of the training, validation and test split."""
    images, labels = load_images(params, train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, training = order.tensor_split([params.validation_size])
    splits = [(images[index], labels[index]) for index in (training, validation)]
    splits.append(load_images(params, train=False))
    return [(images.to(device), labels.to(device)) for images, labels in splits]


def normalize(images: Tensor) -> Tensor:
    """(N, 1, 28, 28) in 0..255, of any type, to float32 of the training set's mean 0 and sd 1."""
    return (images.float() / 255 - 0.1307) / 0.3081


def augment(images: Tensor, params: HyperParameters) -> Tensor:
    """Rotate, scale and shift each image at random, all in one batched bilinear warp.

    Args:
        images: (N, 1, 28, 28) in 0..255, of any type; 0 is what comes in at the edges.

    Returns:
        (N, 1, 28, 28) float32 in 0..255.
    """
    uniform = torch.rand(4, len(images), device=images.device) * 2 - 1
    angle = math.radians(params.max_rotation) * uniform[0]
    size = 1 + params.max_scaling * uniform[1]
    dx, dy = params.max_shift / 14 * uniform[2:]  # affine_grid's unit is half an image
    # The matrix leads from a pixel of the result back to its source: a larger size divides.
    cos, sin = angle.cos() / size, angle.sin() / size
    matrix = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


# ---- Model --------------------------------------------------------------------------------------


class TinyCNN(nn.Module):
    """Eight convolutions and one linear layer: (N, 1, 28, 28) normalized images to (N, 10) logits.

    The comments give the receptive field, in pixels a side, at the end of each block.
    """

    def __init__(self, dropout_rate: float = 0.25) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(  # 5
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.conv2 = nn.Sequential(  # 10
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.conv3 = nn.Sequential(  # 20
            nn.Conv2d(16, 20, 3, padding=1),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.Dropout2d(dropout_rate),
            nn.Conv2d(20, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.conv4 = nn.Sequential(  # 28
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout2d(dropout_rate),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
        )
        self.fc = nn.Sequential(nn.Dropout(dropout_rate), nn.Linear(16 * 7 * 7, 10))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv4(self.conv3(self.conv2(self.conv1(images))))
        logits: Tensor = self.fc(features.flatten(1))
        return logits


# ---- Training -----------------------------------------------------------------------------------

CHECKPOINT = Path("best_mnist_model.pth")


class EpochMetrics(NamedTuple):
    """One epoch: loss in nats an image, accuracy in percent; NaN without validation images.

    loss and train_accuracy are means over the epoch's steps, of augmented images under dropout:
    they look worse than what the model has learned.
    """

    epoch: int
    loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_accuracy: float
    learning_rate: float = math.nan  # at the epoch's end

    def __str__(self) -> str:
        parts = [f"Loss: {self.loss:.4f}", f"Train Acc: {self.train_accuracy:.2f}%"]
        if not math.isnan(self.validation_accuracy):
            parts.append(f"Val Acc: {self.validation_accuracy:.2f}%")
        return ", ".join([*parts, f"Test Acc: {self.test_accuracy:.2f}%"])


def labelled(params: HyperParameters, line: str) -> str:
    """Nobody shall take a result on synthetic digits for one on MNIST."""
    return f"synthetic digits: {line}" if params.synthetic else line


def say(params: HyperParameters, line: str) -> None:
    if process_rank() == 0:
        print(labelled(params, line), flush=True)


def pick_device(params: HyperParameters) -> torch.device:
    """The device that is asked for; with "auto" the accelerator of this machine, if it has one.

    Under torchrun, the accelerator whose number is that of the process on its machine.

    Raises:
        ValueError: there is no such device here.
    """
    name = params.device
    if name == "auto":
        there = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        name = there.type if there else "cpu"
    if ":" not in name and name != "cpu" and "LOCAL_RANK" in os.environ:
        name += f":{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from builds without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not there: {reason}") from error


def uses_bfloat16(params: HyperParameters, device: torch.device) -> bool:
    """Whether this CPU has instructions for bfloat16: training is 1.3 times as fast with them."""
    # torch.cpu.get_capabilities came with torch 2.11: without it nobody can tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = device.type == "cpu" and capabilities.get("avx512_bf16") is True
    return native and params.precision == "auto"


def keep_freed_memory() -> None:
    """Have glibc reuse the activations' memory, not hand it back to the kernel at every step.

    Training is 1.1 times as fast.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: no larger one is accepted
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def join_processes(params: HyperParameters) -> None:
    """Under torchrun, train together with the processes that it has started."""
    device = pick_device(params)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group()  # gloo between CPUs, NCCL between GPUs
    if os.environ["LOCAL_RANK"] == "0":
        load_images(params, train=True)  # one on each machine downloads, the others wait
    dist.barrier()


def process_rank() -> int:
    """The number of this process among those that train together; 0 is the one that speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum over the processes that train together."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def new_model(params: HyperParameters, device: torch.device) -> TinyCNN:
    # The memory layout that convolutions are fastest in; the weights are the same.
    return TinyCNN(params.dropout_rate).to(device).to(memory_format=torch.channels_last)


def parallel(model: nn.Module) -> nn.Module:
    """The model, whose gradients become the mean over the processes that train together."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def new_optimizer(
    model: nn.Module, params: HyperParameters, num_steps: int
) -> tuple[Adam, OneCycleLR]:
    """Adam, and its learning rate: up to the peak in 30 % of the steps, then down to nearly 0.

    Smith and Topin, "Super-Convergence", 2018. The momentum moves the other way.
    """
    peak = params.learning_rate * params.peak_factor
    optimizer = Adam(model.parameters(), lr=params.learning_rate, fused=True)
    return optimizer, OneCycleLR(optimizer, peak, num_steps, div_factor=params.peak_factor)


def kept_epoch(history: list[EpochMetrics]) -> EpochMetrics:
    """The epoch whose weights are kept: the best on validation, or the last if there is none."""
    if math.isnan(history[-1].validation_accuracy):
        return history[-1]
    # A few thousand images often tie: the lower loss decides.
    return max(history, key=lambda epoch: (epoch.validation_accuracy, -epoch.validation_loss))


def infer(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 10) logits of (N, 1, 28, 28) uint8 images. Leaves the model in eval mode."""
    model.eval()
    with torch.inference_mode():
        # 200 images' activations fit into a core's cache: twice as fast as 1,000 at a time.
        return torch.cat([model(normalize(batch)) for batch in images.split(200)])


def evaluate_model(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats, and accuracy in percent; NaN of no images.

    Leaves the model in eval mode.

    Args:
        images: (N, 1, 28, 28) uint8, on the model's device.
        labels: (N,) int64, on the model's device.
    """
    logits = infer(model, images)
    correct = (logits.argmax(1) == labels).sum().item()
    accuracy = 100 * correct / len(labels) if len(labels) > 0 else math.nan
    return F.cross_entropy(logits, labels).item(), accuracy


def evaluate_together(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """evaluate_model, of which each process does its share."""
    rank, count = process_rank(), process_count()
    share = slice(rank, None, count)
    metrics = evaluate_model(model, images[share], labels[share])
    if count == 1:
        return metrics
    weighted = torch.tensor(metrics, dtype=torch.float64, device=images.device) * len(labels[share])
    loss, accuracy = (total(weighted.nan_to_num()) / len(images)).tolist()
    return loss, accuracy


def anneal_dropout(model: nn.Module, params: HyperParameters, epoch: int) -> None:
    """Lower the dropout rate by equal steps, to 0 in the last epoch (Rennie et al., 2014).

    Dropout keeps the early epochs from overfitting, and costs accuracy in the last ones.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = params.dropout_rate * (1 - epoch / params.num_epochs)


def train_epoch(
    model: nn.Module,
    optimizer: Adam,
    schedule: OneCycleLR,
    training_set: tuple[Tensor, Tensor],
    params: HyperParameters,
    title: str,
) -> tuple[float, float]:
    """One pass over the training set, under a progress bar; returns its loss and accuracy."""
    rank, count = process_rank(), process_count()
    images, labels = training_set
    bfloat16 = uses_bfloat16(params, images.device)
    keep_freed_memory()
    model.train()
    loss_sum = correct = torch.zeros((), device=images.device)
    batches = torch.randperm(len(images)).to(images.device).split(params.batch_size)
    if rank > 0:  # the shuffle is everybody's, the warp and the dropout are each process's own
        torch.manual_seed(torch.initial_seed() + rank * 2**40)
    # No bar in a log file; but one in a notebook, whose standard error is no terminal either.
    watched = rank == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    with tqdm(batches, labelled(params, title), disable=not watched) as bar:
        for step, batch in enumerate(bar, start=1):
            share = batch.tensor_split(count)[rank]
            warped = normalize(augment(images[share], params))
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(warped)
                loss = F.cross_entropy(logits, labels[share])
            optimizer.zero_grad()
            # The processes' gradients are averaged: the whole batch's, if shares weigh by size.
            (loss * (len(share) * count / len(batch))).backward()
            optimizer.step()
            schedule.step()

            loss_sum = loss_sum + loss.detach() * len(share)
            correct = correct + (logits.argmax(1) == labels[share]).sum()
            # Reading a number makes a GPU finish all that it was given: not at every step.
            if step % 50 == 0 or step == len(batches):
                seen = min(step * params.batch_size, len(images))
                sums = total(torch.stack([loss_sum, correct])).tolist()
                mean_loss, accuracy = sums[0] / seen, 100 * sums[1] / seen
                weights_are_finite = all(weight.isfinite().all() for weight in model.parameters())
                if not (math.isfinite(mean_loss) and weights_are_finite):
                    raise FloatingPointError(
                        f"training diverged: loss {mean_loss:g} by step {step} of {title}, at "
                        f"learning rate {schedule.get_last_lr()[0]:g}; "
                        "lower learning_rate or peak_factor"
                    )
                bar.set_postfix_str(f"loss={mean_loss:.3f}, acc={accuracy:.2f}%")
    return mean_loss, accuracy


def train_model(
    params: HyperParameters,
    checkpoint_path: str | Path = CHECKPOINT,
    resume: bool = False,
) -> tuple[TinyCNN, list[EpochMetrics]]:
    """Train on MNIST, printing a line an epoch, and save the kept epoch's weights.

    Every epoch ends by saving the whole run to `<checkpoint_path>.resume`, from where resume=True
    carries on, to the same weights to the bit. The checkpoint is replaced when the run has
    finished, or has finished an epoch and is then interrupted (Ctrl-C) or diverges.
    Seeds torch's global random generator at every epoch.

    Returns:
        the model with the kept epoch's weights, in eval mode; the metrics of every epoch.

    Raises:
        FileNotFoundError, ValueError: see load_mnist and, with resume, load_run.
        FloatingPointError: the loss or a weight became infinite or NaN.
        OSError: a file cannot be written.
    """
    path = Path(checkpoint_path).resolve()
    if params.synthetic and path.name == CHECKPOINT.name:
        raise ValueError(f"{path} is for MNIST: name another checkpoint for synthetic digits")
    if path.is_dir() or not os.access(path.parent, os.W_OK):  # before minutes are spent on it
        raise OSError(f"cannot write {path}: it is a folder, or its folder is missing or read-only")
    run_path = Path(f"{path}.resume")
    state = load_run(run_path, params) if resume else None
    device = pick_device(params)
    torch.backends.cudnn.deterministic = True  # of a GPU's convolutions
    training_set, validation_set, test_set = load_splits(params, device)
    rank, count = process_rank(), process_count()
    num_images = len(training_set[0])
    if params.batch_size % count > 0 or 0 < num_images % params.batch_size < count:
        raise ValueError(
            f"{count} processes cannot share batches of {params.batch_size} of {num_images} images"
        )
    precision = "bfloat16" if uses_bfloat16(params, device) else "float32"
    together = f" in each of {count} processes" if count > 1 else ""
    threads = f"{torch.get_num_threads()} threads{together}"
    say(params, f"Training on {device} in {precision}, {threads}")

    torch.manual_seed(1000 * params.random_seed)
    model = new_model(params, device)
    steps_per_epoch = math.ceil(len(training_set[0]) / params.batch_size)
    optimizer, schedule = new_optimizer(model, params, params.num_epochs * steps_per_epoch)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history: list[EpochMetrics] = []
    best: dict[str, Tensor] = {}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        history, best = [EpochMetrics(*metrics) for metrics in state["history"]], state["best"]
        say(params, f"Carrying on after epoch {len(history)}")
    elif run_path.exists():
        say(params, f"{run_path} holds an interrupted run: it will be replaced after one epoch")

    learner = parallel(model)
    try:
        for epoch in range(len(history) + 1, params.num_epochs + 1):
            # All of an epoch's randomness comes from here: a resumed run needs no other state.
            torch.manual_seed(1000 * params.random_seed + epoch)
            anneal_dropout(model, params, epoch)
            title = f"Epoch {epoch}/{params.num_epochs}"
            train_metrics = train_epoch(learner, optimizer, schedule, training_set, params, title)
            if count > 1:
                for statistics in model.buffers():  # of the first process's shares
                    dist.broadcast(statistics, 0)
            validation_metrics = evaluate_together(model, *validation_set)
            _, test_accuracy = evaluate_together(model, *test_set)
            last = (test_accuracy, float(schedule.get_last_lr()[0]))
            metrics = EpochMetrics(epoch, *train_metrics, *validation_metrics, *last)
            if kept_epoch([*history, metrics]) is metrics:
                best = cpu_copy(model.state_dict())
            history.append(metrics)
            say(params, f"{title} - {metrics}")
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"history": list(map(tuple, history)), "best": best}
            if rank == 0:
                save(state | {"run": identity(params)}, run_path)
    except (KeyboardInterrupt, FloatingPointError):
        if history:
            if rank == 0:
                save(best, path)
            say(
                params,
                f"Stopped after epoch {len(history)}. {path} has the best so far, epoch "
                f"{kept_epoch(history).epoch}; the same command with --resume carries on",
            )
        else:
            say(params, "Stopped within the first epoch: there is nothing to keep")
        raise
    if rank == 0:
        save(best, path)
        run_path.unlink(missing_ok=True)

    kept = kept_epoch(history)
    if params.validation_size > 0:
        accuracy = f"with validation accuracy: {kept.validation_accuracy:.2f}%"
        say(params, f"Loaded best model from epoch {kept.epoch} {accuracy}")
    else:
        reason = "the last: no validation images to choose by"
        say(params, f"Loaded model from epoch {kept.epoch}, {reason}")
    model.load_state_dict(best)
    return model.eval(), history


# ---- Checkpoints --------------------------------------------------------------------------------


def cpu_copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As anyone can load them: on the CPU, in the usual memory layout."""
    layout = torch.contiguous_format
    return {name: tensor.cpu().clone(memory_format=layout) for name, tensor in weights.items()}


def save(content: dict[str, Any], path: Path) -> None:
    """torch.save, but whenever the process or the machine dies, the file is whole: old or new.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the new name outlasts a power failure once its folder is written
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; its old version is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """torch.load to the CPU, of tensors and plain values alone: no code in the file is executed.

    Raises:
        ValueError: the file is damaged, or is something else.
    """
    try:
        # torch.load does not compare check sums: it would read altered weights without a word.
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("a check sum does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the parsers come upon
        raise ValueError(f"{path} is not a file of tensors that torch.load can read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_checkpoint(path: str | Path, params: HyperParameters) -> TinyCNN:
    """A TinyCNN with the weights of a state_dict file, in eval mode on the device of params.

    The state_dict may be that of a DataParallel model, or wrapped: {"model_state_dict": ...}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or one of another architecture, or has NaN in it.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: `python mnist_cnn.py` trains and saves one")
    content = load(path)
    content = content.get("model_state_dict", content)
    found = {str(name).removeprefix("module."): value for name, value in content.items()}
    model = new_model(params, pick_device(params))
    wrong = [f"{name} is unexpected" for name in found if name not in model.state_dict()]
    for name, expected in model.state_dict().items():
        value = found.get(name)
        if not isinstance(value, Tensor):
            wrong.append(f"{name} is missing")
        elif (value.shape, value.dtype) != (expected.shape, expected.dtype):
            wrong.append(
                f"{name} is {list(value.shape)} {value.dtype}, "
                f"not {list(expected.shape)} {expected.dtype}"
            )
        elif not value.isfinite().all():
            wrong.append(f"{name} has NaN or infinite values")
    if wrong:
        few = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(f"{path} does not hold the weights of a TinyCNN: {few}")
    model.load_state_dict(found)
    return model.eval()


def identity(params: HyperParameters) -> dict[str, Any]:
    """What a run's weights depend on, beside the machine: not where the data lies."""
    run = asdict(params) | {"torch": str(torch.__version__)}
    del run["data_dir"]
    return run


def load_run(path: Path, params: HyperParameters) -> dict[str, Any]:
    """What train_model saved of an interrupted run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of other hyperparameters or another version of torch.
    """
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    state = load(path)
    if "run" not in state:
        raise ValueError(f"{path} is not an interrupted run")
    wanted = identity(params)
    saved = state["run"]
    differences = [
        f"{name} was {saved.get(name)!r}, now it is {wanted.get(name)!r}"
        for name in saved | wanted
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"cannot resume the run in {path}: {'; '.join(differences)}")
    return state


# ---- Using it -----------------------------------------------------------------------------------


def load_and_evaluate_model(
    model_path: str | Path, params: HyperParameters
) -> tuple[TinyCNN, float]:
    """Load a checkpoint and print its accuracy on the 10,000 test images.

    Returns:
        the model, in eval mode on the device of params; the accuracy in percent.

    Raises:
        FileNotFoundError, ValueError: see load_checkpoint and load_mnist.
    """
    model = load_checkpoint(model_path, params)
    device = next(model.parameters()).device
    test_set = (tensor.to(device) for tensor in load_images(params, train=False))
    _, accuracy = evaluate_model(model, *test_set)
    say(params, f"Current test accuracy: {accuracy:.2f}%")
    return model, accuracy


# ---- Digits from anywhere -----------------------------------------------------------------------

MAX_PIXELS = 50_000_000  # larger pictures would take gigabytes to decode


def read_brightness(picture: Any) -> Tensor:
    """(H, W) float32 in 0..1 of a path, an open file, a PIL image, an array or a tensor.

    Arrays and tensors are (H, W), or have 1, 3 or 4 channels, first or last; their values are in
    0..1 or 0..255, or integers from 0 up. Transparent places become paper.

    Raises:
        OSError: the file is missing, or is no picture.
        ValueError: the picture is too large, or has another shape, or has NaN or negative values.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(picture, (str, Path)) or hasattr(picture, "read"):
        try:
            picture = Image.open(picture)
        except Image.DecompressionBombError as error:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels") from error
    if isinstance(picture, Image.Image):
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels: {picture.width}x{picture.height}")
        picture = ImageOps.exif_transpose(picture)  # photos may lie on their side
        if not picture.mode.startswith(("I", "F")):  # those have no colour, but more than 8 bits
            picture = picture.convert("RGBA")
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
    values = torch.from_numpy(np.asarray(picture).astype(np.float32))
    if values.ndim == 2:
        values = values.unsqueeze(-1)
    elif values.ndim == 3 and values.shape[-1] not in (1, 3, 4):
        values = values.movedim(0, -1)
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4) or values.numel() == 0:
        raise ValueError(
            f"shape {tuple(np.shape(picture))}, where one picture is (H, W) or (H, W, 3)"
        )
    if not values.isfinite().all() or values.min() < 0:
        raise ValueError("has NaN, infinite or negative values")
    if values.max() > 1 or np.asarray(picture).dtype == np.uint8:
        values = values / max(255.0, values.max().item())
    if values.shape[-1] == 1:
        return values.squeeze(-1)
    grey = values[..., :3] @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    if values.shape[-1] == 3:
        return grey
    alpha = values[..., 3]
    paper = 1.0 if (grey * alpha).sum() < 0.5 * alpha.sum() else 0.0  # dark ink is on light paper
    return grey * alpha + paper * (1 - alpha)


def resized(image: Tensor, longest: int) -> Tensor:
    """(H, W), antialiased, to this many pixels along its longest side."""
    height, width = (max(1, round(side * longest / max(image.shape))) for side in image.shape)
    size = (height, width)
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


def dilated(image: Tensor, pixels: int) -> Tensor:
    """(H, W): each pixel becomes the brightest of those so far around it."""
    return F.max_pool2d(image[None, None], 2 * pixels + 1, stride=1, padding=pixels)[0, 0]


def cropped(image: Tensor, ink: Tensor) -> Tensor:
    """(H, W) to the rows and columns that have ink."""
    (top, *_, bottom), (left, *_, right) = (
        2 * ink.any(axis).nonzero().flatten().tolist() for axis in (1, 0)
    )
    return image[top : bottom + 1, left : right + 1]


def find_ink(brightness: Tensor) -> Tensor:
    """(H, W) of any size, dark on light or light on dark, to ink in 0..1 on paper of 0, cropped.

    Raises:
        ValueError: nothing is written on it.
    """
    if max(brightness.shape) > 192:
        brightness = resized(brightness, 192)
    # The light falls smoothly: a quadratic surface, fitted to the half that it fits best, is the
    # paper (least trimmed squares; Rousseeuw, 1984).
    y, x = torch.meshgrid(
        *(torch.linspace(-1, 1, side) for side in brightness.shape), indexing="ij"
    )
    surface = torch.stack([x**0, x, y, x * x, x * y, y * y], dim=-1)
    difference = brightness - brightness.median()
    for _ in range(10):
        paper = difference.abs() <= difference.abs().median()
        fit = torch.linalg.lstsq(surface[paper], brightness[paper].unsqueeze(1), driver="gelsd")
        difference = brightness - (surface @ fit.solution).squeeze(-1)
    ink = (difference if difference.pow(3).sum() > 0 else -difference).clamp(min=0)

    # Otsu's threshold (1979): the one that splits the pixels into the most distant two classes.
    levels = torch.linspace(0.02, 0.98, 49) * ink.max()
    above = (ink.flatten() > levels.unsqueeze(1)).float()
    shares = above.mean(1)
    high = (above * ink.flatten()).mean(1) / shares
    low = ((1 - above) * ink.flatten()).mean(1) / (1 - shares)
    best = (shares * (1 - shares) * (high - low) ** 2).nan_to_num().argmax()
    if not high[best] > 0.1:  # less contrast than a faint pencil's
        raise ValueError("blank: nothing is written on it")
    half = levels[best] / 2
    ink = ((ink - half) / (high[best] - half)).clamp(0, 1)

    # Connected parts, by spreading the largest label; what is small beside the largest is dirt.
    stroke = ink > 0.5
    spread = torch.arange(1.0, ink.numel() + 1).view(ink.shape) * stroke
    labels = torch.zeros_like(spread)
    while not torch.equal(labels, spread):
        labels, spread = spread, dilated(spread, 2) * stroke  # 2: over a gap of one pixel
    sizes = labels.long().flatten().bincount()
    sizes[0] = 0
    kept = (sizes >= 0.1 * sizes.max())[labels.long()]
    return cropped(ink * dilated(kept.float(), 1), kept)


def like_mnist(brightness: Tensor) -> Tensor:
    """(H, W) in 0..1 to (1, 28, 28) uint8, made as MNIST was (LeCun et al., 1998).

    The ink fits into 20x20 pixels, with its centre of mass in the middle of 28x28. An image that
    is so already stays as it is.

    Raises:
        ValueError: nothing is written on it.
    """

    def centre(ink: Tensor) -> list[float]:
        return [
            ((ink.sum(1 - axis) * torch.arange(ink.shape[axis])).sum() / ink.sum()).item()
            for axis in (0, 1)
        ]

    if brightness.shape == (28, 28) and brightness.any():
        fits = max(cropped(brightness, brightness > 0).shape) in (19, 20)
        if fits and all(abs(middle - 14) < 0.55 for middle in centre(brightness)):
            return (brightness * 255).round().byte().unsqueeze(0)

    # Four dots a pixel. MNIST's strokes are mostly 1.4 to 2.7 pixels thick: others are made so.
    ink = F.pad(resized(find_ink(brightness), 80), [16] * 4)
    stroke = (ink > 0.5).float()
    outline = stroke.diff(dim=0).abs().sum() + stroke.diff(dim=1).abs().sum()
    thickness = (2 * stroke.sum() / outline).item() / 4
    grow = round(2 * (min(max(thickness, 1.4), 2.7) - thickness))
    ink = dilated(ink, grow) if grow >= 0 else -dilated(-ink, min(-grow, 2))

    ink = resized(cropped(ink, ink > 0.2), 20)
    top, left = (
        min(max(round(14 - middle), 0), 28 - side)
        for middle, side in zip(centre(ink), ink.shape, strict=True)
    )
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, top : top + ink.shape[0], left : left + ink.shape[1]] = (255 * ink / ink.max()).round()
    return image


def predict_digits(model: nn.Module, images: Any) -> tuple[Tensor, Tensor]:
    """Classify pictures of one handwritten digit each.

    Args:
        model: as load_and_evaluate_model returns it.
        images: a list of paths, PIL images, arrays or tensors (see read_brightness), or a batch
            of them as one array or tensor. Any size, dark on light or light on dark.

    Returns:
        digits (N,) int64; probabilities (N, 10) float32.

    Raises:
        OSError, ValueError: see read_brightness and like_mnist; the message names the picture.
    """
    batch = []
    for number, picture in enumerate(images):
        name = picture if isinstance(picture, (str, Path)) else f"picture {number}"
        try:
            batch.append(like_mnist(read_brightness(picture)))
        except (OSError, ValueError) as error:
            raise type(error)(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    device = next(model.parameters()).device
    probabilities = infer(model, torch.stack(batch).to(device)).softmax(1).cpu()
    return probabilities.argmax(1), probabilities


# ---- Pictures -----------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> "Figure":
    """Not one of pyplot, which keeps every figure and picks a backend: this needs no display."""
    from matplotlib.figure import Figure

    def png() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer)
        return buffer.getvalue()

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = png  # type: ignore[attr-defined]  # what a notebook shows
    return figure


def plot_history(history: list[EpochMetrics]) -> "Figure":
    """Loss, accuracy and learning rate over the epochs, with the kept epoch marked."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    kept = kept_epoch(history).epoch
    figure = new_figure(13, 4.5)
    loss_axes, accuracy_axes, rate_axes = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    # Blue, orange and black: apart for the colour-blind too.
    for axes, name, color, label in (
        (loss_axes, "loss", "C0", "training (augmented, with dropout)"),
        (loss_axes, "validation_loss", "C1", "validation"),
        (accuracy_axes, "train_accuracy", "C0", "training (augmented, with dropout)"),
        (accuracy_axes, "validation_accuracy", "C1", "validation"),
        (accuracy_axes, "test_accuracy", "black", "test"),
        (rate_axes, "learning_rate", "C0", "at the epoch's end"),
    ):
        values = [getattr(metrics, name) for metrics in history]
        if axes is accuracy_axes:  # errors on a logarithmic axis: 99.5 and 99.6 % are apart there
            values = [100 - accuracy for accuracy in values]
        axes.plot([metrics.epoch for metrics in history], values, ".-", color=color, label=label)

    loss_axes.set(title="Loss", ylabel="cross-entropy (nats)", yscale="log")
    accuracy_axes.set(title="Accuracy", ylabel="accuracy (%)", yscale="log")
    accuracy_axes.invert_yaxis()
    rate_axes.set(title="Learning rate", ylabel="Adam's learning rate")
    for axes in (loss_axes, accuracy_axes):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in figure.axes:
        axes.axvline(kept, color="gray", linestyle=":", label=f"kept: epoch {kept}")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss_axes.yaxis.set_major_formatter("{x:g}")
    accuracy_axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}")
    return figure


def plot_mistakes(images: Tensor, labels: Tensor, logits: Tensor) -> "Figure":
    """Which digits are taken for which, and the images that are missed, the surest mistake first.

    Args:
        images: (N, 1, 28, 28), brighter is more ink.
        labels: (N,) int64.
        logits: (N, 10).
    """
    from matplotlib.ticker import MultipleLocator

    images, labels, logits = images.cpu(), labels.cpu(), logits.cpu()
    confidence, guesses = logits.softmax(1).max(1)
    missed = (guesses != labels).nonzero().flatten()
    missed = missed[confidence[missed].argsort(descending=True)]
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels[missed], guesses[missed]), torch.tensor(1), accumulate=True)

    columns = 8
    rows = min(max(5, math.ceil(len(missed) / columns)), 12)
    figure = new_figure(13, 1.15 * rows + 0.6)
    shown = "" if len(missed) <= rows * columns else f"; the {rows * columns} surest are shown"
    figure.suptitle(f"{len(missed):,} of {len(labels):,} images missed{shown}")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 8), squeeze=False)[0]
    axes = left.subplots()
    axes.imshow(counts.numpy(), cmap="Blues")
    for truth, guess in counts.nonzero().tolist():
        count = counts[truth, guess].item()
        color = "white" if count > counts.max() / 2 else "black"
        axes.text(guess, truth, count, ha="center", va="center", color=color)
    axes.set(title="Number of mistakes", xlabel="guess", ylabel="truth")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.yaxis.set_major_locator(MultipleLocator(1))

    pictures = right.subplots(rows, columns, squeeze=False).flatten()
    for axes in pictures:
        axes.axis("off")
    for axes, i in zip(pictures, missed.tolist(), strict=False):
        axes.imshow(images[i, 0].numpy(), cmap="gray_r")
        title = f"{labels[i]} as {guesses[i]}, {100 * confidence[i]:.0f}%"
        axes.set_title(title, fontsize=9, pad=2)
    return figure


# ---- Command line -------------------------------------------------------------------------------


def add_hyperparameters(parser: argparse.ArgumentParser, *names: str) -> None:
    """A flag for each field of HyperParameters, or for those named: explanation and default."""
    defaults = HyperParameters()
    for f in fields(defaults):
        if names and f.name not in names:
            continue
        default = getattr(defaults, f.name)
        flag, explanation = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=explanation)
            continue
        parser.add_argument(
            flag,
            type=type(default),
            default=default,
            metavar=type(default).__name__.upper(),
            help=f"{explanation} (allowed: {f.metadata['allowed']}, default: %(default)s)",
        )


def save_mistakes(model: nn.Module, checkpoint: Path, params: HyperParameters) -> None:
    """Draw the test images that are missed, in `<checkpoint>_mistakes.png`; print it by digit."""
    images, labels = load_images(params, train=False)
    logits = infer(model, images.to(pick_device(params))).cpu()
    picture = checkpoint.with_name(f"{checkpoint.stem}_mistakes.png")
    plot_mistakes(images, labels, logits).savefig(picture)
    missed = labels[logits.argmax(1) != labels].bincount(minlength=10)
    for digit, (errors, total) in enumerate(zip(missed, labels.bincount(), strict=True)):
        accuracy = 100 - 100 * errors / total
        say(params, f"{digit}: {accuracy:.2f}%, {errors} of {total} missed")
    say(params, f"Drawn in {picture}")


def train_command(argv: list[str]) -> None:
    from torchsummary import summary

    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]\n"
        "       %(prog)s evaluate [--help] [options] [CHECKPOINT]\n"
        "       %(prog)s predict [--help] [options] FILE...",
        description="Train TinyCNN on MNIST and evaluate it.",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        help="file for the weights; the pictures go beside it (default: %(default)s, or "
        "synthetic_model.pth)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="carry on the run that was interrupted"
    )
    add_hyperparameters(parser)
    arguments = vars(parser.parse_args(argv))
    checkpoint, resume = arguments.pop("checkpoint"), arguments.pop("resume")
    params = HyperParameters(**arguments)
    if params.synthetic and checkpoint == CHECKPOINT:
        checkpoint = Path("synthetic_model.pth")
    if dist.is_torchelastic_launched():
        join_processes(params)
    if process_rank() == 0:
        summary(TinyCNN(params.dropout_rate), (1, 28, 28), device="cpu")
    model, history = train_model(params, checkpoint, resume)
    rank = process_rank()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    plot_history(history).savefig(checkpoint.with_name(f"{checkpoint.stem}_curves.png"))
    save_mistakes(model, checkpoint, params)
    say(params, "Evaluating saved best model:")
    load_and_evaluate_model(checkpoint, params)


def evaluate_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} evaluate",
        description="Evaluate a checkpoint on MNIST's test images, and draw its mistakes.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT)
    add_hyperparameters(parser, "device", "data_dir", "synthetic")
    arguments = vars(parser.parse_args(argv))
    checkpoint = arguments.pop("checkpoint")
    params = HyperParameters(**arguments)
    model, _ = load_and_evaluate_model(checkpoint, params)
    save_mistakes(model, checkpoint, params)


def predict_command(argv: list[str]) -> int:
    """Print a line a file; 2 if one of them could not be classified, else 0."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} predict",
        description="Classify pictures of one handwritten digit each.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a picture; - is standard input")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: %(default)s")
    add_hyperparameters(parser, "device")
    arguments = parser.parse_args(argv)
    model = load_checkpoint(arguments.checkpoint, HyperParameters(device=arguments.device))
    status = 0
    for name in arguments.files:
        picture = io.BytesIO(sys.stdin.buffer.read()) if name == "-" else name
        try:
            _, (probabilities,) = predict_digits(model, [picture])
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        (best, second), (digit, runner_up) = (top.tolist() for top in probabilities.topk(2))
        if arguments.json:
            line = {"file": name, "digit": digit, "probabilities": probabilities.tolist()}
            print(json.dumps(line), flush=True)
        else:
            chances = f"{digit} ({100 * best:.1f}%), or {runner_up} ({100 * second:.1f}%)"
            print(f"{name}: {chances}", flush=True)
    return status


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; 0, or 2 after an error in what was asked."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["predict"]:
            return predict_command(argv[1:])
        if argv[:1] == ["evaluate"]:
            evaluate_command(argv[1:])
        else:
            train_command(argv)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.args or [signal.SIGINT])[0]
    return 0


def stop_on_signal(number: int, _: object) -> None:
    # A second one stops at once; but torchrun passes on what the terminal has sent already.
    again = signal.SIG_IGN if dist.is_torchelastic_launched() else signal.SIG_DFL
    signal.signal(number, again)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_on_signal)
    sys.exit(main())
