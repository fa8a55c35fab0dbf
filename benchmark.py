"""Measurements that take too long for a test.

python benchmark.py seeds --n 10                   accuracy over ten seeds: mean ± sd
python benchmark.py seeds --n 5 --num-epochs 10    with other hyperparameters than the defaults
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import mnist_cnn
from mnist_cnn import HyperParameters


def prepare_worker() -> None:
    # The operators of this network are too small to share: a thread a process is the fastest.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers


def recorded(params: HyperParameters) -> dict[str, Any]:
    """What tells one run from another: everything that it depends on but where the data lies."""
    source = hashlib.sha256(Path(mnist_cnn.__file__).read_bytes()).hexdigest()
    run = asdict(params) | {"module": source, "torch": torch.__version__}
    del run["data_dir"]
    return run


def train_seed(params: HyperParameters) -> dict[str, Any]:
    """Train without a word, and return what the results file says of it; accuracies in percent."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        _, history = mnist_cnn.train_model(params, Path(folder, "model.pth"))
    kept = mnist_cnn.kept_epoch(history)
    return {
        "run": recorded(params),
        "epoch": kept.epoch,
        "validation": kept.validation_accuracy,
        "test": kept.test_accuracy,
        "test, last epoch": history[-1].test_accuracy,
        "seconds": time.perf_counter() - start,
    }


def print_seed(result: dict[str, Any]) -> None:
    print(
        "seed {run[random_seed]}: kept epoch {epoch}, validation {validation:.2f} %, "
        "test {test:.2f} %, {seconds:.0f} s".format_map(result),
        flush=True,
    )


def seeds(params: HyperParameters, n: int, results_file: Path) -> None:
    """Train n seeds from params.random_seed on, but for those that the file has already."""
    if n < 1:
        raise ValueError(f"--n is {n}; allowed is 1 or more")
    runs = [replace(params, random_seed=params.random_seed + i) for i in range(n)]
    wanted = [recorded(run) for run in runs]
    lines = results_file.read_text().splitlines() if results_file.exists() else []
    results = [result for result in map(json.loads, lines) if result["run"] in wanted]
    for result in results:
        print_seed(result)
    finished = [result["run"] for result in results]
    runs = [run for run in runs if recorded(run) not in finished]

    cores = torch.get_num_threads() if mnist_cnn.best_device().type == "cpu" else 1
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with (
        context.Pool(min(cores, len(runs)) or 1, prepare_worker) as pool,
        results_file.open("a") as file,
    ):
        for result in pool.imap_unordered(train_seed, runs):
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


def main() -> int:
    parser = argparse.ArgumentParser(usage="benchmark.py seeds [options]")
    parser.add_argument("measurement", choices=["seeds"])
    parser.add_argument("--n", type=int, default=10, help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("seeds.jsonl"),
        help="JSON-lines file: seeds found in it are not trained again (default: %(default)s)",
    )
    mnist_cnn.add_hyperparameters(parser)
    arguments = vars(parser.parse_args())
    del arguments["measurement"]
    n, results_file = arguments.pop("n"), arguments.pop("results")
    try:
        seeds(HyperParameters(**arguments), n, results_file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command carries on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
