"""What only the auditor knows. Attacks never import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flpriv.canary import Planted
from flpriv.records import Records


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """What a defence says it keeps to.

    Args:
        epsilon: ε ≥ 0.
        delta: δ in (0, 1).
    """

    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The facts claims are measured against.

    Args:
        used: ``(round, node)`` to the distinct records that node's local steps used, in order of first use.
        site_of: node to the name of its site, or of the node that an arrangement has in place of sites.
        members: ``(N,)`` bool: which candidates some site trained on.
        candidates: the candidates with ids, patients and attributes (``"site"`` tells whose each is).
        everyone: every record of every site, for re-identification.
        public: images of patients of no site, for the nulls.
        planted: the canaries and their coins, where there were some.
        claimed: site to the smallest epsilon that one of its defences claims after the last round; sites without are left out.
    """

    used: Mapping[tuple[int, int], Records] = field(default_factory=dict)
    site_of: Mapping[int, str] = field(default_factory=dict)
    members: Tensor | None = None
    candidates: Records | None = None
    everyone: Records | None = None
    public: Records | None = None
    planted: Planted | None = None
    claimed: Mapping[str, Claimed] = field(default_factory=dict)
