"""Measurements that take too long for a test.

python benchmark.py seeds --n 10                   accuracy over ten seeds: mean ± sd
python benchmark.py speed                          images a second, and those of a plain loop
python benchmark.py pictures                       accuracy on photos of digits, by kind
python benchmark.py torture                        runs that are killed at random moments
torchrun --nproc-per-node=2 benchmark.py speed --batch-size 1024    of two processes
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from timeit import default_timer, repeat
from typing import Any

if __name__ == "__mp_main__":  # a worker: Ctrl-C is for the process that started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import DataLoader

import digits
import mnist_cnn
from mnist_cnn import EpochMetrics, HyperParameters, TinyCNN

CHECKPOINT = Path(__file__).resolve().with_name("best_mnist_model.pth")
ROUNDS = 5
spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
KINDS: dict[str, Callable[..., Any]] = {  # of photos (H, W, 3) in 0..1
    "clean": lambda photo, along, noise: photo,
    "uneven light": lambda photo, along, noise: photo * (0.675 + 0.65 * along),
    "shadow": lambda photo, along, noise: photo * (0.75 - 0.25 * np.tanh(50 * along)),
    "noise": lambda photo, along, noise: photo + noise,
    "squared paper": lambda photo, along, noise: photo,
    "coloured pen": lambda photo, along, noise: photo,
    "blur": lambda photo, along, noise: gaussian_filter(photo, (3, 3, 0)),
    "light on dark": lambda photo, along, noise: 0.9 - 0.75 * photo,
    "thumb": lambda photo, along, noise: np.where(along > 0.45, [0.7, 0.5, 0.4], photo),
    "dark table": lambda photo, along, noise: np.where(along > 0.45, 0.2, photo),
    "squared, at dusk": lambda photo, along, noise: photo * (0.4 + 0.3 * along) + noise / 3,
}


def straightforward(params: HyperParameters, images: Tensor, labels: Tensor) -> Iterator[object]:
    """Train as most MNIST scripts do: augmenting nothing, in float32, at one learning rate."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    dataset = MNIST(params.data_dir, train=True, transform=transform, download=True)
    dataset.data, dataset.targets = images[:, 0].cpu(), labels.cpu()
    loader: DataLoader[Any] = DataLoader(dataset, params.batch_size, shuffle=True)
    model = TinyCNN(params.dropout_rate).to(images.device).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate)
    for _ in range(params.num_epochs):
        for batch, answers in loader:
            optimizer.zero_grad()
            logits = model(batch.to(images.device))
            loss = torch.nn.functional.cross_entropy(logits, answers.to(images.device))
            loss.backward()
            optimizer.step()
            loss.item()  # for their logs
        yield None


def recorded(params: HyperParameters) -> dict[str, Any]:
    module = hashlib.sha256(Path(mnist_cnn.__file__).read_bytes()).hexdigest()
    return mnist_cnn.identity(params) | {"module": module, "device": params.device}


def train_seed(params: HyperParameters) -> dict[str, Any]:
    """Train without a word, and return a line for the results file."""
    torch.set_num_threads(1)  # this network's operators are too small to share
    start = default_timer()
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()) as out, redirect_stderr(out):
        model, history = mnist_cnn.train_model(params, Path(folder, "model.pth"))
    result = {"run": recorded(params), "seconds": default_timer() - start, "history": history}
    images, labels = mnist_cnn.load_images(params, train=False)
    right = mnist_cnn.predict_digits(model, images)[0] == labels
    return result | {"averaged": 100 * right.sum().item() / len(labels)}


def train_seeds(runs: list[HyperParameters], path: Path) -> Iterator[dict[str, Any]]:
    """Side by side, but for those in the file; each is appended to it as it ends."""
    known = {}
    for n, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            result = json.loads(line)
            result["history"] = [EpochMetrics(*epoch) for epoch in result["history"]]
            known[str(result["run"])] = result
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, line {n}: not a result of this program: delete it") from e
    keys = [str(recorded(run)) for run in runs]
    yield from (known[key] for key in keys if key in known)
    missing = [run for run, key in zip(runs, keys, strict=True) if key not in known]
    cores = torch.get_num_threads() if mnist_cnn.pick_device(runs[0]).type == "cpu" else 1
    if missing:
        with path.open("a") as file, spawn.Pool(min(cores, len(missing))) as pool:
            for result in pool.imap_unordered(train_seed, missing):
                print(json.dumps(result), file=file, flush=True)
                yield result


