"""Time until a search is as good as plain gradient inversion ends, side by side in one process on one thread.

    python tests/benchmarks/inversion_speed.py [small CNN updates, 16] [ResNet18 updates, 2] [iterations of the plain one, 1000]

The plain one is inverting gradients written as simply as possible: one update at a time, one forward, one double backward, signed
Adam, total variation .01 (.001 on ResNet18). For each update its final PSNR is the goal. Ours is, first, ``layer-peeling``, which
every optimisation attack tries before it searches: its whole time counts, and if its image falls short of the goal, the plain
time on top. Second, the search that ``tuned-matching`` holds best for the model, alone: its clock stops at the first trial that
reaches the goal, and what the tuning costs once is not in it. Prints the ratios of times.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from flpriv.attacks.inversion import layer_peeling, tuned_matching
from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.stages import carry_out
from flpriv.attacks.inversion.tuning import shortened
from tests.benchmarks.inversion_cases import case, xrays


class Arrived(Exception):
    """The goal is reached."""


@dataclass(kw_only=True)
class Clock:
    """Stops the search when a trial reaches the goal; looking at the original costs no time that counts.

    Args:
        original: the image behind the update.
        goal: PSNR in dB.
        seconds: from the start to the goal.
        evaluations: likewise.
    """

    original: Tensor
    goal: float
    seconds: float = 0.0
    evaluations: int = 0

    def __post_init__(self) -> None:
        self._since = time.perf_counter()

    def see(self, images: Tensor) -> None:
        """One evaluation has been made of ``images``."""
        self.seconds += time.perf_counter() - self._since
        self.evaluations += 1
        if psnr(images, self.original) >= self.goal:
            raise Arrived
        self._since = time.perf_counter()


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean over a batch in dB."""
    return float((-10 * (images - originals).square().flatten(1).mean(1).log10()).mean())


def plain(model: nn.Module, images: Tensor, labels: Tensor, target: list[Tensor], *, tv: float, iterations: int) -> Tensor:
    """Inverting gradients, as simply as it can be written."""
    trial = images.clone().requires_grad_()
    adam = torch.optim.Adam([trial], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [iterations * eighths // 8 for eighths in (3, 5, 7)])
    for _ in range(iterations):
        gradient = torch.autograd.grad(cross_entropy(model(trial), labels), list(model.parameters()), create_graph=True)
        product = sum((a * b).sum() for a, b in zip(gradient, target, strict=True))
        norms = (
            torch.stack([(a * a).sum() for a in gradient]).sum().sqrt()
            * torch.stack([(b * b).sum() for b in target]).sum().sqrt()
        )
        smooth = trial.diff(dim=2).abs().mean() + trial.diff(dim=3).abs().mean()
        (slope,) = torch.autograd.grad(1 - product / norms + tv * smooth, trial)
        trial.grad = slope.sign()
        adam.step()
        schedule.step()
        trial.data.clamp_(0, 1)
    return trial.detach()


def ours(plan: Plan, evidence: Evidence, clock: Clock, *, seed: int) -> None:
    """Search until the clock stops it, or to the end."""
    shape = tuple(clock.original.shape)
    rng = torch.Generator().manual_seed(seed)
    try:
        carry_out(watched(plan, clock), [evidence], evidence.labels[None], shape=shape, rng=rng, what="speed", key={})
    except Arrived:
        return
    clock.seconds = float("inf")


def watched(plan: Plan, clock: Clock) -> Plan:
    """``plan`` with every evaluated trial shown to the clock."""
    from dataclasses import replace

    def look(images: Tensor) -> Tensor:
        clock.see(images.detach())
        return images.new_zeros(())

    then = watched(plan.then, clock) if plan.then is not None else None
    return replace(plan, regularisers=(*plan.regularisers, (0.0, look)), then=then)


def main() -> None:
    """Both models, one after the other."""
    torch.set_num_threads(1)
    small, deep, iterations = (int(sys.argv[i]) if len(sys.argv) > i else n for i, n in ((1, 16), (2, 2), (3, 1000)))
    compare("small CNN, 64 px, batch 1", "cnn", 64, "lbfgs", small, tv=0.01, iterations=iterations)
    compare("ResNet18, 32 px, batch 1", "resnet18", 32, "homotopy tv=0.001", deep, tv=0.001, iterations=iterations)


def compare(title: str, model: str, size: int, search: str, updates: int, *, tv: float, iterations: int) -> None:
    """Print the ratio of times over ``updates`` updates."""
    if not updates:
        return
    known = case(xrays(size), model=model, batch=1, updates=updates)
    plan = shortened(tuned_matching.plans(smooth=True)[search], 1000)
    rng, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    whole, reached, computed, goals, exact, steps, missed = 0.0, 0.0, 0.0, [], [], [], 0
    for node, seen in enumerate(known.capture.observations):
        evidence = gather(known.capture, seen, rng=rng, device=cpu, max_steps=1, max_images=1, who="speed")
        original = known.truth.used[1, node].images
        net = known.capture.task.build().eval()
        begin = torch.rand(original.shape, generator=rng)
        since = time.perf_counter()
        end = plain(net, begin, evidence.labels, list(evidence.target), tv=tv, iterations=iterations)
        slow = time.perf_counter() - since
        clock = Clock(original=original, goal=psnr(end, original))
        ours(plan, evidence, clock, seed=node)
        since = time.perf_counter()
        claim = layer_peeling.invert(known.capture, seen, rng=rng, iterations=400, restarts=0)
        peeled = time.perf_counter() - since
        exact.append(psnr(claim.images, original) if len(claim.images) else 0.0)
        computed += peeled + (slow if exact[-1] < clock.goal else 0.0)
        missed += clock.seconds == float("inf")
        whole, reached = whole + slow, reached + (clock.seconds if clock.seconds < float("inf") else slow)
        goals.append(clock.goal)
        steps.append(clock.evaluations)
        print(
            f"    update {node}: plain {clock.goal:.1f} dB in {slow:.1f} s, peeled {exact[-1]:.1f} dB in {peeled:.2f} s, "
            f"search there in {clock.seconds:.2f} s",
            flush=True,
        )
    print(
        f"{title}: {updates} updates, plain {iterations} iterations end at {sum(goals) / updates:.1f} dB in {whole:.1f} s; "
        f"peeled {sum(exact) / updates:.1f} dB in {computed:.1f} s: ratio {computed / whole:.3f}; search alone is there after "
        f"{sum(steps) / updates:.0f} evaluations and {reached:.1f} s: ratio {reached / whole:.3f}"
        + (f"; not reached in {missed}, which count as the plain time" if missed else "")
    )


if __name__ == "__main__":
    main()
