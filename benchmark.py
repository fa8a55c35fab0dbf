"""Measurements that take too long for a test.

python benchmark.py seeds --n 10                   accuracy over ten seeds: mean ± sd
python benchmark.py seeds --n 5 --num-epochs 10    with other hyperparameters than the defaults
python benchmark.py seeds --loop straightforward   of the loop that most MNIST scripts have
python benchmark.py speed                          seconds, images a second and megabytes of both
python benchmark.py scaling                        images a second of several processes
python benchmark.py torture                        runs that are killed, files that are damaged
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mnist_cnn
from mnist_cnn import EpochMetrics, HyperParameters

# ---- What this module is compared with -----------------------------------------------------------


def straightforward(
    params: HyperParameters, images: Tensor, labels: Tensor
) -> tuple[nn.Module, Callable[[], tuple[float, float]]]:
    """A model, and what trains it for an epoch as most MNIST scripts do.

    A DataLoader over torchvision's MNIST, float32, no augmentation, a constant learning rate.
    """
    from torchvision.datasets import MNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    dataset = MNIST.__new__(MNIST)  # of these images: none of its files are read
    dataset.data, dataset.targets = images.squeeze(1), labels
    dataset.transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    dataset.target_transform = None
    loader = DataLoader(dataset, batch_size=params.batch_size, shuffle=True)
    device = mnist_cnn.pick_device(params)
    model = mnist_cnn.TinyCNN(params.dropout_rate).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate)

    def train_epoch() -> tuple[float, float]:
        model.train()
        loss_sum, correct = 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += (logits.argmax(dim=1) == labels).sum().item()
        return loss_sum / len(loader), 100 * correct / len(dataset)

    return model, train_epoch


def train_straightforwardly(params: HyperParameters) -> list[EpochMetrics]:
    cpu, device = torch.device("cpu"), mnist_cnn.pick_device(params)
    (images, labels), _, _ = mnist_cnn.load_splits(params, cpu)
    _, validation_set, test_set = mnist_cnn.load_splits(params, device)
    torch.manual_seed(params.random_seed)
    model, train_epoch = straightforward(params, images, labels)
    history = []
    for epoch in range(1, params.num_epochs + 1):
        train_metrics = train_epoch()
        validation_metrics = mnist_cnn.evaluate_model(model, *validation_set)
        _, test_accuracy = mnist_cnn.evaluate_model(model, *test_set)
        metrics = EpochMetrics(epoch, *train_metrics, *validation_metrics, test_accuracy)
        history.append(metrics)
    return history


# ---- Accuracy over seeds ------------------------------------------------------------------------


def prepare_worker() -> None:
    # The operators of this network are too small to share: a thread a process is the fastest.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers


def recorded(params: HyperParameters, loop: str) -> dict[str, Any]:
    """What tells one run from another."""
    source = hashlib.sha256(Path(mnist_cnn.__file__).read_bytes()).hexdigest()
    return mnist_cnn.identity(params) | {"module": source, "loop": loop}


def train_seed(params: HyperParameters, loop: str) -> dict[str, Any]:
    """Train without a word, and return what the results file says of it; accuracies in percent."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        if loop == "module":
            _, history = mnist_cnn.train_model(params, Path(folder, "model.pth"))
        else:
            history = train_straightforwardly(params)
    kept = mnist_cnn.kept_epoch(history)
    return {
        "run": recorded(params, loop),
        "epoch": kept.epoch,
        "validation": kept.validation_accuracy,
        "test": kept.test_accuracy,
        "test, last epoch": history[-1].test_accuracy,
        "test by epoch": [metrics.test_accuracy for metrics in history],
        "seconds": time.perf_counter() - start,
    }


def print_seed(result: dict[str, Any]) -> None:
    print(
        "seed {run[random_seed]}: kept epoch {epoch}, validation {validation:.2f} %, "
        "test {test:.2f} %, {seconds:.0f} s".format_map(result),
        flush=True,
    )


