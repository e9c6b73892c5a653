"""Two ways to read an attribute off features: a small trained head, and logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def head(known: Tensor, codes: Tensor, asked: Tensor, *, classes: int, epochs: int, seed: int) -> Tensor:
    """Probabilities ``(M, classes)`` for ``asked`` by the head of FLPrivacy, trained on ``known`` features.

    Batch norm, dropout ½, ReLU, dense 32, batch norm, dropout ½, ReLU, dense; Adam at 1e-3, batches of 128 (the last ones shared
    out evenly), cross-entropy with weights inverse to class frequency. The global random state is left as it was.

    Args:
        known: ``(N, features)``, N ≥ 2.
        codes: ``(N,)`` class indices, every class among them.
        asked: ``(M, features)``.
        classes: how many.
        epochs: passes over ``known``.
        seed: of initial weights, dropout and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = known.shape[1]
        model = nn.Sequential(
            nn.BatchNorm1d(width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, 32),
            nn.BatchNorm1d(32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, classes),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        weight = len(codes) / (classes * torch.bincount(codes, minlength=classes).clamp_min(1).float())
        batches = min(-(-len(codes) // 128), len(codes) // 2)
        for _ in range(epochs):
            for rows in torch.randperm(len(codes)).tensor_split(batches):
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(known[rows]), codes[rows], weight=weight))
                optimizer.step()
        with torch.inference_mode():
            return torch.softmax(model.eval()(asked).double(), 1)


def logistic(known: Tensor, codes: Tensor, asked: Tensor, *, classes: int) -> Tensor:
    """Probabilities ``(M, classes)`` by class-balanced logistic regression on standardised features; deterministic.

    Arguments as in :func:`head`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    probe.fit(known.double().numpy(), codes.numpy())
    found = torch.zeros(len(asked), classes, dtype=torch.float64)
    found[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(probe.predict_proba(asked.double().numpy()))
    return found
