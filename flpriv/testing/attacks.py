"""Whether an attack keeps its contract, and whether it reads the evidence or only guesses well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flpriv.attack import Attack, ProtocolTrap
from flpriv.bands import band, is_band
from flpriv.capture import Capture
from flpriv.claim import Attribute, Claim, Estimate, Goal, Membership, PrivacyBound, Property, Reconstruction
from flpriv.errors import ThreatError
from flpriv.measures.bounds import one_run
from flpriv.measures.images import all_mse, psnr
from flpriv.measures.membership import auc
from flpriv.property import has
from flpriv.records import Records
from flpriv.secure_aggregation import Unmask
from flpriv.state import State
from flpriv.testing.federation import Glass, blindfold, glass, withhold
from flpriv.testing.plugins import check_plugin, global_seed, require, same
from flpriv.threat import Can, spell
from flpriv.truth import Truth

KINDS: Mapping[Goal, tuple[type[Claim], ...]] = {
    Goal.RECONSTRUCTION: (Reconstruction,),
    Goal.MEMBERSHIP: (Membership,),
    Goal.ATTRIBUTE: (Attribute, Estimate, Property),
    Goal.PRIVACY_BOUND: (PrivacyBound,),
}
MARGINS = {Goal.RECONSTRUCTION: 3.0, Goal.MEMBERSHIP: 0.1, Goal.ATTRIBUTE: 0.1, Goal.PRIVACY_BOUND: 0.1}
"""By how much :func:`score` must be better with the evidence than without: dB, AUC, accuracy, ε."""


def check_attack(attack: Attack, *, on: Glass | None = None, margin: float | None = None) -> tuple[float, float]:
    """Check an attack on a glass federation; returns its score with the evidence and blindfolded.

    It must be a frozen dataclass with documented options and name its paper; refuse without its capabilities, and run with
    those alone; give equal claims for equal seeds whatever the global random state; leave the capture as it was; claim what
    its goal says, in the right shapes; and do better than with noise for updates and untrained models. An active attack's
    trap must leave the honest model alone and be disarmed to its layers; one in secure aggregation must ask for both kinds of
    shares of some node, and of enough nodes for the sum. Five runs: give a slow attack fewer iterations.

    Args:
        attack: with the options to check it with.
        on: the federation; by default :func:`flpriv.testing.glass` for the attack's goal and, if it is active, its trap.
        margin: how much better the evidence must make it, in the unit of :func:`score`; by default ``MARGINS``.

    Raises:
        AssertionError: saying what is wrong.
    """
    name = check_plugin(attack, facts=("goal", "needs", "paper"))
    if on is None:
        on = glass(attack.goal, attack=attack)
    capture = on.capture
    _check_trap(attack, capture)
    _check_needs(attack, capture)
    before = {key: value.clone() for key, value in _tensors(capture)}
    with global_seed(1):
        claims = attack(capture, seed=1)
    with global_seed(2):
        again = attack(capture, seed=1)
    for key, value in _tensors(capture):
        require(same(value, before[key]), f"{name}: it alters the capture ({key})")
    require(_same_claims(claims, again), f"{name}: equal seeds give different claims; draw from rng alone")
    _check_claims(attack, claims, capture)
    sees = score(claims, on.truth)
    guesses = score(attack(blindfold(capture), seed=1), on.truth)
    least = MARGINS[attack.goal] if margin is None else margin
    require(sees >= guesses + least, f"{name}: no better than blindfolded: {sees:.3f} with the evidence, {guesses:.3f} without")
    return sees, guesses


def score(claims: Sequence[Claim], truth: Truth) -> float:
    """How right ``claims`` are: mean PSNR of each original's best reconstruction in dB, mean AUC, mean accuracy, or ε.

    Baselines among the claims are left out; an original or a value nothing is claimed about counts as missed.
    """
    if any(isinstance(claim, Reconstruction) for claim in claims):
        return _psnr([claim for claim in claims if isinstance(claim, Reconstruction)], truth)
    values = [_value(claim, truth) for claim in claims if not (isinstance(claim, Attribute | Estimate) and claim.baseline)]
    return sum(values) / len(values) if values else 0.0


def _psnr(claims: Sequence[Reconstruction], truth: Truth) -> float:
    best = []
    for (round, node), originals in truth.used.items():
        images = [claim.images.double() for claim in claims if (claim.round, claim.node) in ((round, node), (round, None))]
        claimed = torch.cat(images) if images else torch.empty(0)
        best.append(psnr(all_mse(claimed, originals.images.double()).amin(0)) if len(claimed) else torch.zeros(len(originals)))
    return float(torch.cat(best).clamp(max=100).mean())


def _value(claim: Claim, truth: Truth) -> float:
    if isinstance(claim, PrivacyBound):
        if truth.planted is None:
            raise ValueError("the truth of this federation names no canaries")
        return one_run(
            claim.scores.double().numpy(), truth.planted.included.numpy(), delta=claim.delta, confidence=claim.confidence
        )
    if isinstance(claim, Property):
        held, known = has(truth.used[claim.round, claim.node], claim.property)
        return float((claim.probability > 0.5) == (float(held.sum()) > claim.share * float(known.sum())))
    if truth.candidates is None or truth.members is None:
        raise ValueError("the truth of this federation names no candidates")
    if isinstance(claim, Membership):
        members = truth.members
        if claim.node is not None:
            sites = truth.candidates.attributes["site"]
            members = members & torch.tensor([site == truth.site_of[claim.node] for site in sites])
        return float(auc(claim.scores.double().numpy(), members.numpy()))
    if isinstance(claim, Attribute) and claim.attribute == "source":
        named = [truth.site_of.get(int(node), "") for node in claim.classes]
        guessed = torch.tensor([named[k] == site for k, site in _sources(claim, truth.candidates)])
        return float(guessed[truth.members].double().mean())
    if isinstance(claim, Estimate):
        known = torch.tensor([float(value) for value in truth.candidates.attributes[claim.attribute]], dtype=torch.float64)
        return 1 - float((known - claim.values).square().sum() / (known - known.mean()).square().sum())
    if isinstance(claim, Attribute):
        guesses = [claim.classes[place] for place in claim.probabilities.argmax(1).tolist()]
        true = [_named(value, claim.classes) for value in truth.candidates.attributes[claim.attribute]]
        return float(torch.tensor([guess == value for guess, value in zip(guesses, true, strict=True)]).double().mean())
    raise TypeError(f"{type(claim).__name__} has no score")


def _sources(claim: Attribute, candidates: Records) -> Iterator[tuple[int, str]]:
    """The place of the node guessed, and the true site, of each candidate."""
    return zip(claim.probabilities.argmax(1).tolist(), candidates.attributes["site"], strict=True)


def _named(value: str, classes: Sequence[str]) -> str:
    return band(value, classes) if all(map(is_band, classes)) else value


def _check_needs(attack: Attack, capture: Capture) -> None:
    """Every capability it needs is really asked for, and none besides those is taken for granted."""
    for can in attack.needs:
        try:
            attack(withhold(capture, capture.granted & ~can), seed=1)
        except ThreatError:
            continue
        raise AssertionError(f"{attack.name}: ran without {spell(can)!r}, which it needs")
    least = withhold(capture, attack.needs)
    try:
        claims = attack(least, seed=1)
    except Exception as error:
        raise AssertionError(f"{attack.name}: fails with no more than it needs ({spell(attack.needs)}): {error}") from error
    _check_claims(attack, claims, least)


def _check_trap(attack: Attack, capture: Capture) -> None:
    rng = torch.Generator().manual_seed(0)
    trap = attack.aim(capture.task, public=capture.public, candidates=capture.candidates, rng=rng)
    if trap is None:
        return
    require(Can.TAMPER in attack.needs, f"{attack.name}: it sets a trap, so it needs 'tamper'")
    honest = capture.task.build().state_dict()
    before = {key: value.clone() for key, value in honest.items()}
    armed = [
        trap.arm(honest, round=seen.round, node=seen.node or seen.nodes[0], nodes=seen.nodes) for seen in capture.observations
    ]
    require(all(same(honest[key], before[key]) for key in before), f"{attack.name}: its trap changes the honest model in place")
    if isinstance(trap, ProtocolTrap):
        _check_requests(attack.name, trap)
    sent = next((state for state in armed if state is not None), None)
    if sent is None and isinstance(trap, ProtocolTrap):
        return
    if sent is None:
        raise AssertionError(f"{attack.name}: its trap is never sent")
    require(
        sent.keys() != honest.keys() or any(not same(sent[key], honest[key]) for key in honest),
        f"{attack.name}: what its trap sends is the honest model",
    )
    try:
        attack.architecture(capture.task.build(), capture.task).load_state_dict(dict(sent))
    except RuntimeError as error:
        raise AssertionError(f"{attack.name}: its trap does not fit its own architecture: {error}") from error
    back = trap.disarm({key: value + 1 for key, value in sent.items()}, sent=sent, honest=honest)
    fits = back.keys() == honest.keys() and all(back[k].shape == v.shape and back[k].dtype == v.dtype for k, v in honest.items())
    require(fits, f"{attack.name}: disarmed updates must have the honest model's layers")


def _check_requests(name: str, trap: ProtocolTrap) -> None:
    """Four nodes that all share secrets, three shares to have one."""
    nodes, threshold = (11, 12, 13, 14), 3
    honest = {node: Unmask(alive=nodes, dropped=()) for node in nodes}
    asked = trap.unmask(honest, round=1, nodes=nodes, threshold=threshold)
    require(asked.keys() == honest.keys(), f"{name}: its trap must ask every node something")
    alive, dropped = (Counter(node for one in asked.values() for node in getattr(one, kind)) for kind in ("alive", "dropped"))
    require(all(alive[node] >= threshold for node in nodes), f"{name}: its trap leaves the round without a sum")
    require(any(dropped[node] >= threshold for node in nodes), f"{name}: what its trap asks opens no node")


def _check_claims(attack: Attack, claims: Sequence[Claim], capture: Capture) -> None:
    require(claims, f"{attack.name}: it claims nothing")
    expected = KINDS[attack.goal]
    for claim in claims:
        require(
            isinstance(claim, expected),
            f"{attack.name}: its goal asks for {' or '.join(kind.__name__ for kind in expected)}, "
            f"it claims {type(claim).__name__}",
        )
        for wrong in _faults(claim, capture):
            raise AssertionError(f"{attack.name}: {wrong}")


def _faults(claim: Claim, capture: Capture) -> Iterator[str]:
    count = 0 if capture.candidates is None else len(capture.candidates)
    if isinstance(claim, Reconstruction):
        images = claim.images
        if images.ndim < 2 or images.shape[1:] != capture.task.shape:
            yield f"images have shape {tuple(images.shape)}, expected (N, {', '.join(map(str, capture.task.shape))})"
        elif not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            yield "images must be finite floats in [0, 1]"
        if (claim.round, claim.node) not in _observed(capture):
            yield f"nothing was observed in round {claim.round} of node {claim.node}"
        for what in ("labels", "confidence"):
            column = getattr(claim, what)
            if column is not None and column.shape != (len(images),):
                yield f"{what} have shape {tuple(column.shape)} for {len(images)} images"
    elif isinstance(claim, Membership):
        if claim.scores.shape != (count,) or not bool(torch.isfinite(claim.scores).all()):
            yield f"scores must be {count} finite numbers, one per candidate"
        if claim.node is not None and claim.node not in capture.nodes:
            yield f"no node {claim.node} was observed"
    elif isinstance(claim, Attribute):
        rows = claim.probabilities
        if rows.shape != (count, len(claim.classes)):
            yield f"probabilities have shape {tuple(rows.shape)}, expected ({count}, {len(claim.classes)})"
        elif not bool((rows >= 0).all()) or not torch.allclose(rows.double().sum(1), torch.ones(count).double(), atol=1e-4):
            yield "rows of probabilities must be ≥ 0 and sum to 1"
    elif isinstance(claim, Estimate):
        if tuple(claim.values.shape) != (count,) or not bool(claim.values.isfinite().all()):
            yield f"estimates have shape {tuple(claim.values.shape)}, expected ({count},), all finite"
    elif isinstance(claim, Property):
        if (claim.round, claim.node) not in _observed(capture):
            yield f"nothing was observed in round {claim.round} of node {claim.node}"
        if not 0 <= claim.probability <= 1:
            yield f"probability {claim.probability} is not in [0, 1]"
    else:
        planted = 0 if capture.canaries is None else len(capture.canaries)
        if claim.scores.shape != (planted,) or not bool(torch.isfinite(claim.scores).all()):
            yield f"scores must be {planted} finite numbers, one per canary"
        if not 0 < claim.delta < 1 or not 0 < claim.confidence < 1:
            yield f"delta = {claim.delta} and confidence = {claim.confidence} must lie between 0 and 1"


def _observed(capture: Capture) -> set[tuple[int, int | None]]:
    """What images may be claimed about: each reply, each sum, and each node behind a sum."""
    behind = {(seen.round, node) for seen in capture.observations if seen.node is None for node in seen.nodes}
    return behind | {(seen.round, seen.node) for seen in capture.observations}


def _same_claims(one: Sequence[Claim], two: Sequence[Claim]) -> bool:
    def equal(a: Claim, b: Claim) -> bool:
        return type(a) is type(b) and all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))

    return len(one) == len(two) and all(map(equal, one, two))


def _tensors(capture: Capture) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a capture with a name for it."""

    def state(where: str, entries: State | Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"{where}.{key}", value) for key, value in entries.items())

    for place, seen in enumerate(capture.observations):
        yield from state(f"observation {place}.sent", seen.sent)
        yield from state(f"observation {place}.returned", seen.returned)
        if seen.labels is not None:
            yield f"observation {place}.labels", seen.labels
    for place, model in enumerate(capture.models):
        yield from state(f"model {place}", model)
    for name in ("public", "candidates", "exposed"):
        records: Records | None = getattr(capture, name)
        if records is not None:
            yield from ((f"{name}.images", records.images), (f"{name}.labels", records.labels))
    yield from state("secrets", capture.secrets)
    if capture.canaries is not None:
        held, seeds = capture.canaries.records, capture.canaries.seeds
        yield from state("canaries", {} if held is None else {"images": held.images, "labels": held.labels})
        yield from state("canaries", {} if seeds is None else {"seeds": seeds})