def seeds(params: HyperParameters, n: int, results_file: Path, loop: str) -> None:
    """Train n seeds from params.random_seed on, but for those that the file has already."""
    if n < 1:
        raise ValueError(f"--n is {n}; allowed is 1 or more")
    runs = [replace(params, random_seed=params.random_seed + i) for i in range(n)]
    wanted = [recorded(run, loop) for run in runs]
    lines = results_file.read_text().splitlines() if results_file.exists() else []
    results = [result for result in map(json.loads, lines) if result["run"] in wanted]
    for result in results:
        print_seed(result)
    finished = [result["run"] for result in results]
    runs = [run for run in runs if recorded(run, loop) not in finished]

    cores = torch.get_num_threads() if mnist_cnn.pick_device(params).type == "cpu" else 1
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with (
        context.Pool(min(cores, len(runs)) or 1, prepare_worker) as pool,
        results_file.open("a") as file,
    ):
        for result in pool.imap_unordered(functools.partial(train_seed, loop=loop), runs):
            file.write(json.dumps(result) + "\n")
            file.flush()
            results.append(result)
            print_seed(result)
        pool.close()
        pool.join()

    for name in ("validation", "test", "test, last epoch"):
        accuracies = [result[name] for result in results]
        sd = statistics.stdev(accuracies) if n > 1 else float("nan")
        print(
            f"{name}: {statistics.mean(accuracies):.3f} ± {sd:.3f} % (mean ± sd), "
            f"{min(accuracies):.2f} to {max(accuracies):.2f} %, {n} seeds"
        )
    means = map(statistics.mean, zip(*(result["test by epoch"] for result in results), strict=True))
    print("test, mean by epoch:", *(f"{mean:.2f}" for mean in means))


# ---- Speed --------------------------------------------------------------------------------------

TIMED_IMAGES = 12_800
ROUNDS = 5


def timed_images(params: HyperParameters) -> tuple[Tensor, Tensor]:
    """Training images and labels: MNIST's, or random ones where MNIST cannot be had."""
    try:
        images, labels = mnist_cnn.load_mnist(params.data_dir, train=True)
    except FileNotFoundError:
        images = torch.randint(256, (TIMED_IMAGES, 1, 28, 28), dtype=torch.uint8)
        labels = torch.randint(10, (TIMED_IMAGES,))
    return images[:TIMED_IMAGES], labels[:TIMED_IMAGES]


def module_loop(params: HyperParameters) -> Callable[[], object]:
    device = mnist_cnn.pick_device(params)
    images, labels = (tensor.to(device) for tensor in timed_images(params))
    model = mnist_cnn.new_model(params, device)
    optimizer, schedule = mnist_cnn.new_optimizer(model, params, num_steps=1_000_000)
    learner = mnist_cnn.parallel(model)
    return lambda: mnist_cnn.train_epoch(learner, optimizer, schedule, (images, labels), params, "")


def straightforward_loop(params: HyperParameters) -> Callable[[], object]:
    return straightforward(params, *timed_images(params))[1]


@functools.cache  # a worker process builds its loop once
def built(loop: Callable[..., Callable[[], object]], params: HyperParameters) -> Callable:
    return loop(params)


def time_loop(loop: Callable[..., Callable[[], object]], params: HyperParameters) -> float:
    """Images a second. Both loops end by reading numbers, so a GPU has finished too."""
    train = built(loop, params)
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar
        start = time.perf_counter()
        train()
        return TIMED_IMAGES / (time.perf_counter() - start)


def peak_memory() -> float:
    """The most that this process has had resident, in MB."""
    import resource  # not on Windows

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform == "darwin" else size * 1024 / 1e6


