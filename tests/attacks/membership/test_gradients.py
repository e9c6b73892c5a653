from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from flpriv.attacks.membership.gradients import alongside, claims, gradients, spread, usable
from flpriv.capture import Capture
from flpriv.records import Records
from flpriv.task import Task

Federation = tuple[Capture, Tensor]


def one_by_one(model: nn.Module, records: Records, update: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, products and squares by plain autograd, in float64."""
    cosines, products, squares = [], [], []
    for image, label in zip(records.images, records.labels, strict=True):
        model.zero_grad()
        torch.autograd.backward(cross_entropy(model(image[None]), label[None]))
        pairs = [(p.grad, update[key]) for key, p in model.named_parameters() if p.grad is not None]
        one, two = (torch.cat([part.double().flatten() for part in side]) for side in zip(*pairs, strict=True))
        cosines.append(cosine_similarity(one, two, dim=0))
        products.append(one @ two)
        squares.append(one @ one)
    return torch.stack(cosines), torch.stack(products), torch.stack(squares)


@pytest.mark.parametrize(
    ("model", "shape", "options"),
    [
        ("cnn", (1, 12, 12), {"width": 4}),
        ("cnn", (1, 8, 8, 8), {"width": 4}),
        ("resnet18", (1, 16, 16), {"widen": 0.125}),
        ("resnet18", (1, 8, 8, 8), {"widen": 0.125}),
    ],
)
def test_numbers_are_those_of_plain_autograd(model: str, shape: tuple[int, ...], options: dict[str, float]) -> None:
    task = Task(modality="x", shape=shape, classes=("a", "b", "c"), model=model, options=options, mean=0.4, std=0.3)
    net = task.build().eval()
    rng = torch.Generator().manual_seed(0)
    records = Records(images=torch.rand(5, *shape, generator=rng), labels=torch.tensor([0, 1, 2, 1, 0]))
    directions = [{key: torch.randn(p.shape, generator=rng) for key, p in net.named_parameters()} for _ in range(2)]
    found = gradients(net, records, directions)
    assert found.cosines.shape == (5, 2)
    for column, direction in enumerate(directions):
        cosines, products, squares = one_by_one(net, records, direction)
        assert torch.allclose(found.cosines[:, column], cosines, atol=1e-5)
        assert torch.allclose(found.products[:, column], products, rtol=1e-4, atol=1e-5 * float(found.lengths[column]))
        assert torch.allclose(found.squares, squares, rtol=1e-4)

    assert torch.equal(gradients(net, records).squares, found.squares)
    several = gradients(net, records, directions, chunk=2, at_once=True)
    assert torch.allclose(several.cosines, found.cosines, atol=1e-5)
    assert torch.allclose(several.squares, found.squares, rtol=1e-4)


def test_directions_over_some_layers_leave_the_others_out() -> None:
    net = Task(modality="x", shape=(1, 8, 8), classes=("a", "b"), model="cnn", options={"width": 4}).build().eval()
    records = Records(images=torch.rand(2, 1, 8, 8), labels=torch.tensor([0, 1]))
    bias = gradients(net, records, [{"fc.bias": torch.tensor([1.0, 0.0])}])
    error = torch.softmax(net(records.images), 1)[:, 0] - torch.tensor([1.0, 0.0])
    assert torch.allclose(bias.products[:, 0], error.double().detach(), atol=1e-6)
    assert torch.allclose(bias.squares, 2 * error.double().square().detach(), atol=1e-6)


def test_a_zero_gradient_has_cosine_zero() -> None:
    dense = nn.Linear(4, 2)
    dense.load_state_dict({"weight": torch.zeros(2, 4), "bias": torch.tensor([200.0, -200.0])})
    net = nn.Sequential(nn.Flatten(), dense)
    records = Records(images=torch.rand(1, 1, 2, 2), labels=torch.tensor([0]))
    found = gradients(net, records, [{"1.weight": torch.ones(2, 4), "1.bias": torch.ones(2)}])
    assert found.cosines.tolist() == [[0.0]]


def test_nodes_that_got_other_models_are_each_compared_at_their_own(federated: Federation) -> None:
    capture, _ = federated
    assert capture.candidates is not None
    first, second, *_ = capture.observations
    shifted = {key: value + 0.1 if key == "fc.bias" else value for key, value in second.sent.items()}
    moved = replace(second, sent=shifted, returned={k: v + second.returned[k] - second.sent[k] for k, v in shifted.items()})
    found = list(alongside(capture, [first, moved], chunk=8, who="it"))
    assert [one.seen for one in found] == [first, moved]
    model = capture.task.build().eval()
    for one in found:
        model.load_state_dict(dict(one.seen.sent))
        cosines, _, squares = one_by_one(model, capture.candidates, {key: -value for key, value in one.seen.update.items()})
        assert torch.allclose(one.cosines, cosines, atol=1e-5)
        assert torch.allclose(one.squares, squares, rtol=1e-4)


def test_rounds_are_spread_with_both_ends() -> None:
    assert spread(range(1, 11), 4) == [1, 4, 7, 10]
    assert spread([3, 5], 4) == [3, 5]
    assert spread(range(10, 0, -1), 1) == [10]


def test_usable_replies_are_honest_finite_and_moved(federated: Federation) -> None:
    capture, _ = federated
    first, *rest = capture.observations
    for bad in (replace(first, trap="imprint"), replace(first, returned=first.sent)):
        assert usable(replace(capture, observations=(bad, *rest)), most=9, who="it") == rest


def test_the_federation_is_scored_by_its_strongest_node() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([30.0, 10.0, 20.0])
    overall, one, two = claims({5: [a, a + 2], 6: [b]})
    assert (overall.node, one.node, two.node) == (None, 5, 6)
    assert torch.equal(one.scores, a + 1)
    assert torch.allclose(overall.scores, torch.tensor([1.0, 0.0, 1.0]))
    assert claims({None: [a]})[1:] == []
