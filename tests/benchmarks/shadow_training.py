"""How much faster shadow federations train side by side than one after another, and how long scoring takes.

    python tests/benchmarks/shadow_training.py [SHADOWS]

All ways train shadows of the 0.1M-parameter CNN on as many records in as many steps: one after another by the local loop of the
sites, with torch's default threads; the same by the leaner loop of the shadows, with all threads and with one; stacked into one
model by torch.func; and as flpriv does, in processes of one thread. What loses is measured on a quarter of the work, times four.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from flpriv import jobs, memory
from flpriv.attacks.membership.federation import Course, course, federate
from flpriv.attacks.membership.lira import LiRA
from flpriv.attacks.membership.references import Answers, logits
from flpriv.attacks.membership.rmia import RMIA
from flpriv.attacks.membership.shadows import Pool, pool, shadows
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import Can

TASK = Task(modality="xray", shape=(1, 32, 32), classes=("a", "b"), model="cnn", options={"width": 48})
RECIPE = LocalRecipe(lr=0.01, momentum=0.9, batch_size=16, epochs=4)


def noise(count: int, *, seed: int) -> Records:
    rng = torch.Generator().manual_seed(seed)
    return Records(images=torch.rand(count, *TASK.shape, generator=rng), labels=torch.randint(2, (count,), generator=rng))


def federation(*, candidates: int, rounds: int = 4) -> Capture:
    """Four sites of 100 records each, seen by a server."""
    start = TASK.build().state_dict()
    told = Observation(round=1, node=1, sent=start, returned=start, examples=100, local=RECIPE)
    seen = tuple(replace(told, round=round, node=node) for round in range(1, rounds + 1) for node in range(1, 5))
    granted = Can.SEE_FINAL | Can.SEE_MODELS | Can.KNOW_CANDIDATES | Can.KNOW_PUBLIC
    return Capture(
        granted=granted, task=TASK, observations=seen, models=(start,) * (rounds + 1), candidates=noise(candidates, seed=1),
        public=noise(100, seed=2),
    )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_the_sites_loop(capture: Capture, way: Course, on: Pool, count: int) -> None:
    for index in range(count):
        rows = on.halves(index, seed=0).nonzero()[:, 0]
        for _ in range(way.rounds):
            for own in rows.tensor_split(len(way.shares)):
                records = Records(images=on.images[own], labels=on.labels[own])
                train(TASK.build(seed=index), records, way.recipe, classes=len(TASK.classes), seed=index)


def in_turn(capture: Capture, way: Course, on: Pool, count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for index in range(count):
        rows = on.halves(index, seed=0)
        federate(TASK, way, Records(images=on.images[rows], labels=on.labels[rows]), start=capture.models[0], seed=index)


def stacked(way: Course, on: Pool, count: int) -> None:
    """As many steps of all shadows at once, by a vectorised gradient; averaging, which costs little, is left out."""
    states, buffers = stack_module_state([TASK.build(seed=index) for index in range(count)])
    weights = {key: value.detach() for key, value in states.items()}
    momentum = {key: torch.zeros_like(value) for key, value in weights.items()}
    bare = TASK.build()

    def loss(weights: dict[str, Tensor], rest: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(bare, (weights, rest), (images,)), labels)

    gradients = vmap(grad(loss))
    rows = torch.stack([on.halves(index, seed=0).nonzero()[:, 0] for index in range(count)])
    batch = RECIPE.batch_size
    steps = way.rounds * RECIPE.epochs * sum(-(-round(share * rows.shape[1]) // batch) for share in way.shares)
    for step in range(steps):
        drawn = rows.roll(-step * batch, 1)[:, :batch]
        found = gradients(weights, buffers, on.images[drawn], on.labels[drawn])
        for key, value in found.items():
            momentum[key].mul_(0.9).add_(value)
            weights[key].sub_(momentum[key], alpha=0.01)


def main(count: int = 16) -> None:
    capture, threads = federation(candidates=600), jobs.cores()
    way = course(capture, epochs=1)
    on = pool(capture, way, asked=True, who="benchmark")
    size = sum(parameter.numel() for parameter in TASK.build().parameters())
    print(f"{count} shadows of {size} parameters, {int(on.halves(0, seed=0).sum())} records, {threads} cores", flush=True)
    torch.set_num_threads(threads)
    took = {f"one after another, {threads} threads": seconds(lambda: by_the_sites_loop(capture, way, on, count))}
    some, short = max(1, count // 4), replace(way, rounds=way.rounds // 4)
    took[f"leaner loop, {threads} threads"] = seconds(lambda: in_turn(capture, way, on, some, threads)) * count / some
    took["leaner loop, 1 thread"] = seconds(lambda: in_turn(capture, way, on, some, 1)) * count / some
    torch.set_num_threads(1)
    took["stacked, 1 thread"] = seconds(lambda: stacked(short, on, count)) * 4
    torch.set_num_threads(threads)
    took["stacked, all threads"] = seconds(lambda: stacked(short, on, count)) * 4
    took["side by side"] = seconds(lambda: list(shadows(capture, way, on, count=count, seed=0)))
    base = next(iter(took.values()))
    for name, value in took.items():
        print(f"{name:32} {value:7.1f} s   {value / base:5.2f}", flush=True)
    tiny = replace(way, rounds=1, recipe=replace(RECIPE, steps=1))
    started = seconds(lambda: list(shadows(capture, tiny, on, count=2, seed=0)))
    print(f"of which starting processes {started:6.1f} s")
    many, model = federation(candidates=10_000), TASK.build().eval()
    memory.keep()
    scored = seconds(lambda: [logits(model, many.candidates.images) for _ in range(17) if many.candidates is not None])
    print(f"10,000 candidates by the attacked model and 16 shadows: {scored:.1f} s")
    answers = Answers(
        logits=torch.randn(17, 10_000, 2).double(), labels=torch.randint(2, (10_000,)), inside=torch.rand(16, 10_000) < 0.5
    )
    judged = seconds(lambda: (LiRA().score(answers, None), RMIA().score(answers, answers)))
    print(f"LiRA and RMIA from these: {judged:.2f} s")


if __name__ == "__main__":
    os.environ.pop("OMP_NUM_THREADS", None)
    main(*map(int, sys.argv[1:]))