def time_evaluation(params: HyperParameters) -> tuple[float, float]:
    """Images a second of evaluate_model; seconds of load_and_evaluate_model, NaN without MNIST."""
    device = mnist_cnn.pick_device(params)
    images, labels = (tensor[:10_000].to(device) for tensor in timed_images(params))
    model = mnist_cnn.new_model(params, device)
    mnist_cnn.evaluate_model(model, images, labels)
    start = time.perf_counter()
    mnist_cnn.evaluate_model(model, images, labels)
    rate = len(images) / (time.perf_counter() - start)

    checkpoint = Path(mnist_cnn.__file__).with_name("best_mnist_model.pth")
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            mnist_cnn.load_and_evaluate_model(checkpoint, params)
    except FileNotFoundError:
        return rate, float("nan")
    return rate, time.perf_counter() - start


def import_seconds(module: str) -> float:
    """In a Python process of its own."""
    command = [sys.executable, "-c", f"import {module}"]
    start = time.perf_counter()
    subprocess.run(command, cwd=Path(mnist_cnn.__file__).parent, check=True)
    return time.perf_counter() - start


def speed(params: HyperParameters) -> None:
    """Print what training costs here and in the straightforward loop, and what else takes time."""
    loops = {"this module": module_loop, "straightforward": straightforward_loop}
    rates: dict[str, list[float]] = {name: [] for name in loops}
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in loops}
        imported = workers["this module"].submit(peak_memory).result()
        for _ in range(ROUNDS + 1):  # in turn: what slows the machine down slows both
            for name, loop in loops.items():
                rates[name].append(workers[name].submit(time_loop, loop, params).result())
        memory = {name: workers[name].submit(peak_memory).result() for name in loops}
        evaluation, loading = workers["this module"].submit(time_evaluation, params).result()

    print(
        f"{mnist_cnn.pick_device(params)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, batch size {params.batch_size}"
    )
    for name, (_, *timed) in rates.items():  # the first is a warm-up
        rate = statistics.median(timed)
        print(
            f"{name}: {rate:,.0f} images/s, {60_000 / rate:.1f} s for 60,000 images, "
            f"{memory[name]:,.0f} MB resident at most"
        )
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)][1:]
    low, ratio, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ratio: {ratio:.2f} ({low:.2f} to {high:.2f} in {ROUNDS} rounds)")
    print(f"evaluate_model: {evaluation:,.0f} images/s; load_and_evaluate_model: {loading:.2f} s")
    imports = [(import_seconds("mnist_cnn"), import_seconds("torch")) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(seconds) for seconds in zip(*imports, strict=True))
    print(f"import mnist_cnn: {ours:.2f} s, {imported:,.0f} MB; import torch: {theirs:.2f} s")


# ---- Scaling ------------------------------------------------------------------------------------


def meet(rank: int, count: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    if count > 1:
        url = f"file://{meeting}"
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=count)


def scaling(params: HyperParameters) -> None:
    """Print images a second of one process, of two and so on, at several batch sizes."""
    params = replace(params, device="cpu")
    context = multiprocessing.get_context("spawn")
    for count in range(1, torch.get_num_threads() + 1):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            workers = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(count)]
            for rank, worker in enumerate(workers):
                worker.submit(meet, rank, count, Path(folder, "meeting"))
            for batch_size in (64, 256, 1_024, 4_096):
                run = replace(params, batch_size=batch_size)
                rates = []
                for _ in range(ROUNDS + 1):
                    timed = [worker.submit(time_loop, module_loop, run) for worker in workers]
                    rates.append(min(rate.result() for rate in timed))
                print(
                    f"{count} processes of one thread, batch size {batch_size}: "
                    f"{statistics.median(rates[1:]):,.0f} images/s",
                    flush=True,
                )


# ---- Torture ------------------------------------------------------------------------------------

KILLS = 100
DAMAGED_FILES = 10_000


