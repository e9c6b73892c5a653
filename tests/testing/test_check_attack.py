"""The suite lets honest attacks pass and names what is wrong with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import pytest
import torch

from flpriv.attack import Attack, ProtocolTrap, Trap
from flpriv.capture import Capture
from flpriv.claim import Attribute, Claim, Goal, Membership, Reconstruction
from flpriv.records import Records
from flpriv.secure_aggregation import Unmask
from flpriv.task import Task
from flpriv.testing import blindfold, check_attack, glass, score, withhold
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class Honest(Attack):
    """Divides the first dense layer's update by its bias's.

    Args:
        floor: smallest bias update looked at.
    """

    name: ClassVar[str] = "honest"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES
    paper: ClassVar[str] = "none"
    floor: float = 1e-9

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        claims = []
        for seen in capture.observations:
            weight, bias = seen.update["1.weight"], seen.update["1.bias"]
            live = bias.abs() > self.floor
            images = (weight[live] / bias[live, None]).reshape(-1, *capture.task.shape).clamp(0, 1)
            claims.append(Reconstruction(images=images, round=seen.round, node=seen.node))
        return claims


@dataclass(frozen=True, kw_only=True)
class Prior(Honest):
    """Offers public images and never looks at an update."""

    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_PUBLIC

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        assert capture.public is not None
        return [Reconstruction(images=capture.public.images, round=o.round, node=o.node) for o in capture.observations]


@dataclass(frozen=True, kw_only=True)
class Unseeded(Honest):
    """Draws from the global random state."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        claims = [c for c in super().run(capture, rng=rng) if isinstance(c, Reconstruction)]
        return [replace(c, images=(c.images + 1e-6 * torch.rand_like(c.images)).clamp(0, 1)) for c in claims]


@dataclass(frozen=True, kw_only=True)
class Careless(Honest):
    """Scales what it was given in place."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        claims = super().run(capture, rng=rng)
        capture.observations[0].returned["1.bias"].mul_(1.5)
        return claims


@dataclass(frozen=True, kw_only=True)
class Greedy(Honest):
    """Uses labels it does not ask for."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        if any(len(seen.labels) == 0 for seen in capture.observations):  # type: ignore[arg-type]
            return []
        return super().run(capture, rng=rng)


@dataclass(frozen=True, kw_only=True)
class Misshapen(Honest):
    """Claims flat images."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        claims = [c for c in super().run(capture, rng=rng) if isinstance(c, Reconstruction)]
        return [replace(c, images=c.images.reshape(-1, 1, 1, prod(capture.task.shape))) for c in claims]


@dataclass(frozen=True, kw_only=True)
class OffTopic(Honest):
    """Claims membership where its goal is reconstruction."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        return [Membership(scores=torch.zeros(3))]


@dataclass(frozen=True, kw_only=True)
class Silent(Honest):
    """Claims nothing."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        return []


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Honest):
    """Claims about a round nobody saw."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        claims = [c for c in super().run(capture, rng=rng) if isinstance(c, Reconstruction)]
        return [replace(c, round=77) for c in claims]


@dataclass(kw_only=True)
class Thawed(Attack):
    """Not frozen."""

    name: ClassVar[str] = "thawed"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES
    paper: ClassVar[str] = "none"

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        return []


@dataclass(frozen=True, kw_only=True)
class Undocumented(Honest):
    """Has an option nobody explains."""

    floor: float = 1e-9
    secret: int = 3


@dataclass(frozen=True, kw_only=True)
class Lenient(Honest):
    """Takes any option.

    Args:
        floor: smallest bias update looked at.
    """

    __pydantic_config__ = {"extra": "ignore"}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class Sourceless(Honest):
    """Names no paper.

    Args:
        floor: smallest bias update looked at.
    """

    paper: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class Requests(ProtocolTrap):
    """Names no node alive but the one that is asked, or asks what the protocol asks."""

    alone: bool

    def unmask(self, honest: Mapping[int, Unmask], *, round: int, nodes: Sequence[int], threshold: int) -> Mapping[int, Unmask]:
        return {node: Unmask(alive=(node,), dropped=one.alive) for node, one in honest.items()} if self.alone else honest


@dataclass(frozen=True, kw_only=True)
class Polite(Honest):
    """Sets a trap in secure aggregation that asks for what the protocol asks."""

    name = "polite"
    needs = Can.SEE_UPDATES | Can.TAMPER

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> Trap | None:
        return Requests(alone=False)


@dataclass(frozen=True, kw_only=True)
class Ruinous(Polite):
    """Sets a trap in secure aggregation that costs the round its sum."""

    name = "ruinous"

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> Trap | None:
        return Requests(alone=True)


def documented(cls: type[Any]) -> Attack:
    """An instance of ``cls`` with the docstring its inherited option needs."""
    cls.__doc__ = f"{cls.__doc__}\n\nfloor: smallest bias update looked at."
    attack: Attack = cls()
    return attack


def test_an_attack_that_reads_the_evidence_passes() -> None:
    sees, guesses = check_attack(Honest())
    assert sees > 60 and guesses < 20


