"""Which image each local step uses: as far as it is known, and as it may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.attacks.inversion.unroll import Replay

Steps = tuple[tuple[tuple[int, int], ...], ...]
"""Label and number of the images in each local step."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The images of a round in the order of their first use, and where they are used again.

    Args:
        labels: ``(N,)``.
        course: ``(epochs, N)`` which image is at each place of each epoch; the first row counts up from 0.
    """

    labels: Tensor
    course: Tensor

    def steps(self, site: Replay) -> Steps:
        """What is in each local step: equal where two orders differ in nothing but names.

        With a single pass over the images, those of one label need no numbers.
        """
        labels, course = self.labels.tolist(), self.course.tolist()
        each = len(site.epoch)
        used = [[course[step // each][place] for place in batch] for step, batch in enumerate(site.batches)]
        return tuple(tuple(sorted((labels[i], i if site.epochs > 1 else 0) for i in images)) for images in used)

    def drawn(self, site: Replay, *, ordered: bool, rng: torch.Generator) -> Order:
        """At random among the orders that may be: all, or where labels are known of each step (``ordered``) those that keep them.

        The labels known of a step tell images of one label apart in the first epoch alone.
        """
        if not ordered:
            return Order(labels=self.labels[torch.randperm(site.images, generator=rng)], course=_anyhow(site, rng))
        course = self.course.clone()
        for row in course[1:]:
            for label in set(self.labels.tolist()):
                alike = (self.labels[row] == label).nonzero()[:, 0]
                row[alike] = row[alike[torch.randperm(len(alike), generator=rng)]]
        return Order(labels=self.labels, course=course)

    def neighbours(self, site: Replay, *, ordered: bool) -> Iterator[Order]:
        """Every order with two images of different steps exchanged, the other epochs left as they are; ``ordered`` as above."""
        step = {place: number for number, batch in enumerate(site.epoch) for place in batch}
        for epoch in range(site.epochs):
            for other in range(site.images):
                for one in range(other):
                    alike = bool(self.labels[self.course[epoch, one]] == self.labels[self.course[epoch, other]])
                    if step[one] != step[other] and (alike and epoch > 0 if ordered else epoch > 0 or not alike):
                        yield self._exchanged(epoch, one, other)

    def _exchanged(self, epoch: int, one: int, other: int) -> Order:
        places = torch.arange(len(self.labels))
        places[[one, other]] = places[[other, one]]
        course = self.course.clone()
        if epoch:
            course[epoch] = course[epoch, places]
            return Order(labels=self.labels, course=course)
        course[1:] = places[course[1:]]
        return Order(labels=self.labels[places], course=course)


def same_course(site: Replay) -> Tensor:
    """``(epochs, N)``, every epoch in the same order."""
    return torch.arange(site.images).repeat(site.epochs, 1)


def _anyhow(site: Replay, rng: torch.Generator) -> Tensor:
    later = [torch.randperm(site.images, generator=rng) for _ in range(site.epochs - 1)]
    return torch.stack([torch.arange(site.images), *later])


def in_order(uses: Tensor, site: Replay) -> Order:
    """The order that the labels of all ``uses``, in order, tell: images of one label take turns as in the first epoch.

    Where the labels of an epoch are not those of the first, the images left over fill its places.
    """
    labels, rows = uses[: site.images], []
    for epoch in torch.split(uses, site.images):
        free = list(range(site.images))
        places: list[int | None] = []
        for label in epoch.tolist():
            places.append(next((image for image in free if labels[image] == label), None))
            free = [image for image in free if image != places[-1]]
        rest = iter(free)
        rows.append([*(next(rest) if place is None else place for place in places), *rest])
    return Order(labels=labels, course=torch.tensor(rows))


def in_any_order(uses: Tensor, site: Replay) -> Order:
    """Labels of the images, sorted, from those of all ``uses`` in any order.

    Each whole epoch uses every image once; what a last epoch broken off adds is shared out as evenly as it can be.
    """
    whole, rest = divmod(len(uses), site.images)
    counts = torch.bincount(uses)
    share = counts * site.images / len(uses)
    least = -(-counts // (whole + 1)) if rest else counts // whole
    most = torch.minimum(counts // whole, torch.full_like(counts, site.images))
    for _ in range(site.images - int(least.sum())):
        least[torch.where(least < most, share - least, -torch.inf).argmax()] += 1
    return Order(labels=torch.arange(len(counts)).repeat_interleave(least), course=same_course(site))
