"""Virtual sites: whole patients of one collection divided among hospitals that do not exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from flpriv.errors import DataError
from flpriv.seeds import derive
from flpriv.site import Entry

_DRAWS = 200


def divide(
    entries: Sequence[Entry], sites: int, *, how: Literal["iid", "dirichlet"], alpha: float = 0.5, seed: int = 0, least: int = 2
) -> list[tuple[Entry, ...]]:
    """Entries of ``sites`` virtual sites, never one patient at two.

    Args:
        entries: of one collection.
        sites: how many sites.
        how: ``"iid"`` deals patients out evenly, class by class and split by split, so that sites differ by a patient at most in
            each; ``"dirichlet"`` draws for each class what share each site gets.
        alpha: concentration of the Dirichlet draw, > 0; the smaller, the more the sites' classes differ.
        seed: of the draw.
        least: patients that every site must get; unlucky Dirichlet draws are repeated.

    Raises:
        DataError: if there are too few patients, or ``alpha`` leaves a site without.
    """
    groups = _groups(entries, seed)
    total = sum(len(patients) for by_split in groups for patients in by_split)
    if total < least * sites:
        raise DataError(f"{total} patients are too few for {sites} sites of at least {least}; lower sites.sites")
    if how == "iid":
        dealt = [patient for by_split in groups for patients in by_split for patient in patients]
        parts = [set(dealt[place::sites]) for place in range(sites)]
    else:
        parts = _dirichlet(groups, sites, alpha, seed, least)
    return [tuple(entry for entry in entries if entry.patient in part) for part in parts]


def _groups(entries: Sequence[Entry], seed: int) -> list[list[list[str]]]:
    """Patients by most frequent label and by split, each group in a shuffled order."""
    labels: dict[str, Counter[int]] = {}
    splits: dict[str, str] = {}
    for entry in entries:
        labels.setdefault(entry.patient, Counter())[entry.label] += 1
        splits.setdefault(entry.patient, entry.split)
    by_class: dict[int, dict[str, list[str]]] = {}
    for patient in sorted(labels, key=lambda name: derive(seed, "partition", name)):
        label = min(labels[patient], key=lambda value: (-labels[patient][value], value))
        by_class.setdefault(label, {}).setdefault(splits[patient], []).append(patient)
    return [[by_split[split] for split in sorted(by_split)] for _, by_split in sorted(by_class.items())]


def _dirichlet(groups: list[list[list[str]]], sites: int, alpha: float, seed: int, least: int) -> list[set[str]]:
    rng = np.random.default_rng(derive(seed, "dirichlet"))
    for _ in range(_DRAWS):
        parts: list[set[str]] = [set() for _ in range(sites)]
        for by_split in groups:
            ends = np.cumsum(rng.dirichlet([alpha] * sites))
            for patients in by_split:
                cuts = np.round(ends[:-1] * len(patients)).astype(int)
                for part, share in zip(parts, np.split(np.array(patients), cuts), strict=True):
                    part.update(share.tolist())
        if min(map(len, parts)) >= least:
            return parts
    raise DataError(
        f"alpha = {alpha} leaves a site with fewer than {least} patients in {_DRAWS} draws; raise alpha or lower sites"
    )
