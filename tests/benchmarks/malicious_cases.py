"""Known replies to a trap, for the benchmarks of malicious servers: what sites send back, one by one or as a sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from flpriv.attack import Attack
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.finding import Finding, Metric
from flpriv.measures import measure
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.sums import Sum
from flpriv.task import Task
from flpriv.threat import NAMED
from flpriv.truth import Truth

STEP = LocalRecipe(lr=0.05, steps=1, train_mode=False)


@dataclass(frozen=True, kw_only=True)
class Armed:
    """Replies of one round to a trap.

    Args:
        capture: of the adversary: single replies, or their sum.
        truth: what is behind them.
    """

    capture: Capture
    truth: Truth

    def attack(self, attack: Attack, *, seed: int = 0) -> Finding:
        """What comes of the attack whose trap it was, over all images of all sites."""
        claims = attack(self.capture, seed=seed)
        return measure(
            claims, self.truth, attack=attack.name, name=attack.name, goal=attack.goal, setting="none", defense="none"
        )[0]


def armed(
    private: Records,
    public: Records,
    attack: Attack,
    *,
    model: str = "cnn",
    batch: int,
    nodes: int = 1,
    summed: bool = False,
    recipe: LocalRecipe = STEP,
    classes: int = 2,
    seed: int = 0,
    modality: str = "xray",
    shuffled: bool = True,
    **options: Any,
) -> Armed:
    """``nodes`` sites of ``batch`` images each, drawn from ``private`` by ``seed``, answer the trap of ``attack``.

    Args:
        private: what is drawn from, without replacement.
        public: what the adversary holds.
        attack: an active attack.
        model: name of a registered model.
        batch: images of a site; ``recipe`` says how they are used, a single step takes all at once.
        nodes: how many sites.
        summed: whether the adversary sees the sum over sites alone.
        recipe: of the local training.
        classes: of the task; labels are those of the records, modulo this.
        seed: of the draw, the trap and the training.
        modality: of the task.
        shuffled: whether sites draw at random; otherwise the first takes the first records, and so on.
        options: of the model.
    """
    shape = tuple(private.images.shape[1:])
    task = Task(modality=modality, shape=shape, classes=tuple(map(str, range(classes))), model=model, options=options)
    recipe = replace(recipe, batch_size=batch) if recipe.steps == 1 else recipe
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(private), generator=rng) if shuffled else torch.arange(len(private))
    drawn = order[: nodes * batch]
    trap = attack.trap(task, public=public, rng=rng)
    if trap is None:
        raise ValueError(f"{attack.name} sets no trap")
    honest = task.build(seed=seed).state_dict()
    everyone = tuple(range(1, nodes + 1))
    total, seen, used = Sum(), [], {}
    for node in everyone:
        own = private.take(drawn[(node - 1) * batch : node * batch])
        own = replace(own, labels=own.labels % classes)
        sent = trap.arm(honest, round=1, node=node, nodes=everyone)
        if sent is None:
            raise ValueError(f"{attack.name} is not sent in round 1")
        site = attack.architecture(task.build(), task)
        site.load_state_dict(dict(sent))
        train(site, own, recipe, classes=classes, seed=seed + node)
        returned = {key: value.detach() for key, value in site.state_dict().items()}
        reply = Observation(
            round=1,
            node=node,
            sent=sent,
            returned=returned,
            examples=batch,
            local=recipe,
            defenses=(),
            trap=attack.name,
            nodes=everyone,
        )
        if summed:
            total.add(reply)
        else:
            seen.append(reply)
        used[1, node] = own
    if (whole := total.observation()) is not None:
        seen.append(whole)
    capture = Capture(
        granted=NAMED["malicious-sums-only" if summed else "malicious-server"],
        task=task,
        observations=tuple(seen),
        models=(honest,),
        public=public,
        secrets=trap.secrets,
    )
    everybody = Records.concat(list(used.values()))
    sites = {node: f"site {node}" for node in everyone}
    return Armed(capture=capture, truth=Truth(used=used, site_of=sites, everyone=everybody, public=public))


def metric(finding: Finding, begins: str) -> Metric:
    """The metric of a finding whose name begins so."""
    return next(one for one in finding.metrics if one.name.startswith(begins))
