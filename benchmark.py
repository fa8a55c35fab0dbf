"""Measurements that take too long for a test.

python benchmark.py seeds --n 10                   accuracy over ten seeds: mean ± sd
python benchmark.py seeds --loop straightforward   of the loop that most MNIST scripts have
python benchmark.py speed                          images a second and megabytes of both loops
python benchmark.py torture                        runs that are killed, files that are damaged
torchrun --nproc-per-node=2 benchmark.py speed --batch-size 1024    of several processes together
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from timeit import default_timer, repeat
from typing import Any

if __name__ == "__mp_main__":  # a worker: Ctrl-C is for the process that started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import torch
from torch.utils.data import DataLoader

import mnist_cnn
from mnist_cnn import EpochMetrics, HyperParameters, Split, TinyCNN

CHECKPOINT = Path(__file__).resolve().with_name("best_mnist_model.pth")
ROUNDS = 5
KILLS = 100
DAMAGED_FILES = 10_000
spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA


def straightforward(params: HyperParameters, splits: list[Split]) -> Iterator[EpochMetrics]:
    """Train as most MNIST scripts do: augmenting nothing, in float32, at one learning rate."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    (images, labels), validation_set, test_set = splits
    device = images.device
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    dataset = MNIST(params.data_dir, train=True, transform=transform, download=True)
    dataset.data, dataset.targets = images[:, 0].cpu(), labels.cpu()
    loader: DataLoader[Any] = DataLoader(dataset, params.batch_size, shuffle=True)
    torch.manual_seed(params.random_seed)
    model = TinyCNN(params.dropout_rate).to(device).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate)
    for epoch in range(1, params.num_epochs + 1):
        model.train()
        loss_sum, correct = 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += (logits.argmax(dim=1) == labels).sum().item()
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"diverged in epoch {epoch}")
        validated = mnist_cnn.evaluate_model(model, *validation_set)
        _, test_accuracy = mnist_cnn.evaluate_model(model, *test_set)
        trained = loss_sum / len(loader), 100 * correct / len(dataset)
        yield EpochMetrics(epoch, *trained, *validated, test_accuracy, params.learning_rate)


def recorded(params: HyperParameters, loop: str) -> dict[str, Any]:
    module = hashlib.sha256(Path(mnist_cnn.__file__).read_bytes()).hexdigest()
    return mnist_cnn.identity(params) | {"module": module, "loop": loop, "device": params.device}


def train_seed(params: HyperParameters, loop: str) -> dict[str, Any]:
    """Train without a word, and return a line for the results file."""
    torch.set_num_threads(1)  # this network's operators are too small to share
    start = default_timer()
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()) as out, redirect_stderr(out):
        if loop == "module":
            _, history = mnist_cnn.train_model(params, Path(folder, "model.pth"))
        else:
            splits = mnist_cnn.load_splits(params, mnist_cnn.pick_device(params))
            history = list(straightforward(params, splits))
    return {"run": recorded(params, loop), "seconds": default_timer() - start, "history": history}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for n, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            result = json.loads(line)
            result["history"] = [EpochMetrics(*epoch) for epoch in result["history"]]
            results[str(result["run"])] = result
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, line {n}: not a result of this program: delete it") from e
    return results


def train_seeds(runs: list[HyperParameters], path: Path, loop: str) -> Iterator[dict[str, Any]]:
    """Side by side, but for those in the file; each is appended to it as it ends."""
    known = read_results(path) if path.exists() else {}
    keys = [str(recorded(run, loop)) for run in runs]
    yield from (known[key] for key in keys if key in known)
    missing = [run for run, key in zip(runs, keys, strict=True) if key not in known]
    cores = torch.get_num_threads() if mnist_cnn.pick_device(runs[0]).type == "cpu" else 1
    if missing:
        with path.open("a") as file, spawn.Pool(min(cores, len(missing))) as pool:
            if path.read_text()[-1:] not in ("", "\n"):
                file.write("\n")
            for result in pool.imap_unordered(functools.partial(train_seed, loop=loop), missing):
                print(json.dumps(result), file=file, flush=True)
                yield result


