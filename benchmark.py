"""Measurements that take too long for a test.

python benchmark.py seeds --n 10    accuracy over ten seeds, mean ± sd
python benchmark.py speed           speed of training, against a plain loop

Both take the hyperparameters of mnist_cnn.py as further flags. `seeds` trains
with one thread per seed, and on as many seeds at a time as torch has threads.
On a GPU it trains on one seed after the other. `speed` needs --num-epochs
of 2 or more.
"""

import io
import multiprocessing
import signal
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader

import mnist_cnn
from mnist_cnn import HyperParameters, Metrics, TinyCNN

spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA


# ---- Accuracy over seeds -------------------------------------------------------------


def train_seed(params: HyperParameters) -> tuple[list[Metrics], float]:
    """Train silently on one thread. Returns all epochs' metrics, and the seconds."""
    torch.set_num_threads(1)
    silence = io.StringIO()
    start = perf_counter()
    with (
        TemporaryDirectory() as folder,
        redirect_stdout(silence),
        redirect_stderr(silence),
    ):
        _, history = mnist_cnn.train_model(params, Path(folder, "model.pth"))
    return history, perf_counter() - start


def seeds(params: HyperParameters, n: int) -> None:
    """Print the accuracies of n seeds, from params.random_seed on."""
    runs = [replace(params, random_seed=params.random_seed + i) for i in range(n)]
    # Every worker reads it, but it is downloaded once.
    mnist_cnn.read_mnist(params.data_dir, train=True)
    on_cpu = mnist_cnn.pick_device(params.device).type == "cpu"
    num_workers = min(n, torch.get_num_threads()) if on_cpu else 1
    ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # it is for the main process alone
    chosen, last = [], []
    with spawn.Pool(num_workers, signal.signal, ignore_ctrl_c) as pool:
        for run, (history, seconds) in zip(
            runs, pool.imap(train_seed, runs), strict=True
        ):
            best = mnist_cnn.best_epoch(history)
            chosen.append(best)
            last.append(history[-1])
            print(
                f"Seed {run.random_seed}, {seconds:.0f} s,",
                f"best epoch {best['epoch']} -",
                mnist_cnn.EPOCH_LINE.format(**best),
                flush=True,
            )
        pool.close()
        pool.join()  # a worker that is killed leaks tqdm's semaphore
    report("Test accuracy, best epoch on validation", chosen, "test_accuracy")
    report("Test accuracy, last epoch", last, "test_accuracy")
    report("Validation accuracy, best epoch", chosen, "validation_accuracy")


def report(name: str, epochs: list[Metrics], metric: str) -> None:
    values = [epoch[metric] for epoch in epochs]
    low, high = min(values), max(values)
    print(
        f"{name}: {mean(values):.3f} ± {stdev(values):.3f} % ({low:.2f} to {high:.2f})"
    )


# ---- Speed ---------------------------------------------------------------------------


def train_plainly(params: HyperParameters, num_images: int) -> Iterator[None]:
    """Epochs of the loop that most MNIST scripts have: float32, no augmentation."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    device = mnist_cnn.pick_device(params.device)
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    dataset = MNIST(params.data_dir, transform=transform)
    dataset.data = dataset.data[:num_images]
    loader: DataLoader[Any] = DataLoader(dataset, params.batch_size, shuffle=True)
    model = TinyCNN(params.dropout_rate).to(device)
    optimizer = Adam(model.parameters(), lr=params.learning_rate)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # for its log
        yield


def train_as_we_do(params: HyperParameters, num_images: int) -> Iterator[None]:
    device = mnist_cnn.pick_device(params.device)
    images, labels = mnist_cnn.read_mnist(params.data_dir, train=True)
    training_set = images[:num_images].to(device), labels[:num_images].to(device)
    parts = mnist_cnn.prepare_training(params, num_images, device)
    for epoch in range(1, params.num_epochs + 1):
        mnist_cnn.train_epoch(*parts, training_set, epoch, params)
        yield


def images_per_second(loop: Any, params: HyperParameters) -> float:
    """Time the second epoch on 6,400 images. The first one is the warm-up."""
    epochs = loop(params, 6_400)
    with redirect_stderr(io.StringIO()):  # no progress bar
        next(epochs)
        start = perf_counter()
        next(epochs)
        return 6_400 / (perf_counter() - start)


def speed(params: HyperParameters) -> None:
    """Time both loops nine times in turn, each time in a new process.

    The speed of the plain loop differs from process to process. The fastest rounds
    differ less.
    """
    device, threads = mnist_cnn.pick_device(params.device), torch.get_num_threads()
    print(f"torch {torch.__version__}, {device}, {threads} threads")
    rounds = []
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(9):
            ours, plain = (
                pool.apply(images_per_second, (loop, params))
                for loop in (train_as_we_do, train_plainly)
            )
            print(f"{ours:,.0f} images/s, plain loop {plain:,.0f}: {ours / plain:.2f}")
            rounds.append((ours, plain))
    ratios = [ours / plain for ours, plain in rounds]
    ours, plain = map(max, zip(*rounds, strict=True))
    print(
        f"Median ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"Fastest of each: {ours:,.0f} and {plain:,.0f}: {ours / plain:.2f}")


def main() -> None:
    parser = ArgumentParser(
        usage="python %(prog)s {seeds,speed} [flags]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("measurement", choices=["seeds", "speed"])
    parser.add_argument("--n", type=int, default=10, help="number of seeds, 2 or more")
    arguments, others = parser.parse_known_args()
    if arguments.n < 2:
        parser.error("--n must be 2 or more")
    flags = mnist_cnn.parse_flags(others)
    if flags.keys() & {"resume", "evaluate", "checkpoint"}:
        parser.error("--resume, --evaluate and --checkpoint are flags of mnist_cnn.py")
    try:
        params = HyperParameters(**flags)
        if arguments.measurement == "seeds":
            seeds(params, arguments.n)
        else:
            speed(params)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
