"""Which outputs of a ReLU are on, from the gradient of the convolution under it."""

from __future__ import annotations

import torch
from torch import Tensor

from flpriv.attacks.inversion.patches import design, patches

_CHUNK = 1 << 15
_PROBES = 64
_OUTLIER = 6.0


def discover(slopes: Tensor, moved: Tensor, met: Tensor, *, inputs: int, bits: int) -> Tensor | None:
    """Switches ``(N, O, P)`` where nothing is known of what the ReLU puts out, as under global pooling.

    The gradient of the weights, ``(O, C·K)``, is of rank ``N·P``, and in the space of its columns each image has ``P`` that are
    its slopes with some of them off. Off or on at as many outputs as the rank, and the rest follows: every pattern is tried
    (the idea of Dimitrov et al. 2024, https://arxiv.org/abs/2403.03945, for known slopes). What the columns bring with them, the
    patches the convolution saw, overlap, which tells the position of each.

    Args:
        slopes: ``(N, O, P)`` were all switches on, the same at all positions of an image.
        moved: ``(O, C, K)`` gradient of the weights.
        met: ``(K, P)``, see :func:`flpriv.attacks.inversion.patches.meetings`.
        inputs: of one channel.
        bits: the largest rank to try.

    Returns:
        ``None`` where slopes differ between positions, the rank is another or too large, or columns or positions are not found.
    """
    images, outputs, positions = slopes.shape
    rank, flat = images * positions, moved.flatten(1)
    level = slopes.mean(2)
    if rank > min(bits, outputs, flat.shape[1]) or not torch.allclose(slopes, level[..., None], rtol=1e-6, atol=0):
        return None
    left, values, _ = torch.linalg.svd(flat, full_matrices=False)
    if not float(values[rank - 1]) > 1e-5 * float(values[0]) or (
        rank < len(values) and float(values[rank]) > 0.05 * float(values[rank - 1])
    ):
        return None
    on = []
    for own in level:
        clear = own.abs() > 0.05 * own.square().mean().sqrt()
        found = _binary(left[:, :rank] / own[:, None], clear, positions)
        if found is None:
            return None
        on.append(found)
    switches = torch.stack(on)
    columns = (switches * level[..., None]).transpose(0, 1).flatten(1)
    seen = torch.linalg.lstsq(columns, flat).solution.view(images, positions, *moved.shape[1:])
    for image in range(images):
        order = _arranged(seen[image], met, inputs)
        if order is None:
            return None
        switches[image] = switches[image][:, order]
    return switches


def _binary(space: Tensor, clear: Tensor, count: int) -> Tensor | None:
    """The ``count`` vectors of zeros and ones in the column ``space`` ``(O, R)``, ``(O, count)``, if they stand out as such.

    Only rows that are ``clear`` must be zero or one; a row divided by next to nothing is so by itself in some direction.
    """
    from scipy.linalg import qr

    rank, rows = space.shape[1], space[clear]
    order = torch.from_numpy(qr(rows.T.numpy(), pivoting=True, mode="r")[1].astype("int64"))
    follow = torch.linalg.inv(rows[order[:rank]])
    probes, found = (rows[order[rank : rank + _PROBES]] @ follow).T, []
    for first in range(1, 2**rank, _CHUNK):
        patterns = torch.arange(first, min(first + _CHUNK, 2**rank))
        chosen = ((patterns[:, None] >> torch.arange(rank)) & 1).to(space)
        found += list(chosen[_apart(chosen @ probes) < 0.1])
    if len(found) < count:
        return None
    whole = torch.stack(found) @ (space @ follow).T
    apart, best = _apart(whole[:, clear]).sort()
    if float(apart[count - 1]) > 0.1 or (len(apart) > count and float(apart[count]) < 3 * float(apart[count - 1])):
        return None
    columns: Tensor = whole[best[:count]].round().clamp(0, 1).T
    return columns


