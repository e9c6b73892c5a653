"""Class-balanced metrics of a classifier: medical labels are rarely even."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flpriv.records import Records


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights inverse to the class frequencies, ``(classes,)`` float32, with mean 1 over the records.

    Class c weighs ``N / (K * N_c)`` where K classes occur, as scikit-learn's ``"balanced"``; the others weigh 0.

    Args:
        labels: ``(N,)`` class indices.
        classes: number of classes.
    """
    counts = torch.bincount(labels, minlength=classes).float()
    weights = len(labels) / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, torch.zeros_like(weights))


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of their records predicted right, in [0, 1].

    Args:
        predicted: ``(N,)`` class indices, N ≥ 1.
        labels: ``(N,)`` class indices.
    """
    recalls = [(predicted[labels == c] == c).float().mean() for c in torch.unique(labels)]
    return float(torch.stack(recalls).mean())


@torch.inference_mode()
def evaluate(model: nn.Module, records: Records, *, batch_size: int = 64, device: torch.device | str = "cpu") -> dict[str, float]:
    """Mean cross-entropy (``"loss"``, nats), ``"accuracy"`` and ``"balanced-accuracy"`` of ``model`` in eval mode.

    Args:
        model: on ``device``; left in eval mode.
        records: at least one.
        batch_size: images at once.
        device: where to compute.
    """
    model.eval()
    logits = torch.cat([model(images.to(device)).cpu() for images in torch.split(records.images, batch_size)])
    predicted = logits.argmax(dim=1)
    return {
        "loss": float(functional.cross_entropy(logits.float(), records.labels)),
        "accuracy": float((predicted == records.labels).float().mean()),
        "balanced-accuracy": balanced_accuracy(predicted, records.labels),
    }
