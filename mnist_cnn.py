"""TinyCNN on MNIST: 19,354 parameters, 99.5 % test accuracy after 20 epochs.

python mnist_cnn.py                     train, save best_mnist_model.pth, draw the curves
python mnist_cnn.py --num-epochs 5      every field of HyperParameters is a flag: see --help
python mnist_cnn.py --resume            carry on after Ctrl-C, a crash or a power failure
python mnist_cnn.py --synthetic         try it without MNIST, on digits drawn in a font
python mnist_cnn.py evaluate            test accuracy of best_mnist_model.pth, by digit
python mnist_cnn.py predict photo.jpg   which digit is on a picture of your own
torchrun --nproc-per-node=2 mnist_cnn.py    train with two processes, or on two GPUs

Test accuracy: 99.525 ± 0.059 %, mean ± sd over 10 seeds (`python benchmark.py seeds --n 10`), on 2
cores of an AMD EPYC with torch 2.14.1, November 2026.
"""

import contextlib
import ctypes
import gzip
import hashlib
import io
import json
import math
import os
import signal
import socket
import sys
import tempfile
import warnings
import zipfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported, no traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

import plots
from plots import plot_mistakes


# ---- Configuration ------------------------------------------------------------------------------
def setting(default: Any, explanation: str) -> Any:
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True)
class HyperParameters:
    """A run's settings. ValueError: a value breaks its rule."""

    num_epochs: int = setting(20, "passes over the training images")
    batch_size: int = setting(64, "images a step")
    learning_rate: float = setting(0.0009, "Adam's rate at the first step")
    dropout_rate: float = setting(0.25, "share of activations zeroed, in 20 epochs; falls to 0")
    random_seed: int = setting(42, "seeds weights, shuffle, warp and dropout")
    peak_factor: float = setting(10.0, "highest learning rate / learning_rate")
    augmentation: float = setting(1.0, "strength of the random warp, in 20 epochs; 0: none")
    validation_size: int = setting(5_000, "training images that choose the epoch")
    synthetic: bool = setting(False, "digits drawn in a font in place of MNIST")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, ...; auto: an accelerator, else cpu")
    precision: str = setting("auto", "of training: float32; auto: bfloat16 on a CPU that has it")
    data_dir: str = field(
        default_factory=lambda: os.environ.get("MNIST_DATA_DIR") or "data",
        metadata={"help": "holds MNIST/raw; $MNIST_DATA_DIR if that is set"},
    )

    def __post_init__(self) -> None:
        kinds: Any = {int: Integral, float: Real, bool: bool, str: (str, os.PathLike)}
        for f in fields(self):
            kind: Any = f.type
            value = getattr(self, f.name)
            if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{f.name} is {value!r}; it must be of type {kind.__name__}")
            object.__setattr__(self, f.name, kind(value))  # NumPy's numbers, paths
        for name, rule, holds in (
            ("num_epochs", "1 or more", self.num_epochs >= 1),
            ("batch_size", "from 1 to 60,000", 1 <= self.batch_size <= 60_000),
            ("learning_rate", "more than 0, and finite", 0 < self.learning_rate < math.inf),
            ("dropout_rate", "0 or more, and less than 1", 0 <= self.dropout_rate < 1),
            ("random_seed", "from 0 to 4,294,967,295", 0 <= self.random_seed < 2**32),
            ("peak_factor", "1 or more, and finite", 1 <= self.peak_factor < math.inf),
            ("augmentation", "from 0 to 6", 0 <= self.augmentation <= 6),
            ("validation_size", "from 0 to 59,999", 0 <= self.validation_size < 60_000),
            ("precision", "auto or float32", self.precision in ("auto", "float32")),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


# ---- Data ---------------------------------------------------------------------------------------
Split = tuple[Tensor, Tensor]  # images (N, 1, 28, 28) uint8, 255 is ink; labels (N,) int64
MNIST_FILES = {  # and their MD5 sums, as extracted: torchvision checks only its downloads
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def download_mnist(raw: Path) -> None:
    """Have torchvision put the files into the folder raw, each whole or not at all."""
    from torchvision.datasets import MNIST

    print(f"Downloading MNIST to {raw}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that swallows packets would hold for minutes
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw) as folder:  # others may be downloading too
            MNIST(folder, download=True)
            for name in MNIST_FILES:
                Path(folder, "MNIST", "raw", name).replace(raw / name)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"MNIST is not in {raw} and cannot be downloaded ({str(error).splitlines()[-1]}): put "
            f"{', '.join(MNIST_FILES)} there, or set MNIST_DATA_DIR, or try --synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def load_images(params: HyperParameters, train: bool) -> Split:
    """All 60,000 training or 10,000 test images; OSError, ValueError: missing, or not official."""
    if params.synthetic:
        from digits import draw_digits

        return draw_digits(60_000 if train else 10_000, seed=int(train))
    raw = Path(params.data_dir, "MNIST", "raw").expanduser().resolve()
    if not all((raw / name).exists() or (raw / f"{name}.gz").exists() for name in MNIST_FILES):
        download_mnist(raw)
    tensors = []
    for name in list(MNIST_FILES)[:2] if train else list(MNIST_FILES)[2:]:
        path = raw / name if (raw / name).exists() else raw / f"{name}.gz"
        content = path.read_bytes()
        with contextlib.suppress(Exception):  # the check sum tells
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_FILES[name]:
            raise ValueError(f"{path} is damaged: delete it, and the next run downloads it again")
        tensors.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    images, labels = tensors
    return images[16:].view(-1, 1, 28, 28), labels[8:].long()  # what follows the headers


def load_splits(params: HyperParameters, device: torch.device) -> list[Split]:
    """The training, validation and test split; the same ones whatever the run's seed."""
    images, labels = load_images(params, train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.tensor_split([params.validation_size])
    halves = [(images[part], labels[part]) for part in (rest, held_out)]
    return [(x.to(device), y.to(device)) for x, y in (*halves, load_images(params, train=False))]


def normalize(images: Tensor) -> Tensor:
    """(N, 1, 28, 28) in 0..255, of any type, to float32 of the training set's mean 0 and sd 1."""
    return (images.float() / 255 - 0.1307) / 0.3081


def augment(images: Tensor, strength: float) -> Tensor:
    """Rotate, scale, stretch, slant and shift each image (N, 1, 28, 28) at random, in one pass."""
    uniform = torch.rand(6, len(images), device=images.device) * 2 - 1
    angle = math.radians(15 * strength) * uniform[0]
    size = 1 + 0.15 * strength * uniform[1]
    stretch = (1 + 0.12 * strength) ** uniform[2]  # of the width, and the height shrinks
    shear = 0.25 * strength * uniform[3]
    dx, dy = 2 * strength / 14 * uniform[4:]  # pixels; affine_grid's unit is half an image
    # The matrix leads from a pixel of the result back to its source: a larger size divides.
    cos, sin = angle.cos() / size, angle.sin() / size
    to_x = [cos * stretch, (cos * shear - sin) / stretch, dx]
    to_y = [sin * stretch, (sin * shear + cos) / stretch, dy]
    matrix = torch.stack([*to_x, *to_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


# ---- Model --------------------------------------------------------------------------------------
class TinyCNN(nn.Module):
    """(N, 1, 28, 28) normalized images to (N, 10) logits; the comments give receptive fields."""

    def __init__(self, dropout_rate: float = 0.25) -> None:
        super().__init__()

        def normed(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.conv1 = nn.Sequential(  # 5
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()
        )
        self.conv2 = nn.Sequential(*normed(8, 12), *normed(12, 16), nn.MaxPool2d(2))  # 10
        self.conv3 = nn.Sequential(  # 20
            *normed(16, 20), nn.Dropout2d(dropout_rate), *normed(20, 16), nn.MaxPool2d(2)
        )
        self.conv4 = nn.Sequential(  # 28
            *normed(16, 16), nn.Dropout2d(dropout_rate), nn.Conv2d(16, 16, 1), nn.ReLU()
        )
        self.fc = nn.Sequential(nn.Dropout(dropout_rate), nn.Linear(16 * 7 * 7, 10))
        self.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv4(self.conv3(self.conv2(self.conv1(images))))
        return self.fc(features.flatten(1))


# ---- Several processes --------------------------------------------------------------------------
# torchrun starts them. Each takes its share of every batch; all have the same weights.
def join_processes(params: HyperParameters) -> None:
    """Under torchrun, train together with the others; only the first one's prints are seen."""
    if dist.is_torchelastic_launched():
        if pick_device(params).type != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if pick_device(params).type == "cpu" else None)  # or NCCL
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        if os.environ["LOCAL_RANK"] == "0":
            load_images(params, train=True)  # one on each machine downloads, the others wait
        dist.barrier()


def leave_processes() -> None:
    """From here on, the first process is alone."""
    if dist.is_initialized():
        others = rank() > 0
        dist.destroy_process_group()
        if others:
            sys.exit()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensors: list[Any]) -> None:
    """In place, the sum of each over the processes: 19,354 gradients are one message of 77 kB."""
    if dist.is_initialized():
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        for tensor, part in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def copy_buffers_of_first(model: nn.Module) -> None:
    if dist.is_initialized():
        for statistics in model.buffers():  # BatchNorm's, of each process's own shares
            dist.broadcast(statistics, 0)


# ---- Training -----------------------------------------------------------------------------------
StrPath = str | os.PathLike[str]
CHECKPOINT = Path("best_mnist_model.pth")
PARTS = "model", "optimizer", "schedule"  # of a Run: what has a state_dict


class EpochMetrics(NamedTuple):
    """One epoch: loss in nats an image, accuracy in percent; NaN without validation images."""

    epoch: int
    loss: float  # with train_accuracy, as trained: warp, dropout, smoothed labels; looks worse
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_accuracy: float
    learning_rate: float  # at the epoch's end

    def __str__(self) -> str:
        trained = f"Loss: {self.loss:.4f}, Train Acc: {self.train_accuracy:.2f}%"
        validated = "" if math.isnan(v := self.validation_accuracy) else f", Val Acc: {v:.2f}%"
        return f"{trained}{validated}, Test Acc: {self.test_accuracy:.2f}%"


def kept_epoch(history: list[EpochMetrics]) -> EpochMetrics:
    """The best on validation, on a tie that of the lower loss; the last if all are NaN."""
    return max(reversed(history), key=lambda e: (e.validation_accuracy, -e.validation_loss))


def pick_device(params: HyperParameters) -> torch.device:
    """What params.device names, or ValueError; "auto" is an accelerator, or else the CPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    name = str(best) if params.device == "auto" else params.device
    try:
        there = torch.ones(1, device=name)
        there.item()  # "meta" has none
    except (RuntimeError, AssertionError, ImportError) as error:  # each device has its own
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return there.device


def pick_precision(params: HyperParameters, device: torch.device) -> str:
    """bfloat16 where the CPU is known (since torch 2.11) to have it: 1.3 times as fast."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = device.type == "cpu" and capabilities.get("avx512_bf16") is True
    return "bfloat16" if native and params.precision == "auto" else "float32"


class Run:
    """A run between two epochs: all that it takes to carry on."""

    def __init__(self, params: HyperParameters, device: torch.device, num_images: int) -> None:
        last_batch = num_images % params.batch_size or params.batch_size
        if last_batch < world_size():
            raise ValueError(f"{world_size()} processes cannot share a last batch of {last_batch}")
        if sys.platform == "linux":  # glibc shall reuse memory, not return it at every step: 1.1 x
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: no larger one is accepted
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        torch.backends.cudnn.deterministic = True  # of a GPU's convolutions
        torch.manual_seed(1000 * params.random_seed)
        self.model = TinyCNN(params.dropout_rate).to(device)
        self.optimizer = Adam(self.model.parameters(), params.learning_rate, fused=True)
        # Up to the peak in 30 % of the steps, then down to nearly 0; Adam's momentum goes the other
        # way (Smith and Topin, "Super-Convergence", 2018).
        peak = params.learning_rate * params.peak_factor
        steps = params.num_epochs * math.ceil(num_images / params.batch_size)
        self.schedule = OneCycleLR(self.optimizer, peak, steps, div_factor=params.peak_factor)
        self.history: list[EpochMetrics] = []
        self.best: dict[str, Tensor] = {}  # weights of kept_epoch(history)


def train_epoch(run: Run, training_set: Split, params: HyperParameters) -> tuple[float, float]:
    """One pass over the training set, under a progress bar: its mean loss, and its accuracy."""
    images, labels = training_set
    epoch = len(run.history) + 1
    # All of an epoch's randomness comes from here: a resumed run needs no other state.
    torch.manual_seed(1000 * params.random_seed + epoch)
    batches = torch.randperm(len(images)).to(images.device).split(params.batch_size)
    if rank() > 0:  # the shuffle is everybody's, the warp and the dropout are each process's own
        torch.manual_seed(torch.initial_seed() + rank() * 2**40)
    length = min(1.0, params.num_epochs / 20)  # short runs: less warp and dropout, smoothed labels
    cross_entropy = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.05 * (1 - length))
    for layer in run.model.train().modules():
        # Dropout helps early epochs and harms the last ones: it falls to 0 (Rennie et al., 2014).
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = params.dropout_rate * length * (1 - epoch / params.num_epochs)
    bfloat16 = pick_precision(params, images.device) == "bfloat16"
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16)
    sums = torch.zeros(2, device=images.device)  # of the losses, and of the right answers
    # No bar in a log file; but one in a notebook, whose standard error is no terminal either.
    watched = rank() == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    with tqdm(batches, f"Epoch {epoch}/{params.num_epochs}", disable=not watched) as bar:
        for step, batch in enumerate(bar, start=1):
            share = batch[rank() :: world_size()]
            warped = normalize(augment(images[share], params.augmentation * math.sqrt(length)))
            with autocast:
                logits = run.model(warped)
                loss = cross_entropy(logits, labels[share])
            run.optimizer.zero_grad()
            (loss / len(batch)).backward()
            add_up([weight.grad for weight in run.model.parameters()])
            run.optimizer.step()
            run.schedule.step()
            sums += torch.stack([loss.detach(), (logits.argmax(1) == labels[share]).sum()])
            # Reading a number makes a GPU finish all that it was given: not at every step.
            if step % 50 == 0 or step == len(batches):
                mean_loss, accuracy = means(sums, min(step * params.batch_size, len(images)))
                bar.set_postfix_str(f"loss={mean_loss:.3f}, acc={accuracy:.2f}%")
    return mean_loss, accuracy


def means(sums: Tensor, num_images: int) -> tuple[float, float]:
    """Mean loss, and accuracy in percent, of each process's sums of both; NaN of no images."""
    totals = sums.clone()
    add_up([totals])
    loss, correct = totals.tolist()  # divided in Python: a float32 prints 89.0799999 for 89.08
    return loss / (num_images or math.nan), 100 * correct / (num_images or math.nan)


def infer(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 10) logits of (N, 1, 28, 28) uint8 images. Leaves the model in eval mode."""
    model.eval()
    device = next(model.parameters(), images).device
    with torch.inference_mode():
        # 200 images' activations fit into a core's cache: twice as fast as 1,000 at a time.
        return torch.cat([model(normalize(batch.to(device))) for batch in images.split(200)])


def evaluate_model(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats, and accuracy in percent; NaN of no images.

    images: (N, 1, 28, 28) uint8; labels: (N,) int64. Leaves the model in eval mode.
    """
    share = slice(rank(), None, world_size())
    logits = infer(model, images[share])
    answers = labels[share].to(logits.device)
    loss = F.cross_entropy(logits, answers, reduction="sum")
    return means(torch.stack([loss, (logits.argmax(1) == answers).sum()]), len(labels))


def one_epoch(run: Run, splits: list[Split], params: HyperParameters) -> None:
    """Train, evaluate, and add the epoch to the run; FloatingPointError if training diverges."""
    training = train_epoch(run, splits[0], params)
    copy_buffers_of_first(run.model)
    fused = fuse(run.model.eval())  # a copy with BatchNorm in the convolutions: faster
    validation, (test_loss, test_accuracy) = (evaluate_model(fused, *split) for split in splits[1:])
    rate = float(run.schedule.get_last_lr()[0])
    epoch = EpochMetrics(len(run.history) + 1, *training, *validation, test_accuracy, rate)
    if not math.isfinite(epoch.loss + test_loss):
        raise FloatingPointError(f"diverged in epoch {epoch.epoch}: start at a lower learning_rate")
    history, best = [*run.history, epoch], run.best
    if kept_epoch(history) is epoch:
        best = {name: tensor.cpu().clone() for name, tensor in run.model.state_dict().items()}
    run.history, run.best = history, best  # together: Ctrl-C may come at any time


def train_model(
    params: HyperParameters, checkpoint_path: StrPath = CHECKPOINT, resume: bool = False
) -> tuple[TinyCNN, list[EpochMetrics]]:
    """Train on MNIST, printing a line an epoch, and save the kept epoch's weights.

    Every epoch is saved to `<checkpoint_path>.resume`, from where resume=True carries on, to the
    same weights to the bit. A run that is stopped after an epoch or more keeps its best too.

    Returns the model with the kept epoch's weights, in eval mode, and the metrics of every epoch.
    OSError, ValueError: data or a file cannot be used. FloatingPointError: training diverged.
    """
    path = writable(checkpoint_path)
    run_path = path.with_name(f"{path.name}.resume")
    if params.synthetic and path.name == CHECKPOINT.name:
        raise ValueError(f"{path} is for MNIST: name another checkpoint for synthetic digits")
    if resume and not run_path.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {run_path}")
    device = pick_device(params)
    splits = load_splits(params, device)
    run = Run(params, device, num_images=len(splits[0][0]))
    threads = f"{torch.get_num_threads()} threads{', synthetic digits' * params.synthetic}"
    if device.type == "cpu" and torch.get_num_threads() > 1:
        threads += "; on a busy CPU, try OMP_NUM_THREADS=1"
    print(f"Training on {device} in {pick_precision(params, device)}, {threads}", flush=True)
    if resume:
        load_run(run, run_path, params)
        print(f"Carrying on after epoch {len(run.history)}")
    elif run_path.exists():
        print(f"{run_path} holds an interrupted run: it will be replaced after one epoch")
    try:
        while len(run.history) < params.num_epochs:
            one_epoch(run, splits, params)
            save_run(run, run_path, params)
            print(f"Epoch {len(run.history)}/{params.num_epochs} - {run.history[-1]}", flush=True)
    except (KeyboardInterrupt, FloatingPointError, OSError) as stop:
        message = "There is nothing to keep"
        if run.history:
            save(run.best, path)
            message = f"{path} has the best so far, epoch {kept_epoch(run.history).epoch}"
            if run_path.exists() and not isinstance(stop, FloatingPointError):
                message += "; --resume carries on"
        print(f"Stopped after epoch {len(run.history)}. {message}")
        raise
    save(run.best, path)
    if rank() == 0:
        run_path.unlink(missing_ok=True)
    run.model.load_state_dict(run.best)
    kept = kept_epoch(run.history)
    accuracy = f"{kept.validation_accuracy:.2f}%" if params.validation_size > 0 else "none taken"
    print(f"Loaded best model from epoch {kept.epoch} with validation accuracy: {accuracy}")
    return run.model.eval(), run.history


# ---- Checkpoints --------------------------------------------------------------------------------
def writable(checkpoint_path: StrPath) -> Path:
    """The path, resolved; OSError, before minutes are spent, if nothing can be saved there."""
    path = Path(checkpoint_path).resolve()
    for suffix in ("", ".tmp", ".resume", ".resume.tmp"):
        file = path.with_name(path.name + suffix)
        if file.exists() and not file.is_file():
            raise OSError(f"{file} is not a regular file")
    probe = path.with_name(f"{path.name}.resume.tmp{rank()}")  # other processes have their own
    probe.touch()
    probe.unlink()
    return path


def save(content: dict[str, Any], path: Path) -> None:
    """torch.save, by the first process: whatever dies when, the file is whole, old or new."""
    if rank() > 0:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; its old version is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """torch.load, but no code in the file is executed; OSError or ValueError, naming the file."""
    file = io.BytesIO(path.read_bytes())
    try:
        # torch.load does not compare check sums: it would read altered weights without a word.
        if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
            raise ValueError("a check sum does not fit")
        file.seek(0)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever the parsers come upon
        raise ValueError(f"{path} is not a dict of tensors that torch.load can read") from error


def load_checkpoint(path: StrPath, params: HyperParameters) -> TinyCNN:
    """A TinyCNN with the weights of a state_dict file, in eval mode on the device of params.

    It may be a DataParallel model's, or wrapped: {"model_state_dict": ...}. OSError, ValueError: it
    cannot be read; it is damaged, or not a TinyCNN's.
    """
    content = load(Path(path))
    content = content.get("model_state_dict", content)
    model = TinyCNN(params.dropout_rate).to(pick_device(params))
    try:
        weights = {str(name).removeprefix("module."): value for name, value in content.items()}
        model.load_state_dict(weights)
        for name, expected in model.state_dict().items():  # what load_state_dict lets through
            if weights[name].dtype != expected.dtype or not weights[name].isfinite().all():
                raise ValueError(f"{name} is not {expected.dtype}, or has NaN or infinite values")
    except (AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the weights of a TinyCNN: {reason}") from error
    return model.eval()


def identity(params: HyperParameters) -> dict[str, Any]:
    """What a run's weights depend on, beside the machine, its threads and the processes."""
    return asdict(replace(params, data_dir="", device="")) | {"torch": str(torch.__version__)}


def save_run(run: Run, path: Path, params: HyperParameters) -> None:
    state: dict[str, Any] = {part: getattr(run, part).state_dict() for part in PARTS}
    history = [tuple(metrics) for metrics in run.history]
    save(state | {"run": identity(params), "history": history, "best": run.best}, path)


def load_run(run: Run, path: Path, params: HyperParameters) -> None:
    """Bring a new run to where save_run saw it; ValueError if it was another one."""
    state = load(path)
    try:
        was, now = state["run"].items(), identity(params).items()
        difference = f"it had {dict(was - now)}, not {dict(now - was)}"
        if was == now:
            run.model.load_state_dict(state["best"])  # or one would only see at the end
            for part in PARTS:
                getattr(run, part).load_state_dict(state[part])
            run.history = [EpochMetrics(*metrics) for metrics in state["history"]]
            run.best = state["best"]
            done, steps = run.schedule.last_epoch, run.schedule.total_steps
            if done * params.num_epochs != len(run.history) * steps:
                raise ValueError("epochs are missing")
    except Exception as error:  # whatever is missing
        raise ValueError(f"{path} is not an interrupted run") from error
    if was != now:
        raise ValueError(f"cannot resume the run in {path}: {difference}")


# ---- Using it -----------------------------------------------------------------------------------
def load_and_evaluate_model(model_path: StrPath, params: HyperParameters) -> tuple[TinyCNN, float]:
    """Load a checkpoint and print its accuracy on the 10,000 test images.

    Returns the model, in eval mode on the device of params, and the accuracy in percent. OSError,
    ValueError: the checkpoint or MNIST is missing, or damaged.
    """
    model = load_checkpoint(model_path, params)
    _, accuracy = evaluate_model(model, *load_images(params, train=False))
    print(f"Current test accuracy: {accuracy:.2f}%{' of synthetic digits' * params.synthetic}")
    return model, accuracy


def predict_digits(model: nn.Module, pictures: Any) -> tuple[Tensor, Tensor]:
    """Classify pictures of one handwritten digit each: what digits.read_digits takes.

    Returns the digits (N,) int64, and the probabilities (N, 10) float32, by the mean logits of an
    image and its 8 one-pixel shifts. Warns of several digits. OSError, ValueError name a bad one.
    """
    from digits import read_digits

    images = read_digits(pictures)
    shifted = [images.roll((down, right), (2, 3)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    probabilities = torch.stack([infer(model, batch) for batch in shifted]).mean(0).softmax(1).cpu()
    return probabilities.argmax(1), probabilities


def plot_history(history: list[EpochMetrics]) -> "plots.Figure":
    """Loss, accuracy and learning rate over the epochs, with the kept one marked."""
    return plots.plot_history(history, kept_epoch(history).epoch)


# ---- Command line -------------------------------------------------------------------------------
def add_flags(parser: ArgumentParser) -> None:
    defaults = HyperParameters()
    for f in fields(defaults):
        kind: Any = {"action": "store_true"} if f.type is bool else {"type": f.type}
        flag, default = f"--{f.name.replace('_', '-')}", getattr(defaults, f.name)
        parser.add_argument(flag, default=default, help=f.metadata["help"], **kind)


def report_mistakes(model: nn.Module, checkpoint: Path, params: HyperParameters) -> None:
    """Print the test accuracy by digit, and draw the images that are missed."""
    images, labels = load_images(params, train=False)
    logits = infer(model, images).cpu()
    missed = labels[logits.argmax(1) != labels].bincount(minlength=10)
    for digit, (errors, total) in enumerate(zip(missed, labels.bincount(), strict=True)):
        print(f"{digit}: {100 - 100 * errors / total:.2f}%, {errors} of {total} missed")
    picture = checkpoint.with_name(f"{checkpoint.stem}_mistakes.png")
    plot_mistakes(images, labels, logits).savefig(picture)
    print(f"Drawn in {picture}")


def train(params: HyperParameters, checkpoint: Path, resume: bool) -> None:
    from torchsummary import summary

    join_processes(params)
    summary(TinyCNN(params.dropout_rate), (1, 28, 28), device="cpu")
    model, history = train_model(params, checkpoint, resume)
    leave_processes()
    plot_history(history).savefig(checkpoint.with_name(f"{checkpoint.stem}_curves.png"))
    report_mistakes(model, checkpoint, params)
    print("Evaluating saved best model:")
    load_and_evaluate_model(checkpoint, params)


def predict(params: HyperParameters, checkpoint: Path, files: list[str], as_json: bool) -> int:
    """Print a line a file; 2 if one of them could not be classified, else 0."""
    from digits import read_digits

    model = load_checkpoint(checkpoint, params)
    names, images = [], [read_digits([])]
    for name in tqdm(files, "Reading", delay=1, leave=False, disable=None):
        try:
            images += [read_digits([getattr(sys.stdin, "buffer", None) if name == "-" else name])]
            names += [name]
        except (OSError, ValueError) as error:
            tqdm.write(f"error: {error}", sys.stderr)
    for name, probabilities in zip(names, predict_digits(model, torch.cat(images))[1], strict=True):
        (best, second), (digit, other) = (top.tolist() for top in probabilities.topk(2))
        line = f"{name}: {digit} ({100 * best:.1f}%), or {other} ({100 * second:.1f}%)"
        result = {"file": name, "digit": digit, "probabilities": probabilities.tolist()}
        print(json.dumps(result) if as_json else line)
    return 0 if len(names) == len(files) else 2


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; 0, or 2 after an error in what was asked."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("command", nargs="*", help="evaluate [CHECKPOINT] or predict FILE...")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the weights' file")
    parser.add_argument("--resume", action="store_true", help="carry on an interrupted run")
    parser.add_argument("--json", action="store_true", help="predict: a JSON object a line")
    add_flags(parser)
    arguments = vars(parser.parse_intermixed_args(argv))
    try:
        params = HyperParameters(**{f.name: arguments[f.name] for f in fields(HyperParameters)})
        checkpoint = arguments["checkpoint"]
        if params.synthetic and checkpoint == CHECKPOINT:
            checkpoint = Path("synthetic_model.pth")
        if arguments["command"] and dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
            return 0  # one process is enough
        match arguments["command"]:
            case []:
                train(params, checkpoint, arguments["resume"])
            case ["evaluate", *paths] if len(paths) < 2:
                checkpoint = Path(*paths or [checkpoint])
                model, _ = load_and_evaluate_model(checkpoint, params)
                report_mistakes(model, checkpoint, params)
            case ["predict", *files] if files:
                return predict(params, checkpoint, files, arguments["json"])
            case _:
                parser.error("nothing, evaluate [CHECKPOINT] or predict FILE... is expected")
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.args or [signal.SIGINT])[0]
    return 0


def stop_on_signal(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # torchrun sends what the terminal has sent already
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop_on_signal)
    sys.exit(main())
