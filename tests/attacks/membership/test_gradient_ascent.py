from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.membership.gradient_ascent import AscentTrap, GradientAscent, turn
from flpriv.capture import Capture, Observation
from flpriv.claim import Membership
from flpriv.errors import CaptureError, FlprivError
from flpriv.measures.membership import auc, null_error
from flpriv.records import Records
from flpriv.state import State
from flpriv.sums import sums
from flpriv.task import Task
from flpriv.threat import Can

Federation = tuple[Capture, Tensor]
Training = tuple[Capture, Tensor]
ROUNDS = range(2, 7)


def step(task: Task, start: State, records: Records, *, seed: int) -> dict[str, Tensor]:
    """A site's 20 local steps of batches of 16."""
    model = task.build()
    model.load_state_dict(dict(start))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(20):
        rows = torch.randperm(len(records), generator=rng)[:16]
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(records.images[rows]), records.labels[rows]))
        optimizer.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def attacked(federation: Federation, attack: GradientAscent, *, rounds: Sequence[int] = ROUNDS) -> Capture:
    """The sites of a federation, trained again under the trap."""
    capture, owner = federation
    assert capture.candidates is not None
    trap = attack.aim(capture.task, public=None, candidates=capture.candidates, rng=torch.Generator())
    nodes = tuple(sorted(set(owner.tolist()) - {0}))
    models: list[State] = [capture.models[0]]
    seen = []
    for round in range(1, max(rounds) + 1):
        honest, replies = models[-1], []
        for node in nodes:
            armed = trap.arm(honest, round=round, node=node, nodes=nodes) if round in rounds else None
            sent = honest if armed is None else armed
            own = capture.candidates.take([i for i, of in enumerate(owner.tolist()) if of == node])
            returned = step(capture.task, sent, own, seed=round)
            label = "" if armed is None else attack.name
            seen.append(Observation(round=round, node=node, sent=sent, returned=returned, trap=label, nodes=nodes))
            replies.append(returned if armed is None else trap.disarm(returned, sent=sent, honest=honest))
        models.append({key: torch.stack([reply[key] for reply in replies]).mean(0) for key in honest})
    return replace(capture, granted=capture.granted | Can.TAMPER, observations=tuple(seen), models=tuple(models))


def claims(capture: Capture, attack: GradientAscent) -> list[Membership]:
    made = attack(capture)
    found = [claim for claim in made if isinstance(claim, Membership)]
    assert len(found) == len(made)
    return found


@pytest.fixture(scope="module")
def armed(federated: Federation) -> Capture:
    """Two sites under the trap in rounds 2 to 6."""
    return attacked(federated, GradientAscent())


def losses(capture: Capture, state: State) -> list[float]:
    assert capture.candidates is not None
    model = capture.task.build().double().eval()
    model.load_state_dict({key: value.double() for key, value in state.items()})
    logits = model(capture.candidates.images.double()).tolist()
    found = []
    for row, label in zip(logits, capture.candidates.labels.tolist(), strict=True):
        found.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    return found


def test_what_is_sent_is_a_step_up_the_mean_loss(federated: Federation) -> None:
    capture, _ = federated
    assert capture.candidates is not None
    honest = capture.models[-1]
    before = {key: value.clone() for key, value in honest.items()}
    trap = GradientAscent(gamma=0.3, groups=3).aim(
        capture.task, public=None, candidates=capture.candidates, rng=torch.Generator()
    )
    sent = trap.arm(honest, round=2, node=11, nodes=(11, 12))
    assert sent is not None
    assert trap.arm(honest, round=2, node=12, nodes=(11, 12)) is sent
    assert all(torch.equal(honest[key], value) for key, value in before.items())
    own = capture.candidates.take(range(1, 160, 3))
    model = capture.task.build().eval()
    model.load_state_dict(dict(honest))
    torch.autograd.backward(cross_entropy(model(own.images), own.labels))
    for key, value in model.named_parameters():
        assert value.grad is not None
        assert torch.allclose(sent[key], honest[key] + 0.3 * value.grad, atol=1e-6)
    other = trap.arm(capture.models[0], round=2, node=11, nodes=(11, 12))
    assert other is not None
    assert not torch.equal(other["fc.bias"], sent["fc.bias"])


