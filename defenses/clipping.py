"""Clipping of the whole update, as noise needs it."""

from __future__ import annotations

from flpriv.defense import Local
from flpriv.errors import UpdateError
from flpriv.state import State, norm


def factor(update: State, *, max_grad_norm: float, local: Local) -> float:
    """``min(1, C/‖Δ‖)`` over all parameters together: what brings ``update`` to a Euclidean norm of at most ``max_grad_norm``.

    Raises:
        UpdateError: if the update holds NaN or infinite values, which clipping cannot bound.
    """
    length = float(norm(update))
    if not length < float("inf"):
        raise UpdateError(
            f"site {local.site}, round {local.round}: the update holds NaN or infinite values; lower the learning rate"
        )
    return min(1.0, max_grad_norm / length) if length else 1.0
