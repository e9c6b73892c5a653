"""DP-SGD against the attack it is for: a model that knows its records by heart, and one that must not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from flpriv.claim import Goal
from flpriv.clients.training import train
from flpriv.defense import Local
from flpriv.defenses.dp_sgd import DPSGD
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import create
from flpriv.testing import glass, score


def test_dp_sgd_hides_who_was_trained_on() -> None:
    made = glass(Goal.MEMBERSHIP)
    members = Records.concat([made.truth.used[1, node] for node in made.capture.nodes])
    defense = DPSGD(noise_multiplier=5.0, max_grad_norm=0.5)
    attack = create("attacks", "loss-threshold", {})
    found = []
    for private in (False, True):
        model = made.capture.task.build()
        here = Local(site="A", round=1, rng=torch.Generator().manual_seed(4))
        prepare = partial(defense.prepare, local=here) if private else None
        train(model, members, LocalRecipe(lr=0.1, epochs=60, batch_size=12), classes=3, seed=1, prepare=prepare)
        found.append(score(attack(replace(made.capture, models=(model.state_dict(),))), made.truth))
    assert found[0] > 0.9
    assert found[1] < 0.62