def seeds(params: HyperParameters, n: int, path: Path, loop: str) -> None:
    """Train n seeds from params.random_seed on, and print their accuracies."""
    if n < 1:
        raise ValueError(f"--n is {n}; it must be 1 or more")
    runs = [replace(params, random_seed=params.random_seed + i) for i in range(n)]
    scores = []
    for result in train_seeds(runs, path, loop):
        history, seed = result["history"], result["run"]["random_seed"]
        kept, duration = mnist_cnn.kept_epoch(history), result["seconds"]
        print(f"seed {seed}, {duration:.0f} s, kept epoch {kept.epoch}: {kept}", flush=True)
        tested = [epoch.test_accuracy for epoch in history]
        scores.append([kept.validation_accuracy, kept.test_accuracy, tested[-1], *tested])
    validation, test, last, *by_epoch = zip(*scores, strict=True)
    for name, column in ("validation", validation), ("test", test), ("test, last epoch", last):
        sd = math.nan if n == 1 or math.isnan(column[0]) else stdev(column)
        span = f"{min(column):.2f} to {max(column):.2f} %, {n} seeds"
        print(f"{name}: {mean(column):.3f} ± {sd:.3f} % (mean ± sd), {span}")
    print("test, mean by epoch:", *(f"{mean(column):.2f}" for column in by_epoch))


