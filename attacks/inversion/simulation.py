"""What an attack finds of images the adversary knows: updates of public images, sent through the sites' own defences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.objective import cosine
from flpriv.attacks.inversion.order import Order, same_course
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.stages import carry_out
from flpriv.capture import Capture
from flpriv.defense import Defense, Local
from flpriv.errors import FlprivError
from flpriv.records import Records
from flpriv.registry import create
from flpriv.state import State, add


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What was found, and what it should have been.

    Args:
        found: ``(M, C, *spatial)`` in [0, 1].
        images: ``(M, C, *spatial)`` the public images behind it.
        mismatch: ``(updates,)`` cosine distance between the update of what was found and the one attacked.
    """

    found: Tensor
    images: Tensor
    mismatch: Tensor


def known_images(capture: Capture, *, who: str) -> Records:
    """The public images of a capture: all an adversary may learn a prior from.

    Raises:
        FlprivError: if there are none.
    """
    if capture.public is None or not len(capture.public):
        raise FlprivError(
            f"{who}: learns from public images, and the capture holds none; grant 'know-public' and set sites.split.public > 0"
        )
    return capture.public


def simulate(plan: Plan, evidence: Evidence, capture: Capture, *, updates: int, rng: torch.Generator, what: str) -> Pairs:
    """Attack ``updates`` updates that public images would have given at the site of ``evidence``.

    They start from the model it was sent, follow its recipe and pass the defences it is known to use; what a defence does
    inside training (``acts_on = "loop"``) is left out, and labels and their order are taken to be known. Images are drawn without
    repetition while there are enough. Several images behind an update have the labels of the site's, for alike labels are harder
    to tell apart: public images that have them, as long as there are any.

    Args:
        plan: how they are searched for; its ``finish`` is left out.
        evidence: whose site is simulated.
        capture: with public images.
        updates: how many, ≥ 1.
        rng: on the CPU.
        what: for progress and errors.

    Raises:
        FlprivError: without public images.
    """
    public, device, each = known_images(capture, who=what), evidence.labels.device, evidence.site.images
    order = torch.cat([torch.randperm(len(public), generator=rng) for _ in range(-(-updates * each // len(public)))])
    if each > 1:
        wanted = evidence.labels.cpu().repeat(updates)
        drawn = replace(public.take(_labelled(public.labels[order], wanted, order)), labels=wanted)
    else:
        drawn = public.take(order[:updates])
    images, labels = torch.split(drawn.images.to(device), each), torch.split(drawn.labels.to(device), each)
    seen = evidence.seen
    defenses: list[Defense] = [
        create("defenses", name, options, files=map(Path, capture.task.plugins)) for name, options in seen.defenses or ()
    ]
    group = []
    for x, y in zip(images, labels, strict=True):
        update = _protected(evidence, x, y, defenses, rng)
        target = tuple(value.to(device) / -evidence.site.recipe.lr for value in update.values())
        reply = replace(seen, returned=add(seen.sent, update), metrics={}, labels=None)
        group.append(replace(evidence, seen=reply, target=target, order=Order(labels=y.cpu(), course=same_course(evidence.site))))
    problems, found = carry_out(
        plan, group, torch.stack(labels), shape=tuple(images[0].shape), rng=rng, what=what, key={"simulated": what}
    )
    claimed = problems.images(found.trials).clamp(0, 1)
    bare = replace(problems, plan=replace(problems.plan, objective=cosine))
    return Pairs(
        found=claimed.flatten(0, 1).cpu(),
        images=torch.cat([_matched(c, x) for c, x in zip(claimed, images, strict=True)]).cpu(),
        mismatch=bare.matching(found.trials, torch.arange(updates, device=device)).cpu(),
    )


def _protected(
    evidence: Evidence, images: Tensor, labels: Tensor, defenses: Sequence[Defense], rng: torch.Generator
) -> dict[str, Tensor]:
    """``W_τ - W₀`` after the defences, on the CPU."""
    site = replace(evidence.site, blur=0.0)
    moved = (value.cpu() * -site.recipe.lr for value in site(images, labels))
    update: State = dict(zip(site.start, moved, strict=True))
    for defense in defenses:
        update = defense.protect(update, local=Local(site="simulated", round=evidence.seen.round, rng=rng))
    return dict(update)


def _labelled(labels: Tensor, wanted: Tensor, rows: Tensor) -> list[int]:
    """One of ``rows`` for each label wanted, the first that has it of those left, or else the first left."""
    left = list(zip(rows.tolist(), labels.tolist(), strict=True))
    taken = []
    for label in wanted.tolist():
        place = next((place for place, (_, own) in enumerate(left) if own == label), 0)
        taken.append(left.pop(place)[0])
    return taken


def _matched(claimed: Tensor, images: Tensor) -> Tensor:
    """``images`` in the order of what was found of them."""
    from scipy.optimize import linear_sum_assignment

    if len(images) == 1:
        return images
    apart = (claimed[:, None] - images[None]).square().flatten(2).mean(2)
    return images[torch.from_numpy(linear_sum_assignment(apart.cpu().numpy())[1]).to(images.device)]
