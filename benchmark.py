"""Measurements that take too long for a test.

python benchmark.py seeds --n 10    accuracy over ten seeds, mean ± sd
python benchmark.py speed           speed of training, against a plain loop

Both take the hyperparameters of mnist_cnn.py as further flags. `seeds` trains
one seed per core at a time, on one thread each, and appends each result to a
file. A seed that is in the file already, with the same hyperparameters, is not
trained again: when the program has changed, name another file, or delete it.
"""

import io
import json
import multiprocessing
import signal
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
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
from mnist_cnn import EpochMetrics, HyperParameters, TinyCNN

spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA


# ---- Accuracy over seeds -------------------------------------------------------------


def train_seed(params: HyperParameters) -> dict[str, Any]:
    """Train silently on one thread. Returns a line of the results file."""
    torch.set_num_threads(1)
    silence = io.StringIO()
    start = perf_counter()
    with (
        TemporaryDirectory() as folder,
        redirect_stdout(silence),
        redirect_stderr(silence),
    ):
        _, history = mnist_cnn.train_model(params, Path(folder, "model.pth"))
    return {
        "params": asdict(params),
        "seconds": perf_counter() - start,
        "history": [metrics._asdict() for metrics in history],
    }


def train_seeds(runs: list[HyperParameters], path: Path) -> Iterator[dict[str, Any]]:
    """The results of all runs, from the file or else from training."""
    missing = [asdict(run) for run in runs]
    if path.exists():
        for line in path.read_text().splitlines():
            result = json.loads(line)
            if result["params"] in missing:
                missing.remove(result["params"])
                yield result
    if not missing:
        return
    mnist_cnn.load_images(runs[0], train=True)  # downloads it once, not in every worker
    on_cpu = mnist_cnn.pick_device(runs[0].device).type == "cpu"
    num_workers = torch.get_num_threads() if on_cpu else 1
    ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # it stops the main process
    with (
        path.open("a") as file,
        spawn.Pool(num_workers, signal.signal, ignore_ctrl_c) as pool,
    ):
        for result in pool.imap_unordered(
            train_seed, [HyperParameters(**params) for params in missing]
        ):
            print(json.dumps(result), file=file, flush=True)
            yield result


def seeds(params: HyperParameters, n: int, path: Path) -> None:
    """Print the accuracies of n seeds, from params.random_seed on."""
    runs = [replace(params, random_seed=params.random_seed + i) for i in range(n)]
    chosen, last = [], []
    for result in train_seeds(runs, path):
        history = [EpochMetrics(**metrics) for metrics in result["history"]]
        best = mnist_cnn.best_epoch(history)
        chosen.append(best)
        last.append(history[-1])
        seed = result["params"]["random_seed"]
        print(
            f"Seed {seed}, best epoch {best.epoch}, {result['seconds']:.0f} s - {best}",
            flush=True,
        )
    report("Test accuracy, best epoch on validation", [e.test_accuracy for e in chosen])
    report("Test accuracy, last epoch", [e.test_accuracy for e in last])
    report("Validation accuracy, best epoch", [e.validation_accuracy for e in chosen])


def report(name: str, values: list[float]) -> None:
    sd = stdev(values) if len(values) > 1 else float("nan")
    low, high = min(values), max(values)
    print(f"{name}: {mean(values):.3f} ± {sd:.3f} % ({low:.2f} to {high:.2f})")


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
    model.to(memory_format=torch.contiguous_format)
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
    images, labels = mnist_cnn.load_images(params, train=True)
    training_set = images[:num_images].to(device), labels[:num_images].to(device)
    mnist_cnn.keep_freed_memory()
    model = TinyCNN(params.dropout_rate).to(device)
    optimizer, schedule = mnist_cnn.make_optimizer(model, num_images, params)
    for epoch in range(1, params.num_epochs + 1):
        mnist_cnn.train_epoch(model, optimizer, schedule, training_set, epoch, params)
        yield


def images_per_second(loop: Any, params: HyperParameters) -> float:
    """Of the second epoch of 12,800 images; the first one is to warm up."""
    epochs = loop(params, 12_800)
    with redirect_stderr(io.StringIO()):  # no progress bar
        next(epochs)
        start = perf_counter()
        next(epochs)
        return 12_800 / (perf_counter() - start)


def speed(params: HyperParameters) -> None:
    """Time both loops five times, in turn: what slows down one slows down both."""
    device, threads = mnist_cnn.pick_device(params.device), torch.get_num_threads()
    print(f"torch {torch.__version__}, {device}, {threads} threads")
    ratios = []
    with spawn.Pool(1, maxtasksperchild=1) as pool:  # each time in a new process
        for _ in range(5):
            ours, plain = (
                pool.apply(images_per_second, (loop, params))
                for loop in (train_as_we_do, train_plainly)
            )
            print(f"{ours:,.0f} images/s, plain loop {plain:,.0f}: {ours / plain:.2f}")
            ratios.append(ours / plain)
    print(f"Median ratio: {median(ratios):.2f}")


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("measurement", choices=["seeds", "speed"])
    parser.add_argument("--n", type=int, default=10, help="number of seeds")
    parser.add_argument(
        "--results", type=Path, default="seeds.jsonl", help="file of trained seeds"
    )
    arguments, flags = parser.parse_known_args()
    params, _ = mnist_cnn.parse_arguments(flags)
    if arguments.measurement == "seeds":
        seeds(params, arguments.n, arguments.results)
    else:
        speed(params)


if __name__ == "__main__":
    main()
