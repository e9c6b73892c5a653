"""Canaries: what an auditor plants at one site, each in or out by a fair coin, to measure what training gives away of it.

An attack brings them (:meth:`flpriv.attack.Attack.canaries`), a federation of its own trains with those whose coin says so, and
the attack then scores all of them. Only the auditor knows the coins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flpriv import data
from flpriv.errors import ScenarioError
from flpriv.records import Records
from flpriv.registry import create
from flpriv.scenario import parse
from flpriv.seeds import derive
from flpriv.state import State, parameters

if TYPE_CHECKING:
    from torch import nn

    from flpriv.scenario import Scenario, Setting

ENTRIES = 4096
"""A random direction is other than zero in no more than this many entries: enough to lie across every other direction."""


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """m canaries, all of them, whether they end up in or out. Exactly one of ``records`` and ``seeds`` is given.

    Args:
        records: m images with labels, each trained on like a record of the site's own.
        seeds: ``(m,)`` int64, each of one random direction (see :func:`direction`); a canary then is not an image but a gradient
            along it, which joins those of a step's records where sampling draws it.
        norm: length of such a gradient, > 0; a defence that clips the gradients of records clips it too.
        level: ``"record"``: they are planted at one site; ``"site"``: each is a site without data, which takes part in every
            round and whose update is ``norm`` along its direction, or zero where it is out.
        nodes: pseudonym of the site that they are planted at, or of each where they are sites; -1 for one that took no part,
            ``()`` before the federation.
    """

    records: Records | None = None
    seeds: Tensor | None = None
    norm: float = 1.0
    level: Literal["record", "site"] = "record"
    nodes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse canaries of two kinds, or of none."""
        if (self.records is None) == (self.seeds is None):
            raise ValueError("canaries are either records or seeds of gradients")
        if self.level == "site" and self.seeds is None:
            raise ValueError("canaries that are sites hold no records: give seeds")

    def __len__(self) -> int:
        return len(self.records) if self.records is not None else 0 if self.seeds is None else len(self.seeds)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What the auditor knows of canaries.

    Args:
        canaries: as the attack brought them.
        included: ``(m,)`` bool, which are in.
        place: index of the site they are planted at; ``None`` where they are sites.
        site: its name, or empty.
    """

    canaries: Canaries
    included: Tensor
    place: int | None
    site: str

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the site they are planted at, or of all of them where they are sites."""
        return tuple(map(name, range(len(self.canaries)))) if self.canaries.level == "site" else (self.site,)

    def update(self, row: int, like: State) -> dict[str, Tensor]:
        """What the canary at ``row`` sends, as a site, in every round."""
        assert self.canaries.seeds is not None
        flat = torch.zeros(sum(value.numel() for value in parameters(like).values()))
        if bool(self.included[row]):
            flat.index_add_(0, *_scaled(direction(int(self.canaries.seeds[row]), like), self.canaries.norm))
        return _unflat(flat, like)

    def clipped(self, defenses: Sequence[object]) -> Canaries:
        """The canaries as a step gets them: gradients cut as those of records are by a defence on these."""
        limits = [getattr(one, "max_grad_norm", math.inf) for one in defenses if getattr(one, "acts_on", "") == "loop"]
        return replace(self.canaries, norm=min([self.canaries.norm, *limits]))

    def joined(self, own: Records) -> Records:
        """The site's training records with the canaries that are in, called ``"canary-0007"``, where those are records."""
        if self.canaries.records is None or not bool(self.included.any()):
            return own
        rows = self.included.nonzero().flatten().tolist()
        names = tuple(map(name, rows))
        blank = {key: ("",) * len(rows) for key in own.attributes} | {"site": (self.site,) * len(rows)}
        return Records.concat([own, replace(self.canaries.records.take(rows), ids=names, patients=names, attributes=blank)])


def name(row: int) -> str:
    """The id of a canary that is a record, the name of one that is a site."""
    return f"canary-{row:04d}"


def direction(seed: int, like: State) -> tuple[Tensor, Tensor]:
    """A random direction of length 1 over the parameters of ``like``, flattened one after another in the order of the state.

    Returns:
        ``(k,)`` int64 places, all different, and ``(k,)`` float32 entries ``±1/√k`` at them.
    """
    rng = torch.Generator().manual_seed(seed)
    total = sum(value.numel() for value in parameters(like).values())
    places = torch.unique(torch.randint(total, (ENTRIES,), generator=rng))
    signs = torch.randint(2, (len(places),), generator=rng) * 2 - 1
    return places, signs / math.sqrt(len(places))


