"""What the inline engine costs over a bare PyTorch loop that trains, averages and evaluates the same.

Four hospitals with about 150 X-rays of 64 pixels each, the small CNN, two rounds of one epoch, one thread. Run it by itself:
``python tests/benchmarks/inline_overhead.py``. The shortest of several turns counts, taken alternately so that both meet the
same load; processor time says what a busy machine hides.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from flpriv import data
from flpriv.engine.config import RunConfig
from flpriv.engine.inline import CLIENT, SERVER, run_apps
from flpriv.registry import Plugin
from flpriv.scenario import Scenario, parse

SITES, ROUNDS, BATCH, RATE = 4, 2, 16, 0.05


def scenario(folder: Path) -> Scenario:
    """The federation of the benchmark."""
    return parse(
        {
            "sites": {"sites": SITES, "patients": 125, "split": {"test": 0.15, "public": 0}},
            "federation": {"rounds": ROUNDS, "local": {"batch_size": BATCH, "lr": RATE}},
        },
        root=folder,
    )


def bare(made: Scenario) -> None:
    """Train, average and evaluate without Flower."""
    model = data.task(made).build()
    mean: dict[str, Tensor] = {key: value.clone() for key, value in model.state_dict().items()}
    trains = [data.records(made, site, "train") for site in range(SITES)]
    tests = [data.records(made, site, "test") for site in range(SITES)]
    total = sum(map(len, trains))
    for _ in range(ROUNDS):
        states = []
        for records in trains:
            model.load_state_dict(mean)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            for rows in torch.split(torch.randperm(len(records)), BATCH):
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(records.images[rows]), records.labels[rows]))
                optimizer.step()
            states.append({key: value.clone() * (len(records) / total) for key, value in model.state_dict().items()})
        mean = {key: torch.stack([state[key] for state in states]).sum(0) for key in mean}
        model.load_state_dict(mean)
        model.eval()
        with torch.inference_mode():
            for records in tests:
                logits = torch.cat([model(images) for images in torch.split(records.images, 64)])
                functional.cross_entropy(logits, records.labels)


def inline(made: Scenario, folder: Path) -> None:
    """The same with both apps on the inline engine, without the wiretap."""
    config = RunConfig(scenario=made, setting=made.setting("none"), out=folder)
    client, server = (Plugin(kind="models", name="", target=f"{module}:app").load() for module in (CLIENT, SERVER))
    run_apps(client, server, nodes=SITES, run_config={**config.to_dict(), "wiretap": 0})


def measure(*, turns: int = 5) -> dict[str, float]:
    """Seconds of each way and their ratios, by the clock on the wall and by the processor's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = scenario(folder)
        ways: dict[str, Callable[[], None]] = {
            "bare": lambda: bare(made),
            "inline": lambda: inline(made, folder / "inline"),
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for work in ways.values():
            work()
        for _ in range(turns):
            for way, work in ways.items():
                taken[way].append(_timed(work))
        torch.set_num_threads(threads)
        found = {"images a site": sum(len(data.records(made, site, "train")) for site in range(SITES)) / SITES}
    for place, clock in enumerate(("wall", "processor")):
        best = {way: min(pair[place] for pair in pairs) for way, pairs in taken.items()}
        found |= {f"{way}, {clock} s": value for way, value in best.items()}
        found[f"inline / bare, {clock}"] = best["inline"] / best["bare"]
    return found


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