def seconds(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Their median, after a warm-up."""
    return median(repeat(action, "import gc; gc.enable()", repeat=rounds + 1, number=1)[1:])


def measure(params: HyperParameters, loop: str) -> tuple[float, float]:
    """Images a second of training, and the most that this process has had resident, in MB."""
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    params, device = replace(params, num_epochs=2), mnist_cnn.pick_device(params)
    images, labels = (part[:12_800].to(device) for part in mnist_cnn.load_images(params, True))
    epochs: Iterator[object]  # both end by reading numbers: a GPU has finished then, too
    if loop == "module":
        run = mnist_cnn.Run(params, device, len(images))
        epochs = (mnist_cnn.train_epoch(run, (images, labels), params) for _ in range(2))
    else:
        nothing = images[:0], labels[:0]
        epochs = straightforward(params, [(images, labels), nothing, nothing])
    with redirect_stderr(StringIO()):  # no progress bar
        rate = len(images) / seconds(epochs.__next__, rounds=1)
    megabyte = 1e6 if sys.platform == "darwin" else 1e6 / 1024
    return rate, getrusage(RUSAGE_SELF).ru_maxrss / megabyte


def speed(params: HyperParameters) -> None:
    """Print what training costs with both loops, and what else takes time."""
    mnist_cnn.join_processes(params)
    device, threads = mnist_cnn.pick_device(params), torch.get_num_threads()
    print(f"{device}, {threads} threads, torch {torch.__version__}, batch size {params.batch_size}")
    if torch.distributed.is_torchelastic_launched():
        rate = median(measure(params, "module")[0] for _ in range(ROUNDS))
        print(f"{mnist_cnn.world_size()} processes together: {rate:,.0f} images/s")
        return mnist_cnn.leave_processes()
    loops: dict[str, list[tuple[float, float]]] = {"module": [], "straightforward": []}
    for _ in range(ROUNDS):  # in turn: what slows the machine down slows both
        for loop, measured in loops.items():
            with spawn.Pool(1) as pool:
                measured.append(pool.apply(measure, (params, loop)))
    for loop, measured in loops.items():
        rate, memory = (median(numbers) for numbers in zip(*measured, strict=True))
        print(f"{loop}: {rate:,.0f} images/s, {60_000 / rate:.1f} s for 60,000, {memory:,.0f} MB")
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(*loops.values(), strict=True)]
    print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    model = mnist_cnn.load_checkpoint(CHECKPOINT, params)
    images, labels = mnist_cnn.load_images(params, train=False)
    rate = len(images) / seconds(lambda: mnist_cnn.evaluate_model(model, images, labels))
    with redirect_stdout(StringIO()):
        loading = seconds(lambda: mnist_cnn.load_and_evaluate_model(CHECKPOINT, params))
    print(f"evaluate_model: {rate:,.0f} images/s; load_and_evaluate_model: {loading:.2f} s")
    for module in ("mnist_cnn", "torch"):
        command = [sys.executable, "-c", f"import {module}"]
        importing = functools.partial(subprocess.run, command, cwd=CHECKPOINT.parent, check=True)
        print(f"import {module}: {seconds(importing):.2f} s")


def train_on_few(path: Path, validation_size: int) -> None:
    """Start, or resume, a run of ten short epochs in which to be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randint(256, (640, 1, 28, 28)).byte(), torch.randint(10, (640,))
    splits = [(images[:size], labels[:size]) for size in (640, validation_size, 64)]
    mnist_cnn.load_splits = lambda *_: splits
    params = HyperParameters(num_epochs=10, validation_size=validation_size, device="cpu")
    with redirect_stdout(StringIO()):
        mnist_cnn.train_model(params, path, resume=path.with_name(f"{path.name}.resume").exists())


def run_for(limit: float | None, path: Path, held_out: int) -> float:
    """The seconds until train_on_few, forked to start at once, ended or was killed at the limit."""
    start = default_timer()
    run = multiprocessing.get_context("fork").Process(target=train_on_few, args=(path, held_out))
    run.start()
    try:
        run.join(limit)
    finally:
        run.kill()
        run.join()
    if run.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError("a run failed: its error is above")
    return default_timer() - start


def kill_runs(validation_size: int) -> None:
    """SIGKILL runs at random moments, resume them, and compare with a run left in peace."""
    with TemporaryDirectory() as folder:
        path, whole = Path(folder, "killed.pth"), Path(folder, "whole.pth")
        duration = run_for(None, whole, validation_size)
        expected = mnist_cnn.load(whole)
        kills = finished = 0
        while kills < KILLS // 2 or Path(folder, "killed.pth.resume").exists():
            run_for(random.uniform(0, duration), path, validation_size)
            if path.exists():  # only a run that came to its end makes it
                torch.testing.assert_close(mnist_cnn.load(path), expected, rtol=0, atol=0)
                path.unlink()
                finished += 1
            else:
                kills += 1
    print(f"{kills} runs killed: no file damaged; {finished} resumed to the end, the same weights")


def damage_files() -> None:
    """Load damaged checkpoints: each is refused, or has all the right weights."""
    content, expected = CHECKPOINT.read_bytes(), mnist_cnn.load(CHECKPOINT)
    refused = 0
    with TemporaryDirectory() as folder:
        path = Path(folder, "damaged.pth")
        for _ in range(DAMAGED_FILES):
            start, end = sorted(random.choices(range(len(content)), k=2))
            noise = random.randbytes(random.randint(1, 8))
            rest = content[start:]
            tails = [b"", content[end + 1 :], noise + rest, noise + rest[len(noise) :]]
            path.write_bytes(content[:start] + random.choice(tails))
            try:
                model = mnist_cnn.load_checkpoint(path, HyperParameters(device="cpu"))
            except ValueError:
                refused += 1
            else:
                torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    print(f"{refused:,} of {DAMAGED_FILES:,} damaged files refused; the others: the right weights")


def main() -> int:
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it cleans up after ended workers
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("measurement", choices=["seeds", "speed", "torture"])
    parser.add_argument("--n", type=int, default=10, help="number of seeds")
    parser.add_argument("--loop", choices=["module", "straightforward"], default="module")
    parser.add_argument("--results", type=Path, default="seeds.jsonl", help="keeps trained seeds")
    mnist_cnn.add_flags(parser)
    flags = vars(parser.parse_args())
    measurement, n, loop, path = map(flags.pop, ("measurement", "n", "loop", "results"))
    try:
        params = HyperParameters(**flags)
        if measurement == "seeds":
            seeds(params, n, path, loop)
        elif measurement == "torture":
            mnist_cnn.Run(HyperParameters(), torch.device("cpu"), 1)  # imports the rest of torch
            kill_runs(validation_size=0)
            kill_runs(validation_size=64)
            damage_files()
        else:
            speed(params)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
