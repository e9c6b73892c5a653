"""Which of several plans brings back images the adversary knows: an attack rehearsed on public images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.simulation import known_images, simulate
from flpriv.cache import recall
from flpriv.capture import Capture
from flpriv.seeds import derive
from flpriv.state import fingerprint


def circumstances(evidence: Evidence, capture: Capture, *, seed: int) -> dict[str, Any]:
    """Plain data on which anything learned from simulated updates depends, but for the plan.

    The model sent, the recipe, what is known of defences and, of several images, labels, and the public images; nothing of the
    update itself.

    Raises:
        FlprivError: without public images.
    """
    public = known_images(capture, who="a learned prior")
    return {
        "task": asdict(capture.task),
        "sent": fingerprint(evidence.seen.sent),
        "recipe": asdict(evidence.site.recipe),
        "batches": evidence.site.batches,
        "labels": evidence.labels.tolist() if evidence.site.images > 1 else None,
        "defenses": evidence.seen.defenses,
        "public": fingerprint({"images": public.images, "labels": public.labels}),
        "seed": seed,
    }


def best(
    plans: Mapping[str, Plan],
    evidence: Evidence,
    capture: Capture,
    *,
    updates: int,
    key: Mapping[str, Any],
    seed: int = 0,
) -> str:
    """The name of the plan that brings public images back best, by mean squared error; kept in the cache; one needs no test.

    What a search reaches of its own objective says little where updates are noisy: it falls as the noise is fitted. Public
    images are known, so here the error itself can be looked at.

    Args:
        plans: by name.
        evidence: whose model, recipe and defences are simulated; its update is not looked at.
        capture: with public images.
        updates: simulated for each plan, the same for all.
        key: plain data that names the plans.
        seed: of everything.

    Raises:
        FlprivError: without public images.
    """

    def errors() -> dict[str, Tensor]:
        found = {}
        for name, plan in plans.items():
            rng = torch.Generator().manual_seed(derive(seed, "rehearsal"))
            pairs = simulate(plan, evidence, capture, updates=updates, rng=rng, what=f"rehearsal: {name}")
            found[name] = (pairs.found - pairs.images).square().mean()
        return found

    if len(plans) == 1:
        return next(iter(plans))
    known = circumstances(evidence, capture, seed=seed)
    found = recall("rehearsal", {**known, "plans": [*plans], "updates": updates, "plan": dict(key), "version": 1}, errors)
    return min(plans, key=lambda name: float(found[name]))
