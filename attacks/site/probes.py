"""Two ways to read an attribute off features: a small trained head, and a linear model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    weight = len(codes) / (classes * torch.bincount(codes, minlength=classes).clamp_min(1).float())
    found = _trained(
        known, codes, asked, outputs=classes, epochs=epochs, seed=seed, loss=partial(functional.cross_entropy, weight=weight)
    )
    return torch.softmax(found, 1)


def head_regression(known: Tensor, values: Tensor, asked: Tensor, *, epochs: int, seed: int) -> Tensor:
    """Estimates ``(M,)`` float64 by the same head with one output, trained on standardised ``values`` by their squared error.

    Args:
        known: ``(N, features)``, N ≥ 2.
        values: ``(N,)`` float64, not all alike.
        asked: ``(M, features)``.
        epochs: passes over ``known``.
        seed: of initial weights, dropout and order.
    """
    mean, spread = values.mean(), values.std().clamp_min(1e-9)
    wanted = ((values - mean) / spread).float()[:, None]
    found = _trained(known, wanted, asked, outputs=1, epochs=epochs, seed=seed, loss=functional.mse_loss)
    return found[:, 0] * spread + mean


def _trained(
    known: Tensor,
    wanted: Tensor,
    asked: Tensor,
    *,
    outputs: int,
    epochs: int,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What the trained head says to ``asked``: ``(M, outputs)`` float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = known.shape[1]
        model = nn.Sequential(
            nn.BatchNorm1d(width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, 32),
            nn.BatchNorm1d(32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, outputs),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = min(-(-len(known) // 128), len(known) // 2)
        for _ in range(epochs):
            for rows in torch.randperm(len(known)).tensor_split(batches):
                optimizer.zero_grad()
                torch.autograd.backward(loss(model(known[rows]), wanted[rows]))
                optimizer.step()
        with torch.inference_mode():
            said: Tensor = model.eval()(asked).double()
        return said.clone()


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


def ridge(known: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """Estimates ``(M,)`` float64 by ridge regression on standardised features, its penalty chosen by leaving one out.

    Arguments as in :func:`head_regression`; deterministic.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeCV(alphas=[10.0**power for power in range(-1, 6)]))
    probe.fit(known.double().numpy(), values.numpy())
    return torch.from_numpy(probe.predict(asked.double().numpy()))
