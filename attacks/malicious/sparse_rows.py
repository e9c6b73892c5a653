"""Images out of the update of a dense ReLU layer whose neurons each fire for some of them; nothing here looks at the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps
_QUIET = 4.0
"""Roundings below which a row holds nothing."""
_DONE = 0.002
"""Share of a row's first size below which nothing is left in it."""
_SAME = 0.02
"""Relative difference below which two rows hold the same."""
_ALIKE = 1e-3
"""Mean square distance below which two images are one."""
_BEYOND = 0.25
"""Root mean square by which a candidate may leave the box."""
_SLACK = 0.02
"""By how much more another row may leave the box once a candidate is taken off it."""
_LEAST = 1.25
"""Score below which a candidate is not taken off: it alone is borne out by its own row."""
_PIXELS, _JUDGED, _OTHERS, _PAIRS, _PASSES = 256, 128, 64, 4000, 3
"""Pixels, candidates, other rows of each and pairs of rows looked at in a step; passes of search and fit."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A dense ReLU layer as sent, and what training took off it: sums over images of a number times the image.

    An image is to send the same number to every neuron it fires, as it does where all neurons go on alike.

    Args:
        weight: ``(K, P)`` float64 as sent.
        bias: ``(K,)`` float64 as sent.
        moved: ``(K, P)`` float64, what the weights lost.
        moved_bias: ``(K,)`` float64, what the biases lost.
        doubt: ``(K,)`` root mean square of the rounding of a row of ``moved``.
        doubt_bias: ``(K,)`` rounding of ``moved_bias``.
    """

    weight: Tensor
    bias: Tensor
    moved: Tensor
    moved_bias: Tensor
    doubt: Tensor
    doubt_bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, moved: Tensor, moved_bias: Tensor) -> Rows:
        """From a layer as sent and returned in float32, and what it lost."""
        weight, bias = weight.double(), bias.double()
        largest = torch.maximum(weight.abs(), (weight - moved).abs())
        return cls(
            weight=weight,
            bias=bias,
            moved=moved,
            moved_bias=moved_bias,
            doubt=_EPS * largest.square().mean(1).sqrt(),
            doubt_bias=_EPS * torch.maximum(bias.abs(), (bias - moved_bias).abs()),
        )

    def fired_by(self, images: Tensor) -> Tensor:
        """``(N, K)``: which neurons images ``(N, P)`` fire."""
        return images @ self.weight.T + self.bias > 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """Images that may be records, the surest first.

    Args:
        images: ``(N, P)`` float64 in [0, 1].
        confidence: ``(N,)`` float64 in (0, 1]: the share of what the rows it fires hold that it and the others found explain.
    """

    images: Tensor
    confidence: Tensor


def images_in(rows: Rows, *, most: int | None, rng: torch.Generator) -> Found:
    """The images behind an update, found one after another and taken off the rows they fire.

    An image alone in a row is the row over its bias. It fires the same neurons with the same number, so once found it is taken
    off all of them, and rows of several images become rows of one. Where no row holds an image alone, the difference of two may.
    Which candidate is one image is told by the other rows it fires: some hold it alone as well, and what is left of the others
    stays in the box [0, 1] and fires its own neuron, which a mixture seldom grants. After each pass the images are fitted to all
    rows at once, by least squares, which drops mixtures of others. Candidates that nothing bears out are offered last.

    Args:
        rows: before and after.
        most: no more than this many, where the number of images behind the update is known.
        rng: draws the pixels, rows and pairs that are looked at.
    """
    search = _Search(rows, rng)
    for _ in range(_PASSES):
        steps = 0
        while steps < 2 * (most or len(rows.bias)) and (search.lone() or search.pair()):
            steps += 1
        if not steps or not search.fit():
            break
    return search.found(most)


def one_a_row(moved: Tensor, moved_bias: Tensor) -> Found:
    """Each row that moved over its bias, as the published attacks read a layer; all are believed alike.

    Args:
        moved: ``(K, P)`` what the weights lost.
        moved_bias: ``(K,)`` what the biases lost.
    """
    fired = moved_bias != 0
    images = (moved[fired] / moved_bias[fired, None]).clamp(0, 1)
    return Found(images=images, confidence=torch.ones(len(images), dtype=torch.float64))


