"""Measures: where claims meet truth. Pure functions; every number with its interval, sample size and null.

Each goal has a module: :mod:`~flpriv.measures.reconstruction`, :mod:`~flpriv.measures.membership`,
:mod:`~flpriv.measures.attribute` (:mod:`~flpriv.measures.estimate` of numbers, :mod:`~flpriv.measures.source` where records are
traced to clients, and :mod:`~flpriv.measures.property` where claims are about updates), :mod:`~flpriv.measures.privacy`;
:mod:`~flpriv.measures.utility` says what the model is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from flpriv.claim import Attribute, Claim, Estimate, Goal, Membership, PrivacyBound, Property, Reconstruction
from flpriv.errors import ClaimError
from flpriv.finding import Finding
from flpriv.truth import Truth

C = TypeVar("C", Reconstruction, Membership, Attribute, Estimate, Property, PrivacyBound)


def measure(
    claims: Sequence[Claim], truth: Truth, *, attack: str, name: str, goal: Goal, setting: str, defense: str, seed: int = 0
) -> list[Finding]:
    """What an attack's claims amount to: a finding over all sites (``site`` empty) first, then one per site.

    Args:
        claims: at least one, all of the kind that ``goal`` asks for.
        truth: what the auditor knows.
        attack: label of the attack in the scenario.
        name: registered name of the attack.
        goal: decides the measure.
        setting: id of the federation it attacked.
        defense: label of the defence there.
        seed: of the bootstrap and of the public images drawn for nulls.

    Raises:
        ClaimError: for no claims, claims of another kind, or claims that do not fit the truth; says what is wrong.
    """
    from flpriv.measures import attribute, estimate, membership, privacy, property, reconstruction, source

    new = partial(Finding, attack=attack, name=name, goal=goal, setting=setting, defense=defense)
    match goal:
        case Goal.RECONSTRUCTION:
            return reconstruction.findings(_only(claims, Reconstruction, name), truth, new, seed=seed)
        case Goal.MEMBERSHIP:
            return membership.findings(_only(claims, Membership, name), truth, new)
        case Goal.ATTRIBUTE:
            if any(isinstance(claim, Property) for claim in claims):
                return property.findings(_only(claims, Property, name), truth, new)
            if any(isinstance(claim, Estimate) for claim in claims):
                return estimate.findings(_only(claims, Estimate, name), truth, new, seed=seed)
            guesses = _only(claims, Attribute, name)
            if all(guess.attribute == source.SOURCE for guess in guesses):
                return source.findings(guesses, truth, new, seed=seed)
            return attribute.findings(guesses, truth, new, seed=seed)
        case Goal.PRIVACY_BOUND:
            return privacy.findings(_only(claims, PrivacyBound, name), truth, new)


def _only(claims: Sequence[Claim], kind: type[C], name: str) -> list[C]:
    if not claims:
        raise ClaimError(f"{name} made no claim")
    found = [claim for claim in claims if isinstance(claim, kind)]
    if len(found) < len(claims):
        raise ClaimError(
            f"{name}: {len(claims) - len(found)} of {len(claims)} claims are not of type {kind.__name__}, which its goal asks for"
        )
    return found