def seeds(params: HyperParameters, n: int, path: Path) -> None:
    """Train n seeds from params.random_seed on, and print their accuracies."""
    if n < 1:
        raise ValueError(f"--n is {n}; it must be 1 or more")
    runs = [replace(params, random_seed=params.random_seed + i) for i in range(n)]
    scores = []
    for result in train_seeds(runs, path):
        history, seed = result["history"], result["run"]["random_seed"]
        kept, duration = mnist_cnn.kept_epoch(history), result["seconds"]
        print(f"seed {seed}, {duration:.0f} s, kept epoch {kept.epoch}: {kept}", flush=True)
        tested = [epoch.test_accuracy for epoch in history]
        ours = kept.validation_accuracy, kept.test_accuracy, float(result["averaged"])
        scores.append([*ours, max(tested), *tested])
    validation, test, averaged, best, *by_epoch = zip(*scores, strict=True)
    rows = {"validation": validation, "test": test, "test, last epoch": by_epoch[-1]}
    rows |= {"test, averaged over shifts": averaged, "as others count, best test epoch": best}
    for name, column in rows.items():
        sd = math.nan if n == 1 or math.isnan(column[0]) else stdev(column)
        span = f"{min(column):.2f} to {max(column):.2f} %, {n} seeds"
        print(f"{name}: {mean(column):.3f} ± {sd:.3f} % (mean ± sd), {span}")
    print("test, mean by epoch:", *(f"{mean(column):.2f}" for column in by_epoch))


def seconds(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Their median, after a warm-up."""
    return median(repeat(action, "import gc; gc.enable()", repeat=rounds + 1, number=1)[1:])


def measure(params: HyperParameters, loop: str) -> float:
    """Images a second of training."""
    params, device = replace(params, num_epochs=20), mnist_cnn.pick_device(params)
    images, labels = (part[:12_800].to(device) for part in mnist_cnn.load_images(params, True))
    if loop == "straightforward":  # both end by reading numbers: a GPU has finished then, too
        epochs = straightforward(params, images, labels)
    else:
        run = mnist_cnn.Run(params, device, len(images))
        epochs = (mnist_cnn.train_epoch(run, (images, labels), params) for _ in range(2))
    with redirect_stderr(StringIO()):  # no progress bar
        return len(images) / seconds(epochs.__next__, rounds=1)


def speed(params: HyperParameters) -> None:
    """Print what training costs with both loops, and what else takes time."""
    mnist_cnn.join_processes(params)
    device, threads = mnist_cnn.pick_device(params), torch.get_num_threads()
    print(f"{device}, {threads} threads, torch {torch.__version__}, batch size {params.batch_size}")
    if torch.distributed.is_torchelastic_launched():
        rate = median(measure(params, "module") for _ in range(ROUNDS))
        print(f"{mnist_cnn.world_size()} processes together: {rate:,.0f} images/s")
        return mnist_cnn.leave_processes()
    with spawn.Pool(1, maxtasksperchild=1) as pool:  # in turn: what slows one down slows both
        loops = [(params, "module"), (params, "straightforward")]
        rates = pool.starmap(measure, ROUNDS * loops, chunksize=1)
    ours, theirs = rates[::2], rates[1::2]
    print(f"module: {median(ours):,.0f} images/s, straightforward: {median(theirs):,.0f}")
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    model = mnist_cnn.load_checkpoint(CHECKPOINT, params)
    images, labels = mnist_cnn.load_images(params, train=False)
    rate = len(images) / seconds(lambda: mnist_cnn.evaluate_model(model, images, labels))
    print(f"evaluate_model: {rate:,.0f} images/s")
    for size in (300, 300), (4_000, 3_000):
        file = BytesIO()
        photograph(images[0, 0], "noise", np.random.default_rng(0)).resize(size).save(file, "JPEG")
        reading = seconds(functools.partial(digits.read_digits, [file]))
        print(f"read_digits, a JPEG of {size[0]}x{size[1]}: {1_000 * reading:.1f} ms")


def photograph(image: Tensor, kind: str, chance: np.random.Generator) -> Image.Image:
    """One of MNIST's images, (N, N) uint8, drawn large and with random margins on paper."""
    side = round(28 * chance.uniform(6, 12))
    large = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.pad(np.asarray(large) / 255, chance.integers(side // 10, side // 2, (2, 2)))
    y, x = np.indices(ink.shape) / max(ink.shape) - 0.5
    lines = np.minimum((y + x / 20) % 0.15, (x - y / 20) % 0.15)[..., None] < 0.006
    paper = np.where(lines & ("squared" in kind), [0.62, 0.72, 0.85], 0.95)
    pen = chance.uniform(0, 0.6, 3) if kind == "coloured pen" else 0.1
    picture = paper + (pen - paper) * ink[..., None]
    angle = chance.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle))[..., None]  # about -0.5 to 0.5
    picture = KINDS[kind](picture, along, chance.normal(0, 0.1, picture.shape))
    return Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8))