def train_on_few(path: Path, resume: bool) -> None:
    """A run of ten short epochs: a second or two in which to be killed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (640, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (640,), generator=generator)
    mnist_cnn.load_splits = lambda *_: [(images, labels)] * 3
    torch.set_num_threads(1)
    mnist_cnn.tqdm.set_lock(threading.RLock())  # its own is a semaphore: a kill would leak it
    with contextlib.redirect_stdout(io.StringIO()):
        mnist_cnn.train_model(HyperParameters(num_epochs=10, device="cpu"), path, resume)


def same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def kill_runs(folder: Path) -> None:
    """SIGKILL runs at random moments, resume them, and compare with a run left in peace."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_cnn"])  # each run starts at once

    def finishes(path: Path, resume: bool, seconds: float | None) -> bool:
        run = context.Process(target=train_on_few, args=(path, resume))
        run.start()
        run.join(seconds)
        run.kill()
        run.join()
        if run.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a run with resume={resume} failed: its error is above")
        return run.exitcode == 0

    finishes(folder / "whole.pth", False, None)
    expected = torch.load(folder / "whole.pth")
    start = time.perf_counter()
    finishes(folder / "whole.pth", False, None)
    duration = time.perf_counter() - start

    path, run_path = folder / "killed.pth", folder / "killed.pth.resume"
    kills = finished = 0
    while kills < KILLS or run_path.exists():
        seconds = random.uniform(0, duration) if kills < KILLS else None
        if finishes(path, run_path.exists(), seconds):
            finished += 1
        else:
            kills += 1
        if run_path.exists():
            mnist_cnn.load(run_path)
        if path.exists():  # only a run that came to its end makes it
            if not same(torch.load(path), expected):
                raise RuntimeError("a run that was killed and resumed ended with other weights")
            path.unlink()
    print(
        f"{kills} runs killed: no file damaged; {finished} resumed to their end, "
        "to the same weights as without a kill"
    )


def damaged(content: bytes) -> bytes:
    """Cut off, or a part of it removed, or a few bytes replaced or inserted."""
    start, end = sorted(random.choices(range(len(content)), k=2))
    noise = random.randbytes(random.randint(1, 8))
    return random.choice(
        [
            content[:start],
            content[:start] + content[end + 1 :],
            content[:start] + noise + content[start + len(noise) :],
            content[:start] + noise + content[start:],
        ]
    )


def damage_files(folder: Path) -> None:
    """Load damaged checkpoints: each is refused, or has all the right weights."""
    whole = Path(mnist_cnn.__file__).with_name("best_mnist_model.pth")
    content, expected = whole.read_bytes(), torch.load(whole)
    path = folder / "damaged.pth"
    refused = 0
    for _ in range(DAMAGED_FILES):
        path.write_bytes(damaged(content))
        try:
            weights = mnist_cnn.load_checkpoint(path, HyperParameters(device="cpu")).state_dict()
        except ValueError:
            refused += 1
            continue
        if not same(weights, expected):
            raise RuntimeError("a damaged file was loaded with wrong weights")
    print(
        f"{refused:,} of {DAMAGED_FILES:,} damaged files refused; the damage to the others spared "
        "the weights"
    )


def torture() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kill_runs(Path(folder))
        damage_files(Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(usage="benchmark.py {seeds,speed,scaling,torture} [options]")
    parser.add_argument("measurement", choices=["seeds", "speed", "scaling", "torture"])
    parser.add_argument("--n", type=int, default=10, help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--loop",
        choices=["module", "straightforward"],
        default="module",
        help="whose accuracy over seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("seeds.jsonl"),
        help="JSON-lines file: seeds found in it are not trained again (default: %(default)s)",
    )
    mnist_cnn.add_hyperparameters(parser)
    arguments = vars(parser.parse_args())
    measurement = arguments.pop("measurement")
    n, results_file, loop = (arguments.pop(name) for name in ("n", "results", "loop"))
    try:
        params = HyperParameters(**arguments)
        if measurement == "seeds":
            seeds(params, n, results_file, loop)
        elif measurement == "speed":
            speed(params)
        elif measurement == "scaling":
            scaling(params)
        else:
            torture()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command carries on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
