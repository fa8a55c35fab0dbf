"""Figures of numbers: how a training went, and what a model gets wrong."""

import io
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    def png() -> bytes:
        figure.savefig(buffer := io.BytesIO())
        return buffer.getvalue()

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = png  # type: ignore[attr-defined]  # what a notebook shows
    return figure


def plot_history(history: list[Any], kept: int) -> "Figure":
    """Loss, accuracy and learning rate of each epoch's EpochMetrics, with the kept one marked."""
    figure = new_figure(13, 4.5)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    for axes, name, color, label in (  # colours that are apart for the colour-blind too
        (loss, "loss", "C0", "training (augmented, with dropout)"),
        (loss, "validation_loss", "C1", "validation"),
        (accuracy, "train_accuracy", "C0", "training (augmented, with dropout)"),
        (accuracy, "validation_accuracy", "C1", "validation"),
        (accuracy, "test_accuracy", "black", "test"),
        (rate, "learning_rate", "C0", "at the epoch's end"),
    ):
        values = [getattr(metrics, name) for metrics in history]
        if axes is accuracy:  # errors on a logarithmic axis: 99.5 and 99.6 % are apart there
            values = [100 - value for value in values]
        axes.plot([metrics.epoch for metrics in history], values, ".-", color=color, label=label)
    loss.set(title="Loss", ylabel="cross-entropy (nats)")
    accuracy.set(title="Accuracy", ylabel="accuracy (%)")
    rate.set(title="Learning rate", ylabel="Adam's learning rate")
    for axes, format_tick in ((loss, "{x:g}"), (accuracy, lambda error, _: f"{100 - error:g}")):
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5))
        axes.yaxis.set_major_formatter(format_tick)
    accuracy.invert_yaxis()
    for axes in figure.axes:
        axes.axvline(kept, color="gray", linestyle=":", label=f"kept: epoch {kept}")
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def plot_mistakes(images: Tensor, labels: Tensor, logits: Tensor) -> "Figure":
    """Which digits are taken for which, and the images that are missed, the surest mistake first.

    images: (N, 1, 28, 28), brighter is more ink; labels: (N,) int64; logits: (N, 10).
    """
    confidence, guesses = logits.cpu().softmax(1).max(1)
    missed = (guesses != labels.cpu()).nonzero().flatten()
    missed = missed[confidence[missed].argsort(descending=True)]
    counts = (10 * labels.cpu() + guesses)[missed].bincount(minlength=100).view(10, 10)
    rows = min(max(5, len(missed) // 8 + 1), 12)
    figure = new_figure(13, 1.15 * rows + 0.6)
    figure.suptitle(f"{len(missed):,} of {len(labels):,} images missed, the surest mistakes first")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 8), squeeze=False)[0]
    axes = left.subplots()
    axes.imshow(counts.numpy(), cmap="Blues", vmax=2 * counts.max())
    axes.set(xlabel="guess", ylabel="truth", xticks=range(10), yticks=range(10))
    for truth, guess in counts.nonzero().tolist():
        axes.text(guess, truth, int(counts[truth, guess]), ha="center", va="center")
    right.subplots(rows, 8, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axes, i in zip(right.axes, missed.tolist(), strict=False):
        axes.imshow(images[i, 0].cpu().numpy(), cmap="gray_r")
        title = f"{labels[i]} as {guesses[i]}, {100 * confidence[i]:.0f}%"
        axes.set_title(title, fontsize=9, pad=2)
    return figure