def _apart(values: Tensor) -> Tensor:
    return (values - values.round().clamp(0, 1)).abs().amax(1)


def _arranged(seen: Tensor, met: Tensor, inputs: int) -> Tensor | None:
    """``(P,)`` which of the patches ``(P, C, K)`` belongs at each position, so that they agree where they overlap."""
    positions = len(seen)
    close = 1e-2 * seen.square().mean().sqrt()
    order: list[int] = []

    def place(painted: Tensor) -> bool:
        position = len(order)
        if position == positions:
            return True
        at = met[:, position]
        known = painted[:, at]
        for candidate in range(positions):
            patch = seen[candidate]
            apart = torch.where(known.isnan(), 0.0, patch - known).square().mean().sqrt()
            if candidate in order or float(apart) > close:
                continue
            order.append(candidate)
            after = painted.clone()
            after[:, at[at > 0]] = patch[:, at > 0]
            if place(after):
                return True
            order.pop()
        return False

    blank = torch.full((seen.shape[1], inputs + 1), torch.nan, dtype=seen.dtype)
    blank[:, 0] = 0
    return torch.tensor(order) if place(blank) else None


def corrected(switches: Tensor, slopes: Tensor, moved: Tensor, met: Tensor, *, inputs: int) -> Tensor:
    """Switches ``(N, O, P)`` with those put right that the gradient of the weights contradicts.

    A wrong switch spoils the equations of its own output channel alone. The channels that fit worse than others by far are left
    out, the inputs solved for from the rest, and the slopes of those channels from the inputs. Unchanged where inputs or slopes
    are left open.

    Args:
        switches: as far as known.
        slopes: ``(N, O, P)`` were all switches on.
        moved: ``(O, C, K)`` gradient of the weights.
        met: ``(K, P)``.
        inputs: of one channel.
    """
    images, outputs, positions = slopes.shape
    channels, weights = moved.shape[1:]
    if images * inputs > outputs * weights or images * positions > channels * weights:
        return switches
    trusted = torch.ones(outputs, dtype=torch.bool)
    for _ in range(6):
        system = design(slopes * switches, met, inputs).view(outputs, weights, -1)
        wanted = moved.transpose(1, 2)
        solution = least_squares(system[trusted].flatten(0, 1), wanted[trusted].flatten(0, 1))
        if solution is None:
            return switches
        error = (system @ solution - wanted).square().mean((1, 2)).sqrt()
        wrong = error > _OUTLIER * error.median()
        if not bool(wrong.any()) or int(wrong.sum()) > outputs // 4:
            return switches
        trusted = ~wrong
        solution = least_squares(system[trusted].flatten(0, 1), wanted[trusted].flatten(0, 1))
        if solution is None:
            return switches
        saw = patches(solution.T.reshape(channels, images, inputs).transpose(0, 1), met)
        own = torch.linalg.lstsq(saw.permute(1, 2, 0, 3).reshape(channels * weights, -1), moved[wrong].flatten(1).T).solution
        estimated = own.T.view(-1, images, positions).transpose(0, 1)
        given = slopes[:, wrong]
        told = torch.where(given.abs() > 1e-9 * slopes.abs().max(), (estimated / given > 0.5).to(switches), switches[:, wrong])
        if torch.equal(told, switches[:, wrong]):
            return switches
        switches = switches.clone()
        switches[:, wrong] = told
    return switches


def least_squares(system: Tensor, wanted: Tensor) -> Tensor | None:
    """The solution of ``system @ x = wanted``; ``None`` where it leaves some of x open."""
    if system.shape[0] < system.shape[1]:
        return None
    factor, failed = torch.linalg.cholesky_ex(system.T @ system)
    pivots = factor.diagonal()
    if int(failed) or not float(pivots.min()) > 1e-5 * float(pivots.max()):
        return None
    solution = torch.cholesky_solve(system.T @ wanted, factor)
    return solution + torch.cholesky_solve(system.T @ (wanted - system @ solution), factor)