def test_disarmed_updates_keep_what_was_learned(federated: Federation) -> None:
    capture, _ = federated
    assert capture.candidates is not None
    trap = AscentTrap(task=capture.task, targets=capture.candidates, gamma=0.1, groups=1)
    honest = capture.models[0]
    sent = trap.arm(honest, round=1, node=11, nodes=(11,))
    assert sent is not None
    back = trap.disarm({key: value + 1 for key, value in sent.items()}, sent=sent, honest=honest)
    assert all(torch.allclose(back[key], honest[key] + 1, atol=1e-6) for key in honest)


def test_scores_are_standardised_log_falls_in_plain_python(armed: Capture) -> None:
    _, node, _ = claims(armed, GradientAscent())
    expected = [0.0] * 160
    for seen in (o for o in armed.observations if o.node == 11 and o.trap):
        pairs = zip(losses(armed, seen.sent), losses(armed, seen.returned), strict=True)
        falls = [math.log(before) - math.log(after) for before, after in pairs]
        mean = sum(falls) / 160
        spread = math.sqrt(sum((fall - mean) ** 2 for fall in falls) / 160)
        expected = [total + (fall - mean) / spread / len(ROUNDS) for total, fall in zip(expected, falls, strict=True)]
    assert node.node == 11
    assert torch.allclose(node.scores, torch.tensor(expected, dtype=torch.float64), atol=1e-3)


def test_sites_give_their_members_away(armed: Capture, federated: Federation) -> None:
    owner = federated[1]
    overall, *nodes = claims(armed, GradientAscent())
    assert auc(overall.scores.numpy(), (owner > 0).numpy()) > 0.65
    for claim in nodes:
        own = owner.eq(claim.node or 0)
        asked = own | (owner == 0)
        assert auc(claim.scores[asked].numpy(), own[asked].numpy()) > 0.7


def test_a_sum_gives_members_of_the_federation_away(armed: Capture, federated: Federation) -> None:
    granted = armed.granted & ~Can.SEE_UPDATES
    (claim,) = claims(replace(armed, granted=granted, observations=sums(armed.observations)), GradientAscent())
    assert claim.node is None
    assert auc(claim.scores.numpy(), (federated[1] > 0).numpy()) > 0.65


def test_replies_that_are_noise_tell_nothing(armed: Capture, federated: Federation) -> None:
    rng = torch.Generator().manual_seed(1)
    start = armed.task.build(seed=5).state_dict()
    blind = tuple(
        replace(
            o, sent=start, returned={key: value + 0.05 * torch.randn(value.shape, generator=rng) for key, value in start.items()}
        )
        for o in armed.observations
    )
    overall, *_ = claims(replace(armed, observations=blind), GradientAscent())
    assert abs(auc(overall.scores.numpy(), (federated[1] > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_groups_take_turns_and_each_needs_a_round(federated: Federation) -> None:
    assert [turn(7, round=round, groups=3) for round in (1, 2, 3, 4)] == [[0, 3, 6], [1, 4], [2, 5], [0, 3, 6]]
    attack = GradientAscent(groups=2)
    capture = attacked(federated, attack, rounds=(2, 3))
    assert all(bool(claim.scores.isfinite().all()) for claim in claims(capture, attack))
    first = replace(capture, observations=tuple(o for o in capture.observations if o.round < 3))
    with pytest.raises(CaptureError, match="1 of 2 groups of candidates had no armed round"):
        attack(first)
    thinned = replace(capture, observations=tuple(o for o in capture.observations if (o.round, o.node) != (3, 11)))
    _, missed, _ = claims(thinned, attack)
    assert not missed.scores[::2].any()
    assert missed.scores[1::2].any()


def test_it_says_what_it_lacks(armed: Capture) -> None:
    with pytest.raises(FlprivError, match="0 candidates for 1 groups; grant 'know-candidates'"):
        GradientAscent().aim(armed.task, public=None, candidates=None, rng=torch.Generator())
    with pytest.raises(CaptureError, match="no reply to an armed model"):
        GradientAscent()(replace(armed, observations=armed.observations[:2]))