def plant(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    canaries: Canaries,
    included: Tensor,
    *,
    batch: int,
    records: int,
    seed: int,
) -> None:
    """Have gradients join each step of ``optimizer``, which must be the innermost: the one that no other one drives.

    There the gradient is a mean over the batch, or what DP-SGD has made of it: clipped, summed, noised and divided by the
    expected batch. A canary that is in is drawn into each step with the chance ``batch / records`` that a record has under
    Poisson sampling, and adds ``norm / batch`` along its direction, as a record whose gradient, once clipped, is that.

    Args:
        model: whose parameters are stepped.
        optimizer: calls hooks before its step.
        canaries: gradients.
        included: ``(m,)`` bool.
        batch: expected number of records in a step.
        records: of the site.
        seed: of the sampling.
    """
    if canaries.seeds is None:
        return
    like = model.state_dict()
    size = sum(value.numel() for value in parameters(like).values())
    lines = [direction(one, like) for one in canaries.seeds[included].tolist()]
    rng = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())

    def join(*_: Any) -> None:
        drawn = (torch.rand(len(lines), generator=rng) < batch / records).nonzero().flatten().tolist()
        added = torch.zeros(size)
        for line in drawn:
            added.index_add_(0, *_scaled(lines[line], canaries.norm / batch))
        for key, part in _unflat(added, like).items():
            weight = weights.get(key)
            if drawn and weight is not None and weight.grad is not None:
                weight.grad.add_(part.to(weight))

    optimizer.register_step_pre_hook(join)


def _unflat(flat: Tensor, like: State) -> dict[str, Tensor]:
    kept = parameters(like)
    parts = torch.split(flat, [value.numel() for value in kept.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(kept.items(), parts, strict=True)}


def _scaled(line: tuple[Tensor, Tensor], factor: float) -> tuple[Tensor, Tensor]:
    return line[0], line[1] * factor


def coins(count: int, *, seed: int) -> Tensor:
    """``(count,)`` bool, each true with chance one half."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5


def planted(scenario: Scenario, setting: Setting) -> Planted | None:
    """The canaries of a setting and their coins, the same in every process; ``None`` where it has none.

    Raises:
        ScenarioError: for a ``threat.canary_site`` that is no site, or an attack whose canaries are none.
    """
    return _planted(scenario.to_json(), setting.id) if setting.canaries else None


def canary_sites(scenario: Scenario, setting: Setting) -> int:
    """How many canaries of a setting are sites, which stand behind the sites with data."""
    found = planted(scenario, setting)
    return len(found.canaries) if found is not None and found.canaries.level == "site" else 0


@lru_cache(maxsize=4)
def _planted(text: str, id: str) -> Planted:
    scenario = parse(json.loads(text), root=Path.cwd())
    setting = scenario.setting(id)
    spec = scenario.attack(setting.canaries)
    names = [one.name for one in data.sites(scenario)]
    wanted = scenario.threat_table.canary_site or names[0]
    if wanted not in names:
        raise ScenarioError(f"threat.canary_site = {wanted!r}: no site of that name; there are {', '.join(map(repr, names))}")
    task = data.task(scenario, setting.defenses)
    canaries = create("attacks", spec.attack, spec.options, files=scenario.plugins).canaries(
        task,
        model=task.build(seed=derive(scenario.seed, "model")),
        public=_public(scenario, range(len(names))),
        rng=torch.Generator().manual_seed(derive(scenario.seed, "canaries", spec.label)),
    )
    if canaries is None or not len(canaries):
        raise ScenarioError(f"attacks.{spec.label}: it brought no canaries")
    included = coins(len(canaries), seed=derive(scenario.seed, "coins", setting.id))
    if canaries.level == "site":
        return Planted(canaries=canaries, included=included, place=None, site="")
    return Planted(canaries=canaries, included=included, place=names.index(wanted), site=wanted)


def _public(scenario: Scenario, sites: Sequence[int]) -> Records | None:
    parts = [part for part in (data.records(scenario, site, "public") for site in sites) if len(part)]
    return Records.concat(parts).anonymous() if parts else None
