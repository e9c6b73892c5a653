"""Labels by the features they need: those which explain the gradient of the last layer with the least unusual images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from flpriv.attacks.inversion.labels.last_layer import LastLayer

_TOLERANCES = (1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """Which features, and hence which probabilities, can the images of a batch have?

    Image j has features ``h_j = mean + x_j @ axes`` on the few axes that logits or gradient depend on, ``x_j`` about standard
    normal. With ``e_j = softmax(logits of h_j) - onehot(y_j)``, ``sum_j e_j [x_j @ reach, 1]`` has to be ``told``.

    Args:
        slopes: ``(classes, r)`` logits per unit of x.
        origin: ``(classes,)`` logits of the mean features.
        reach: ``(r, r)`` features along the axes, in units of their spread, per unit of x.
        told: ``(classes, r + 1)`` by the gradient.
    """

    slopes: Tensor
    origin: Tensor
    reach: Tensor
    told: Tensor

    def cost(self, counts: Tensor) -> float:
        """``|x|²`` of the least unusual features that explain the gradient with these labels, misfit included.

        Gauss-Newton with damping, from near the mean features, under a tolerance that shrinks. A fixed draw sets images of one
        label apart, which would stay alike otherwise.
        """
        images, size = int(counts.sum()), self.slopes.shape[1]
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        hot = one_hot(labels, len(counts)).to(self.slopes.dtype)
        eye = torch.eye(images * size, dtype=hot.dtype)
        reach = torch.cat([self.reach, hot.new_zeros(size, 1)], 1)
        last = hot.new_ones(1, 1)

        def error(x: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
            answers = (x @ self.slopes.T + self.origin).softmax(1)
            given = torch.cat([x @ self.reach, last.expand(images, 1)], 1)
            misfit = ((answers - hot).T @ given - self.told) / tolerance
            return answers, given, misfit, answers - hot, float(x.square().sum() + misfit.square().sum())

        x = 0.1 * torch.randn(images, size, generator=torch.Generator().manual_seed(0), dtype=hot.dtype)
        total = float("inf")
        for tolerance in _TOLERANCES:
            answers, given, misfit, wrong, total = error(x, tolerance)
            damping = 0.1
            for _ in range(12):
                bend = (torch.diag_embed(answers) - answers[:, :, None] * answers[:, None, :]) @ self.slopes
                slope = torch.einsum("jkb,ja->kajb", bend, given) + torch.einsum("jk,ba->kajb", wrong, reach)
                slope = slope.reshape(-1, images * size) / tolerance
                square, down = slope.T @ slope + eye, x.flatten() + slope.T @ misfit.flatten()
                before = total
                for _ in range(8):
                    trial = x - torch.linalg.solve(square + damping * eye, down).view_as(x)
                    new = error(trial, tolerance)
                    if new[-1] < before:
                        break
                    damping = max(5 * damping, 1e-3)
                else:
                    break
                x, damping = trial, damping / 5
                answers, given, misfit, wrong, total = new
                if before - total < 1e-2 * before:
                    break
        return total


def puzzle(gradient: LastLayer, layer: LastLayer, features: Tensor, *, images: int) -> Puzzle:
    """The puzzle of one step's gradient.

    Args:
        gradient: of the last layer, with weight and bias.
        layer: the last layer itself.
        features: ``(M, F)`` what it receives of images like those looked for, M ≥ 2.
        images: how many images the step used.
    """
    assert gradient.weight is not None and gradient.bias is not None and layer.weight is not None and layer.bias is not None
    mean = features.mean(0).double()
    rest = gradient.weight - gradient.bias[:, None] * mean
    logits = _rows(layer.weight - layer.weight.mean(0), tolerance=1e-6)
    beyond = _rows(rest - rest @ logits @ logits.T, tolerance=1e-4)[:, :images]
    axes = torch.cat([logits, beyond], 1)
    off = features - features.mean(0)
    spread = float((off.square().sum(1).mean() / images).sqrt())
    along = off.double() @ logits
    values, turn = torch.linalg.eigh(along.T @ along / len(off))
    reach = spread * torch.eye(axes.shape[1], dtype=mean.dtype)
    reach[: len(values), : len(values)] = (turn * values.clamp_min(1e-4 * float(values[-1])).sqrt()).T
    return Puzzle(
        slopes=layer.weight @ axes @ reach.T,
        origin=layer.weight @ mean + layer.bias,
        reach=reach / spread,
        told=images * torch.cat([rest @ axes / spread, gradient.bias[:, None]], 1),
    )


def least_unusual(puzzle: Puzzle, *, start: Tensor, among: Tensor) -> Tensor:
    """The counts ``(classes,)`` of least :meth:`Puzzle.cost` within reach of ``start``, one label after another exchanged.

    Args:
        puzzle: of the gradient.
        start: ``(classes,)`` int64.
        among: ``(classes,)`` bool, the classes that may give and take labels.
    """
    loose = among.nonzero().flatten().tolist()
    best, known = start, {tuple(start.tolist()): puzzle.cost(start)}
    while True:
        near = []
        for less in loose:
            for more in loose:
                if less != more and best[less] > 0:
                    trial = best.clone()
                    trial[less] -= 1
                    trial[more] += 1
                    near.append(trial)
        for trial in near:
            if tuple(trial.tolist()) not in known:
                known[tuple(trial.tolist())] = puzzle.cost(trial)
        winner = min([best, *near], key=lambda one: known[tuple(one.tolist())])
        if winner is best:
            return best
        best = winner


def _rows(matrix: Tensor, *, tolerance: float) -> Tensor:
    """Orthonormal columns that span the rows of ``matrix``, the strongest first."""
    _, strength, across = torch.linalg.svd(matrix, full_matrices=False)
    found: Tensor = across[strength > tolerance * float(strength[0].clamp_min(1e-300))].T
    return found
