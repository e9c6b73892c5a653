"""What is known of one update before any search: how the site trained, what it sent, which labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flpriv.attacks.inversion.labels import recover
from flpriv.attacks.inversion.objective import cosine
from flpriv.attacks.inversion.order import Order, in_any_order, in_order, same_course
from flpriv.attacks.inversion.unroll import Replay, replay
from flpriv.capture import Capture, Observation
from flpriv.errors import FlprivError
from flpriv.threat import Can

_BLUR = 0.03
"""Of the replay of Adam. Without any, 150 evaluations left an X-ray of 32 pixels at 12 dB after one step; with this much, three
came back at 30, 31 and 23 dB, with .1 at 28, 26 and 22. After four steps it was 20 dB, hardly more than a public image."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One update, ready to be matched.

    Args:
        seen: the reply.
        site: replays the round on trial images.
        target: ``(W₀ - W_τ) / lr`` for each parameter in the order of ``site.start``, on the device of the replay.
        order: of the images, on the CPU; where not ``ordered`` one of many, with the labels sorted.
        ordered: whether it is known, or does not matter, which labels share a step.
    """

    seen: Observation
    site: Replay
    target: tuple[Tensor, ...]
    order: Order
    ordered: bool

    @property
    def labels(self) -> Tensor:
        """``(images,)`` int64 on the device of the replay; in order of first use where ``ordered``."""
        return self.order.labels.to(self.target[0].device)

    @property
    def where(self) -> str:
        """For messages."""
        return f"round {self.seen.round}, node {self.seen.node}"


def honest(capture: Capture, *, rounds: Sequence[int], limit: int | None, who: str) -> list[Observation]:
    """The single updates of honest models in ``rounds`` (all, where none is named), at most ``limit``.

    Raises:
        FlprivError: if there is none.
    """
    single = [o for o in capture.observations if o.node is not None and not o.trap]
    seen = [o for o in single if not rounds or o.round in rounds]
    if not seen:
        where = f"rounds {', '.join(map(str, rounds))}" if rounds else "any round"
        raise FlprivError(f"{who}: no honest update was captured in {where}; set the option rounds")
    return seen[:limit]


def gather(
    capture: Capture, seen: Observation, *, rng: torch.Generator, device: torch.device, max_steps: int, max_images: int, who: str
) -> Evidence:
    """The evidence in one reply.

    Under a balanced loss the labels of all a site's records tell its class weights; of a part of them, weights are taken to be
    equal.

    Args:
        capture: what else the adversary holds.
        seen: the reply.
        rng: draws the public images that labels are recovered with.
        device: where to compute.
        max_steps: refuse updates of more local steps.
        max_images: refuse updates of more distinct images.
        who: name of the attack, for messages.

    Raises:
        FlprivError: if the local recipe is not known or cannot be replayed, or the update is beyond a limit.
    """
    where = f"{who}: round {seen.round}, node {seen.node}"
    if seen.local is None:
        raise FlprivError(f"{where}: the capture lacks the local recipe")
    site = replay(capture.task, seen.sent, recipe=seen.local, examples=seen.examples, device=device)
    if len(site.batches) == 1 and seen.labels is not None and len(seen.labels):
        site = site.of(len(seen.labels))
    if len(site.batches) > max_steps or site.images > max_images:
        raise FlprivError(
            f"{where}: {len(site.batches)} local steps on {site.images} images are more than max_steps = {max_steps} or "
            f"max_images = {max_images}; raise these options or lower local.steps"
        )
    update = seen.update
    target = tuple(update[name].to(device) / -site.recipe.lr for name in site.start)
    told = seen.labels if seen.labels is not None and len(seen.labels) else None
    if told is not None and len(told) != (uses := sum(map(len, site.batches))):
        raise FlprivError(f"{where}: {len(told)} labels for {uses} uses of images; the sites do not follow the local recipe")
    known = told is not None and Can.KNOW_ORDER in capture.granted
    if told is None:
        order = Order(labels=_recovered(capture, site, target, rng).cpu(), course=same_course(site))
    else:
        order = in_order(told.cpu(), site) if known else in_any_order(told.cpu(), site)
    if site.recipe.optimizer == "adam":
        site = replace(site, blur=_BLUR)
    if site.recipe.loss == "balanced-cross-entropy" and site.images == seen.examples:
        site = replace(site, class_weights=_balanced(order.labels, len(capture.task.classes)).to(device))
    return Evidence(seen=seen, site=site, target=target, order=order, ordered=known or len(site.epoch) == 1)


def sensitivity(evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> float | None:
    """``1 - cos`` between the update and what public images would send at the same labels, the mean of up to four draws.

    Near 0 the update hardly depends on the images, and no attack can tell them. ``None`` without public images.
    """
    if capture.public is None or not len(capture.public):
        return None
    apart = []
    for _ in range(4):
        drawn = torch.randint(len(capture.public), (evidence.site.images,), generator=rng)
        images = capture.public.take(drawn).images.to(evidence.labels.device)
        other = evidence.site(images, evidence.labels, evidence.order.course.to(images.device))
        apart.append(float(cosine(other, evidence.target)))
    return sum(apart) / len(apart)


def _recovered(capture: Capture, site: Replay, target: Sequence[Tensor], rng: torch.Generator) -> Tensor:
    """``(images,)`` int64, sorted, read from the update."""
    if capture.public is not None:
        public = capture.public.take(torch.randperm(len(capture.public), generator=rng)[:64])
        guesses, guessed = public.images, public.labels
    else:
        guesses, guessed = torch.rand((16, *capture.task.shape), generator=rng), torch.full((16,), -1)
    device = target[0].device
    return recover(site, target, classes=len(capture.task.classes), guesses=guesses.to(device), guessed=guessed.to(device))


def _balanced(labels: Tensor, classes: int) -> Tensor:
    """Weights of classes ``(classes,)`` among a site's records, ``N / (K N_c)`` for each of K that occur, else 0."""
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts), 0.0)
