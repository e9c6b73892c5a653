"""Many updates and restarts as one computation: how far each trial's update is from the one it is to explain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from flpriv.attacks.inversion.channel import recognise, through
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.order import same_course
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.smoothing import smoothed
from flpriv.attacks.inversion.unroll import Replay


@dataclass(frozen=True, kw_only=True)
class Problems:
    """P updates of the same model and the same course of training, compared with P trials each by itself.

    A :data:`flpriv.attacks.inversion.search.Evaluate`. On a GPU all trials run in one computation (``torch.func.vmap``); on a
    CPU one after another, which is as fast or faster there: a single trial fills its cores.

    Args:
        site: replays the round.
        places: which parameters are compared: those that any of the updates changed.
        targets: per compared parameter ``(P, *shape)``.
        labels: ``(P, images)``.
        courses: ``(P, epochs, images)``, see :meth:`flpriv.attacks.inversion.unroll.Replay.__call__`.
        plan: the parts of the objective.
        defenses: what altered the updates, as far as it is known or shows.
        batched: whether to use ``vmap``.
        mean: ``(P, N, C, *spatial)``, where group consistency draws each trial to.
        told: for each hint of the plan what it is told, each tensor ``(P, …)``.
    """

    site: Replay
    places: tuple[int, ...]
    targets: tuple[Tensor, ...]
    labels: Tensor
    courses: Tensor
    plan: Plan
    defenses: Sequence[tuple[str, Mapping[str, Any]]] | None = None
    batched: bool = False
    mean: Tensor | None = None
    told: tuple[tuple[Tensor, ...], ...] = ()
    _kept: dict[int, Callable[[Sequence[Tensor]], Tensor]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __call__(self, trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(A,)`` and slopes ``(A, …)`` of trials for the problems ``rows``."""
        mean = self.mean[rows] if self.mean is not None else trials[:, :0]
        if self.batched:
            targets = [target[rows] for target in self.targets]
            told = [[one[rows] for one in hint] for hint in self.told]
            given = self.labels[rows], self.courses[rows]
            values, slopes = vmap(self._one, chunk_size=self._chunk())(trials, *given, targets, mean, told)
            return values, slopes
        done = []
        for trial, row, near in zip(trials, rows.tolist(), mean, strict=True):
            known = [[one[row] for one in hint] for hint in self.told]
            done.append(self._by(self._comparison(row), trial, self.labels[row], self.courses[row], near, known))
        return torch.stack([value for value, _ in done]), torch.stack([slope for _, slope in done])

    def matching(self, trials: Tensor, rows: Tensor) -> Tensor:
        """How far each trial's update is from the observed one, without any regulariser; ``(A,)``."""
        bare = replace(self, plan=replace(self.plan, regularisers=(), hints=(), consensus=0.0), told=())
        return bare(trials, rows)[0]

    def images(self, trials: Tensor) -> Tensor:
        """The images that trials of all problems stand for, ``(P, N, C, *spatial)``."""
        return torch.stack([self.plan.space.decode(t, y)[0].detach() for t, y in zip(trials, self.labels, strict=True)])

    def _one(
        self, trial: Tensor, labels: Tensor, course: Tensor, target: list[Tensor], mean: Tensor, told: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        return self._by(self._through(target), trial, labels, course, mean, told)

    def _through(self, target: list[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
        return through(target, defenses=self.defenses, base=self.plan.objective, lr=self.site.recipe.lr)

    def _comparison(self, row: int) -> Callable[[Sequence[Tensor]], Tensor]:
        """How trials of a problem are compared, made once."""
        if row not in self._kept:
            self._kept[row] = self._through([target[row] for target in self.targets])
        return self._kept[row]

    def _by(
        self,
        compare: Callable[[Sequence[Tensor]], Tensor],
        trial: Tensor,
        labels: Tensor,
        course: Tensor,
        mean: Tensor,
        told: list[list[Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Value and slope of one trial. In two steps, so that the objective's own graph stays as small as the update."""

        def forward(trial: Tensor) -> tuple[list[Tensor], Tensor]:
            images, given = self.plan.space.decode(trial, labels)
            moved = self.site(images, given, course)
            return [moved[place] for place in self.places], images

        def total(moved: list[Tensor], images: Tensor) -> Tensor:
            value = compare(moved)
            for weight, penalty in self.plan.regularisers:
                value = value + weight * penalty(images)
            for hint, known in zip(self.plan.hints, told, strict=True):
                value = value + hint.weight * hint.penalty(images, known)
            if self.plan.consensus:
                value = value + self.plan.consensus * (images - mean).square().mean()
            return value

        update: tuple[list[Tensor], Tensor]
        update, pull = vjp(forward, trial)[:2]
        slopes, value = grad_and_value(total, argnums=(0, 1))(*update)
        return value, pull(slopes)[0]

    def _chunk(self) -> int | None:
        """How many trials fit the device at a time, by a rough count of copies of the update."""
        device = self.labels.device
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        each = 12 * 4 * sum(target[0].numel() for target in self.targets) * len(self.site.batches)
        return max(1, int(0.6 * free) // max(1, each))


def assemble(group: Sequence[Evidence], labels: Tensor, plan: Plan, *, courses: Tensor | None = None) -> Problems:
    """Updates of one model and course as problems, ``len(labels) / len(group)`` of each.

    Args:
        group: the updates.
        labels: ``(P, images)`` the labels of each problem, those of one update together.
        plan: the parts of the objective.
        courses: ``(P, epochs, images)``; ``None`` for the same order in every epoch.
    """
    first, each = group[0], len(labels) // len(group)
    everywhere = range(len(first.target))
    places = tuple(p for p in everywhere if any(bool(evidence.target[p].any()) for evidence in group)) or tuple(everywhere)
    targets = tuple(torch.stack([evidence.target[p] for evidence in group]).repeat_interleave(each, 0) for p in places)
    asked = [(evidence, given) for evidence, rows in zip(group, labels.view(len(group), each, -1), strict=True) for given in rows]
    told = [[hint.read(evidence, given) for evidence, given in asked] for hint in plan.hints]
    if courses is None:
        courses = same_course(first.site).to(labels.device).expand(len(labels), -1, -1)
    return Problems(
        site=replace(first.site, model=smoothed(first.site.model, plan.sharpness)),
        places=places,
        targets=targets,
        labels=labels,
        courses=courses,
        plan=plan,
        defenses=recognise(first.target) if first.seen.defenses is None else first.seen.defenses,
        batched=labels.device.type == "cuda",
        told=tuple(tuple(map(torch.stack, zip(*all, strict=True))) for all in told),
    )
