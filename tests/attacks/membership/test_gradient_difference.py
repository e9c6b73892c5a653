from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.membership.gradient_difference import GradientDifference, weight_of_a_record
from flpriv.capture import Capture, Observation
from flpriv.claim import Membership
from flpriv.errors import CaptureError
from flpriv.measures.membership import auc, null_error
from flpriv.recipe import LocalRecipe

Federation = tuple[Capture, Tensor]


def claims(capture: Capture) -> list[Membership]:
    made = GradientDifference()(capture)
    found = [claim for claim in made if isinstance(claim, Membership)]
    assert len(found) == len(made)
    return found


def gradient(capture: Capture, sent: dict[str, Tensor], row: int) -> list[float]:
    assert capture.candidates is not None
    model = capture.task.build().double().eval()
    model.load_state_dict(sent)
    image, label = capture.candidates.images[row].double(), capture.candidates.labels[row]
    torch.autograd.backward(cross_entropy(model(image[None]), label[None]))
    return [entry for p in model.parameters() if p.grad is not None for entry in p.grad.flatten().tolist()]


def one_step(capture: Capture, *, lr: float, batch: int) -> Observation:
    """A node that took one step on the first ``batch`` candidates."""
    assert capture.candidates is not None
    model = capture.task.build(seed=3).eval()
    sent = {key: value.clone() for key, value in model.state_dict().items()}
    own = capture.candidates.take(range(batch))
    torch.autograd.backward(cross_entropy(model(own.images), own.labels))
    returned = {key: sent[key] - lr * p.grad for key, p in model.named_parameters() if p.grad is not None}
    local = LocalRecipe(lr=lr, batch_size=batch, steps=1)
    return Observation(round=1, node=5, sent=sent, returned=returned, examples=batch, local=local)


@pytest.mark.parametrize("known", [True, False])
def test_scores_are_the_formula_in_plain_python(federated: Federation, known: bool) -> None:
    capture, _ = federated
    assert capture.candidates is not None
    seen = one_step(capture, lr=0.1, batch=4)
    seen = seen if known else replace(seen, local=None)
    _, node = claims(replace(capture, observations=(seen,)))
    sent = dict(seen.sent)
    own = [gradient(capture, sent, row) for row in range(4)]
    total = [sum(entries) for entries in zip(*own, strict=True)]
    if not known:
        squares = [sum(e * e for e in gradient(capture, sent, row)) for row in range(len(capture.candidates))]
        wanted = (4 * sum(squares) / len(squares)) ** 0.5
        length = sum(e * e for e in total) ** 0.5
        total = [e * wanted / length for e in total]
    for row in (0, 3, 50):
        g = gradient(capture, sent, row)
        expected = 2 * sum(a * b for a, b in zip(total, g, strict=True)) - sum(e * e for e in g)
        assert float(node.scores[row]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_taking_the_only_record_out_leaves_nothing(federated: Federation) -> None:
    capture, _ = federated
    seen = one_step(capture, lr=0.1, batch=1)
    _, node = claims(replace(capture, observations=(seen,)))
    squared = sum(e * e for e in gradient(capture, dict(seen.sent), 0))
    assert float(node.scores[0]) == pytest.approx(squared, rel=1e-4)
    assert int(node.scores.argmax()) == 0


def test_what_a_record_weighs_follows_from_the_recipe() -> None:
    base = Observation(round=1, node=1, sent={}, returned={}, examples=40, local=LocalRecipe(lr=0.1, batch_size=10, epochs=3))
    assert weight_of_a_record(base) == pytest.approx(0.1 * 3 / 10)
    steps = replace(base, local=LocalRecipe(lr=0.1, batch_size=10, steps=2))
    assert weight_of_a_record(steps) == pytest.approx(0.1 / 10)
    momentum = replace(base, local=LocalRecipe(lr=0.1, batch_size=20, epochs=1, momentum=0.5))
    assert weight_of_a_record(momentum) == pytest.approx(0.1 * (1.5 + 1) / 40)
    total = replace(base, node=None, nodes=(1, 2), examples=80)
    assert weight_of_a_record(total) == pytest.approx(0.1 * 3 / 10 / 2)
    for unknown in (replace(base, local=None), replace(base, examples=None), replace(base, local=LocalRecipe(optimizer="adam"))):
        assert weight_of_a_record(unknown) is None


def test_sites_give_their_members_away(overfit: Federation) -> None:
    capture, owner = overfit
    overall, *nodes = claims(capture)
    assert auc(overall.scores.numpy(), (owner > 0).numpy()) > 0.65
    assert [claim.node for claim in nodes] == [11, 12]
    for claim in nodes:
        asked = owner.eq(claim.node or 0) | (owner == 0)
        assert auc(claim.scores[asked].numpy(), owner[asked].bool().numpy()) > 0.65


def test_noise_for_updates_of_untrained_models_tells_nothing(federated: Federation) -> None:
    capture, owner = federated
    rng = torch.Generator().manual_seed(0)
    sent = capture.task.build(seed=8).state_dict()
    blind = tuple(
        replace(
            o, sent=sent, returned={key: value + 0.01 * torch.randn(value.shape, generator=rng) for key, value in sent.items()}
        )
        for o in capture.observations
    )
    overall, *_ = claims(replace(capture, observations=blind))
    assert abs(auc(overall.scores.numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_it_needs_candidates_and_usable_updates(federated: Federation) -> None:
    with pytest.raises(CaptureError, match="no candidates"):
        GradientDifference()(replace(federated[0], candidates=None))
    with pytest.raises(CaptureError, match="no usable update"):
        GradientDifference()(replace(federated[0], observations=()))