class _Search:
    """What is left of each row after the images found so far, and the candidate that each row holds."""

    def __init__(self, rows: Rows, rng: torch.Generator) -> None:
        count, pixels = rows.weight.shape
        self.rows, self.rng = rows, rng
        self.looked = torch.randperm(pixels, generator=rng)[:_PIXELS]
        self.images: list[Tensor] = []
        self.numbers: list[float] = []
        self.candidate = torch.zeros_like(rows.weight)
        self.excess = torch.full((count,), torch.inf, dtype=torch.float64)
        self.fires = torch.zeros((count, count), dtype=torch.bool)  # [candidate, row]
        self._restart()

    def lone(self) -> bool:
        """Take off the most believable image that is alone in a row; whether there was one."""
        able = torch.nonzero(self._able()).flatten()
        if not len(able):
            return False
        seen = self.left[:, self.looked]
        alone = self._alone(able, seen)
        first = (alone.sum(1) / (1 + 20 * self.excess[able])).argsort(descending=True)[:_JUDGED]
        scores = [self._score(int(able[i]), alone[i], seen) for i in first]
        score, best = max(zip(scores, first.tolist(), strict=True))
        if score < _LEAST:
            return False
        alike = torch.nonzero(alone[best]).flatten()
        numbers = self.left_bias[alike]
        middle = alike[(numbers - numbers.median()).abs().argsort()[: len(alike) // 2 + 1]]
        self._take(self.candidate[middle].mean(0), float(self.left_bias[middle].mean()))
        self.open[able[best]] = False
        return True

    def pair(self) -> bool:
        """Take off the image that most pairs of rows differ by; whether at least three pairs do."""
        rows = self.rows
        places = torch.nonzero(self.open).flatten()
        left, bias = self.left[places], self.left_bias[places]
        first, second = self._differing(left, bias, places)
        if not len(first):
            return False
        numbers = bias[first] - bias[second]
        seen = left[:, self.looked]
        raw = (seen[first] - seen[second]) / numbers[:, None]
        kept = ((raw - raw.clamp(0, 1)).square().mean(1).sqrt() < _SLACK / 2) & (raw.std(1) > 1e-2)
        raw, numbers, first, second = raw[kept], numbers[kept], first[kept], second[kept]
        near = torch.cdist(raw, raw) < _SAME * len(self.looked) ** 0.5
        near &= (numbers[:, None] - numbers[None]).abs() < _SAME * numbers.abs()[:, None]
        votes = near.sum(1)
        if not len(votes) or int(votes.max()) < 3:
            return False
        alike = near[int(votes.argmax())]
        image = ((left[first[alike]] - left[second[alike]]) / numbers[alike, None]).mean(0).clamp(0, 1)
        if not bool((rows.fired_by(image[None])[0] & self.open).any()):
            return False
        self._take(image, float(numbers[alike].mean()))
        return True

    def _differing(self, left: Tensor, bias: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of open rows whose difference, as an image, fires the first neuron and not the second."""
        rows = self.rows
        own_bias, doubt = rows.bias[places], rows.doubt_bias[places]
        along = left @ rows.weight[places].T
        own, apart = torch.diagonal(along), bias[:, None] - bias[None]
        told = apart.abs() > _QUIET * (doubt[:, None] + doubt[None]) + _DONE * bias.abs()[:, None]
        apart = torch.where(told, apart, 1)
        fires = (own[:, None] - along.T) / apart + own_bias[:, None] > 0
        silent = (along - own[None]) / apart + own_bias[None] <= 0
        pairs = torch.nonzero(fires & silent & told)
        pairs = pairs[torch.randperm(len(pairs), generator=self.rng)[:_PAIRS]]
        return pairs[:, 0], pairs[:, 1]

    def fit(self) -> bool:
        """Fit the images found to the rows they explain and drop those that turn out to be none; whether anything is left then.

        A fit that explains fewer rows than what was found before is not taken over.
        """
        rows = self.rows
        images, numbers = self._stacked()
        self._restart()
        before = self.images, self.numbers, int(self.open.sum())
        fires = rows.fired_by(images).double().T
        left = rows.moved - (fires * numbers) @ images
        explained = left.square().mean(1) < (0.1 * rows.moved).square().mean(1) + (_QUIET * rows.doubt).square()
        inverse = torch.linalg.pinv(fires[explained], rtol=1e-6)
        fitted = inverse @ rows.moved_bias[explained]
        raw = (inverse @ rows.moved[explained]) / torch.where(fitted == 0, 1, fitted)[:, None]
        box = raw.clamp(0, 1)
        real = fitted.abs() > 0.05 * numbers.abs()
        better = real & ((raw - box).square().mean(1).sqrt() < 0.05) & ((box - images).square().mean(1).sqrt() < 0.1)
        self.images = list(torch.where(better[:, None], box, images)[real])
        self.numbers = torch.where(better, fitted, numbers)[real].tolist()
        self._restart()
        if int(self.open.sum()) > before[2]:
            self.images, self.numbers = before[:2]
            self._restart()
        return bool(self.open.any())

    def found(self, most: int | None) -> Found:
        """The images found and, behind them, the candidates of the rows that nobody explains."""
        images, numbers = self._stacked()
        fires = self.rows.fired_by(images).double()
        error = self.left.square().mean(1).sqrt()
        size = (numbers.abs() * images.square().mean(1).sqrt()).clamp_min(1e-300)
        confidence = (fires / (1 + error[None] / size[:, None])).sum(1) / fires.sum(1).clamp_min(1)
        order = confidence.argsort(descending=True)[:most]
        kept = [(float(confidence[place].clamp_min(1e-6)), images[place]) for place in order]
        least = min((sure for sure, _ in kept), default=1.0)
        rest = torch.where(self._able(), self.excess, torch.inf)
        for place in rest.argsort().tolist():
            if not bool(rest[place] < torch.inf) or len(kept) == (len(rest) if most is None else most):
                break
            image = self.candidate[place]
            if all(float((image - other).square().mean()) > _ALIKE for _, other in kept):
                kept.append((0.5 * least / (1 + 20 * float(rest[place])), image))
        return Found(
            images=torch.stack([image for _, image in kept]) if kept else images,
            confidence=torch.tensor([sure for sure, _ in kept], dtype=torch.float64),
        )

    def _able(self) -> Tensor:
        return self.open & (self.excess < _BEYOND)

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Images ``(N, P)`` and what each sends ``(N,)``."""
        images = torch.stack(self.images) if self.images else self.candidate[:0]
        return images, torch.tensor(self.numbers, dtype=torch.float64)

    def _restart(self) -> None:
        rows = self.rows
        images, numbers = self._stacked()
        fires = rows.fired_by(images).double().T * numbers
        self.left, self.left_bias = rows.moved - fires @ images, rows.moved_bias - fires.sum(1)
        self.open = torch.ones(len(rows.bias), dtype=torch.bool)
        self._refresh(torch.arange(len(rows.bias)))

    def _take(self, image: Tensor, number: float) -> None:
        """Take an image off all rows it fires; taken a second time, its number grows, and at 0 it was none."""
        touched = torch.nonzero(self.rows.fired_by(image[None])[0]).flatten()
        self.left[touched] -= number * image
        self.left_bias[touched] -= number
        known = next((i for i, other in enumerate(self.images) if float((image - other).square().mean()) < _ALIKE), None)
        if known is None:
            self.images.append(image)
            self.numbers.append(number)
        else:
            self.numbers[known] += number
            if abs(self.numbers[known]) < _SAME * abs(number):
                del self.images[known], self.numbers[known]
        self._refresh(touched[self.open[touched]])

    def _refresh(self, places: Tensor) -> None:
        """Read the candidates of rows again after something was taken off them."""
        if not len(places):
            return
        rows = self.rows
        left, bias = self.left[places], self.left_bias[places]
        told = (bias.abs() > _QUIET * rows.doubt_bias[places]) & (bias != 0)
        size, at_first = left.square().mean(1).sqrt(), rows.moved[places].square().mean(1).sqrt()
        self.open[places] &= told & (size > _QUIET * rows.doubt[places]) & (size > _DONE * at_first)
        raw = left / torch.where(told, bias, 1)[:, None]
        image = raw.clamp(0, 1)
        along = image @ rows.weight.T
        self.candidate[places], self.fires[places] = image, along + rows.bias > 0
        own = along.gather(1, places[:, None])[:, 0] + rows.bias[places] > -1e-3 * along.abs().mean(1)
        excess = (raw - image).square().mean(1).sqrt()
        self.excess[places] = torch.where(own & (image.std(1, correction=0) > 1e-2), excess, torch.inf)

    def _alone(self, able: Tensor, seen: Tensor) -> Tensor:
        """``(candidates, K)``: which of the rows a candidate fires hold it alone, as its own does."""
        numbers = self.left_bias
        sizes = numbers[able].abs() * self.candidate[able][:, self.looked].square().mean(1).sqrt()
        alone: Tensor = torch.cdist(seen[able], seen) < _SAME * len(self.looked) ** 0.5 * sizes[:, None]
        alone &= (numbers[None] - numbers[able, None]).abs() < _SAME * numbers[able, None].abs()
        alone &= self.fires[able] & self.open
        alone[range(len(able)), able] = True
        return alone

    def _score(self, place: int, alone: Tensor, seen: Tensor) -> float:
        """How well the rows that a candidate fires bear it out: how many hold it alone, and what is left of the others."""
        others = torch.nonzero(self.fires[place] & ~alone).flatten()
        if len(others) > _OTHERS:
            others = others[torch.randperm(len(others), generator=self.rng)[:_OTHERS]]
        number, excess = self.left_bias[place], float(self.excess[place])
        bias = self.left_bias[others] - number
        raw = (seen[others] - number * self.candidate[place, self.looked]) / bias[:, None]
        beyond = (raw - raw.clamp(0, 1)).square().mean(1).sqrt()
        good = self.open[others] & (beyond < excess + _SLACK)
        count = int(alone.sum())
        agreed = (float(good.sum()) + min(count, _OTHERS) + 1) / (len(others) + min(count, _OTHERS) + 2)
        return (count + agreed) / (1 + 20 * excess)
