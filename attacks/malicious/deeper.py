"""Images behind what a layer inside a network received: searched for, through the layers before it."""

from __future__ import annotations

import torch
from torch import Tensor

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.search import LBFGS
from flpriv.attacks.malicious.insertion import received
from flpriv.state import State
from flpriv.task import Task


def shown(task: Task, sent: State, features: Tensor, *, before: str, rng: torch.Generator, iterations: int) -> Tensor:
    """``(N, *shape)`` images in [0, 1] at which the layer ``before`` receives ``features`` ``(N, F)``.

    Args:
        task: of the federation.
        sent: the model sent, of which the honest entries are used, in eval mode.
        features: flattened.
        before: name of the layer.
        rng: of the start.
        iterations: evaluations for each image, at most.
    """
    model = task.build().eval().requires_grad_(False)
    model.load_state_dict({key: sent[key] for key in model.state_dict()})
    size = features.square().sum(1)

    def evaluate(trials: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        trials = trials.detach().requires_grad_()
        apart = received(model, trials, before).flatten(1) - features[chosen]
        values = apart.square().sum(1) / size[chosen]
        return values.detach(), torch.autograd.grad(values.sum(), trials)[0]

    begin = start.grey((len(features), *task.shape), rng)
    found = LBFGS(patience=60, enough=1e-12).minimise(evaluate, begin, iterations=iterations, rng=rng, what="deeper")
    return found.trials
