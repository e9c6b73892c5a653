from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from flpriv.attacks.inversion.first_layer import descent
from flpriv.attacks.inversion.peeling import Network, network, peel
from flpriv.recipe import LocalRecipe
from flpriv.testing import blindfold

Make = Callable[..., Any]
NETS = Path(__file__).with_name("nets.py")


class Observer(Interpreter):
    """Keeps what every operation puts out."""

    def __init__(self, net: Network) -> None:
        super().__init__(net.graph)
        self.seen: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def peeled(done: Any) -> dict[str, float]:
    """How wrong each operation's output is that was told and does not say itself that it is doubtful."""
    (seen,), task = done.capture.observations, done.capture.task
    model = task.build().eval()
    model.load_state_dict(seen.sent)
    net = network(model, task.shape, images=len(done.used))
    assert net is not None
    moved = {name: value / seen.local.lr for name, value in descent(seen, [n for n, _ in model.named_parameters()]).items()}
    told = peel(net, moved, done.used.labels)
    observer = Observer(net)
    observer.run((done.used.images.double() - task.mean) / task.std)
    usual = median([one.error for one in told.values()]) if told else 0.0
    sure = {node: one.value for node, one in told.items() if one.error <= 10 * usual}
    return {node.name: float((value - (own := observer.seen[node])).norm() / own.norm()) for node, value in sure.items()}


def batch(images: int) -> LocalRecipe:
    return LocalRecipe(lr=0.1, batch_size=images, steps=1, train_mode=False)


@pytest.mark.parametrize(("images", "first"), [(1, "maxpool"), (3, "layer2_0_act")])
def test_a_resnet_is_peeled_to_its_first_layers(federate: Make, smooth: Make, images: int, first: str) -> None:
    done = federate(
        smooth(images, (1, 32, 32), labels=images), recipe=batch(images), model="resnet18", classes=10, mean=0.5, std=0.25
    )
    wrong = peeled(done)
    assert next(iter(wrong)) == first
    assert len(wrong) >= 12 and max(wrong.values()) < 1e-3


def test_a_trained_resnet_too(federate: Make, smooth: Make) -> None:
    before = smooth(16, (1, 32, 32), labels=10, seed=5)
    done = federate(smooth(2, (1, 32, 32)), recipe=batch(2), model="resnet18", classes=10, mean=0.5, std=0.25, before=before)
    wrong = peeled(done)
    assert len(wrong) >= 10 and max(wrong.values()) < 1e-2


@pytest.mark.parametrize(
    ("model", "options", "classes", "first"),
    [
        ("cnn", {}, 10, "act2"),
        (f"{NETS}:Functional", {"inputs": 256}, 3, "images"),
        (f"{NETS}:shallow", {"side": 16, "activation": "leaky"}, 2, "_1"),
    ],
    ids=["cnn", "functions", "leaky"],
)
def test_other_networks_as_far_as_they_tell(
    federate: Make, smooth: Make, model: str, options: dict[str, Any], classes: int, first: str
) -> None:
    images = min(2, classes - 1)
    done = federate(smooth(images), recipe=batch(images), model=model, options=options, classes=classes)
    wrong = peeled(done)
    assert next(iter(wrong)) == first
    assert max(wrong.values()) < 1e-3


def test_volumes(federate: Make, smooth: Make) -> None:
    done = federate(smooth(2, (1, 12, 12, 12)), recipe=batch(2), classes=4)
    assert peeled(done)["act2"] < 1e-4


def test_noise_ends_it_at_once(federate: Make, smooth: Make) -> None:
    done = federate(smooth(2), recipe=batch(2), classes=10)
    assert not peeled(replace(done, capture=blindfold(done.capture)))


class Deciding(nn.Module):
    """A model whose course depends on its inputs."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.mean() > 0 else -images


def test_what_cannot_be_traced_is_no_network() -> None:
    assert network(Deciding(), (1, 4, 4), images=1) is None