def report(name: str, probabilities: Tensor, labels: Tensor) -> None:
    """Print accuracy and expected calibration error, in 15 bins (Guo et al., 2017), in percent."""
    confidence, guesses = probabilities.max(1)
    right = (guesses == labels).float()
    error = (15 * confidence).long().bincount(confidence - right).abs().sum() / len(labels)
    print(f"{name}: {100 * right.mean():.2f} %, calibration error {100 * error:.2f} %", flush=True)


def pictures(params: HyperParameters) -> None:
    """Print how well the shipped model reads other people's digits, and photos by their kind."""
    from sklearn.datasets import load_digits  # 1,797 of 8x8 pixels, by 43 people

    model, chance = mnist_cnn.load_checkpoint(CHECKPOINT, params), np.random.default_rng(0)
    images, labels = mnist_cnn.load_images(params, train=False)
    report("MNIST's test images", mnist_cnn.predict_digits(model, images)[1], labels)
    pixels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(255 / 16 * pixels).byte().view(-1, 8, 8)
    files = [photograph(image, "clean", chance) for image in images]
    report("load_digits", mnist_cnn.predict_digits(model, files)[1], torch.from_numpy(target))
    _, (images, labels), _ = mnist_cnn.load_splits(params, torch.device("cpu"))
    for kind in KINDS:
        files = [photograph(image[0], kind, chance) for image in images[:500]]
        report(kind, mnist_cnn.predict_digits(model, files)[1], labels[:500])


def train_on_few(path: Path) -> None:
    """Start, or resume, a run of ten short epochs in which to be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randint(256, (640, 1, 28, 28)).byte(), torch.randint(10, (640,))
    mnist_cnn.load_splits = lambda *_: [(images[:size], labels[:size]) for size in (640, 64, 64)]
    params = HyperParameters(num_epochs=10, device="cpu")
    with redirect_stdout(StringIO()):
        mnist_cnn.train_model(params, path, resume=path.with_name(f"{path.name}.resume").exists())


def run_for(limit: float | None, path: Path) -> float:
    """The seconds until train_on_few, forked to start at once, ended or was killed at the limit."""
    start = default_timer()
    run = multiprocessing.get_context("fork").Process(target=train_on_few, args=(path,))
    run.start()
    try:
        run.join(limit)
    finally:
        run.kill()
        run.join()
    if run.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError("a run failed: its error is above")
    return default_timer() - start


def torture(params: HyperParameters) -> None:
    """SIGKILL runs at random moments, resume them, and compare with a run left in peace."""
    mnist_cnn.Run(params, torch.device("cpu"), 1)  # imports the rest of torch, for all forks
    with TemporaryDirectory() as folder:
        path, whole = Path(folder, "killed.pth"), Path(folder, "whole.pth")
        duration = run_for(None, whole)
        expected = mnist_cnn.load(whole)
        kills = finished = 0
        while kills < 100 or Path(folder, "killed.pth.resume").exists():
            run_for(random.uniform(0, duration), path)
            if path.exists():  # only a run that came to its end makes it
                torch.testing.assert_close(mnist_cnn.load(path), expected, rtol=0, atol=0)
                path.unlink()
                finished += 1
            else:
                kills += 1
    print(f"{kills} runs killed: no file damaged; {finished} ended, all with the same weights")


def main() -> int:
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it cleans up after ended workers
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("measurement", choices=["seeds", "speed", "pictures", "torture"])
    parser.add_argument("--n", type=int, default=10, help="number of seeds")
    parser.add_argument("--results", type=Path, default="seeds.jsonl", help="keeps trained seeds")
    mnist_cnn.add_flags(parser)
    flags = vars(parser.parse_args())
    measurement, n, path = map(flags.pop, ("measurement", "n", "results"))
    try:
        params = HyperParameters(**flags)
        train: Callable[[HyperParameters], None] = functools.partial(seeds, n=n, path=path)
        measurements = {"seeds": train, "speed": speed, "pictures": pictures, "torture": torture}
        measurements[measurement](params)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