@pytest.mark.parametrize(
    ("cls", "fault"),
    [
        (Prior, "no better than blindfolded"),
        (Unseeded, "equal seeds give different claims"),
        (Careless, r"alters the capture \(observation 0.returned.1.bias\)"),
        (Greedy, "fails with no more than it needs"),
        (Misshapen, "images have shape"),
        (OffTopic, "its goal asks for Reconstruction"),
        (Silent, "claims nothing"),
        (Elsewhere, "nothing was observed in round 77"),
        (Thawed, "frozen"),
        (Undocumented, "explain option 'secret'"),
        (Lenient, "a misspelt option must be refused"),
        (Sourceless, "class attribute 'paper'"),
        (Polite, "what its trap asks opens no node"),
        (Ruinous, "its trap leaves the round without a sum"),
    ],
)
def test_what_is_wrong_is_named(cls: type[Attack], fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_attack(documented(cls))


def test_the_glass_federation_is_seeded_and_real() -> None:
    one, two = glass(Goal.MEMBERSHIP), glass(Goal.MEMBERSHIP)
    assert all(torch.equal(one.capture.final[key], two.capture.final[key]) for key in one.capture.final)
    assert len(one.capture.nodes) == 3 and len(one.capture.models) == 5
    assert one.truth.members is not None and int(one.truth.members.sum()) == 72
    assert one.capture.candidates is not None and not one.capture.candidates.ids
    mean = {key: torch.stack([o.update[key] for o in one.capture.observations[:3]]).mean(0) for key in one.capture.final}
    for key, value in one.capture.models[1].items():
        assert torch.allclose(value, one.capture.models[0][key] + mean[key], atol=1e-6)


def test_one_step_of_the_glass_federation_is_one_gradient() -> None:
    made = glass(Goal.RECONSTRUCTION)
    seen = made.capture.observations[0]
    assert seen.local is not None and seen.node is not None and seen.labels is not None
    model = made.capture.task.build()
    model.load_state_dict(dict(seen.sent))
    records = made.truth.used[1, seen.node]
    loss = torch.nn.functional.cross_entropy(model(records.images), seen.labels)
    for (key, _), grad in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.allclose(seen.update[key], -seen.local.lr * grad, atol=1e-7)


def test_a_blindfold_hides_the_evidence_and_nothing_else() -> None:
    capture = glass(Goal.MEMBERSHIP).capture
    blind = blindfold(capture)
    for seen, hidden in zip(capture.observations, blind.observations, strict=True):
        for key, value in seen.update.items():
            noise = hidden.update[key].flatten()
            if len(noise) > 50:
                cosine = torch.nn.functional.cosine_similarity(noise, value.flatten(), dim=0)
                assert abs(float(cosine)) < 0.25
                assert float(noise.std()) == pytest.approx(float(value.square().mean().sqrt()), rel=0.3)
    assert not torch.equal(blind.final["1.weight"], capture.final["1.weight"])
    assert blind.candidates is capture.candidates and blind.exposed is capture.exposed


@pytest.mark.parametrize("kept", [Can.SEE_FINAL, Can.SEE_UPDATES, Can.KNOW_PUBLIC | Can.SEE_MODELS])
def test_withholding_leaves_what_is_granted(kept: Can) -> None:
    left = withhold(glass(Goal.MEMBERSHIP).capture, kept)
    assert left.granted == kept
    assert bool(left.observations) == bool(kept & (Can.SEE_UPDATES | Can.SEE_MODELS))
    assert all(o.node is None for o in left.observations) == (Can.SEE_UPDATES not in kept)
    assert len(left.models) == (1 if Can.SEE_FINAL in kept else 5 if Can.SEE_MODELS in kept else 0)
    assert (left.public is not None) == (Can.KNOW_PUBLIC in kept)
    assert left.candidates is None and all(o.labels is None and o.local is None for o in left.observations)
    assert all(o.defenses is None for o in left.observations)
    assert {
        o.defenses for o in withhold(glass(Goal.MEMBERSHIP).capture, kept | Can.SEE_UPDATES | Can.KNOW_DEFENSES).observations
    } == {()}


def test_scores() -> None:
    truth = glass(Goal.ATTRIBUTE).truth
    assert truth.members is not None and truth.candidates is not None
    assert score([Membership(scores=truth.members.double())], truth) == 1
    assert score([Membership(scores=torch.zeros(len(truth.members)))], truth) == 0.5
    sites = tuple(sorted(set(truth.candidates.attributes["site"])))
    right = torch.tensor([[float(site == name) for name in sites] for site in truth.candidates.attributes["site"]])
    claims = [Attribute(attribute="site", classes=sites, probabilities=right, probe="p")]
    claims.append(Attribute(attribute="site", classes=sites, probabilities=right.flip(1), probe="p", baseline="b"))
    assert score(claims, truth) == 1
    sure = torch.eye(3)[truth.candidates.labels]
    ages = Attribute(attribute="age", classes=("0-39", "40-59", "60+"), probabilities=sure, probe="p")
    assert score([ages], truth) == 1
    (key, originals), *_ = truth.used.items()
    perfect = Reconstruction(images=originals.images, round=key[0], node=key[1])
    assert score([perfect], truth) == pytest.approx(100 / len(truth.used))
