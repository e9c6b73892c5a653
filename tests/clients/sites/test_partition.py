"""Virtual sites are made of whole patients."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flpriv.clients.sites.partition import divide
from flpriv.errors import DataError
from flpriv.site import Entry, Split


def collection(patients: int, *, classes: int = 2, splits: tuple[Split | Literal[""], ...] = ("",)) -> list[Entry]:
    """Entries of ``patients`` patients, every third with two images."""
    return [
        Entry(id=f"{p}/{i}", patient=f"p{p}", label=p % classes, split=splits[p // classes % len(splits)])
        for p in range(patients)
        for i in range(1 + (p % 3 == 0))
    ]


@settings(max_examples=40, deadline=None)
@given(
    patients=st.integers(20, 80),
    sites=st.integers(1, 5),
    alpha=st.floats(0.3, 100),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_every_image_is_at_one_site_and_no_patient_at_two(
    how: Literal["iid", "dirichlet"], patients: int, sites: int, alpha: float, seed: int
) -> None:
    entries = collection(patients)
    parts = divide(entries, sites, how=how, alpha=alpha, seed=seed)
    assert sorted(e.id for part in parts for e in part) == sorted(e.id for e in entries)
    assert all(count == 1 for count in Counter(p for part in parts for p in {e.patient for e in part}).values())
    assert parts == divide(entries, sites, how=how, alpha=alpha, seed=seed)


def test_iid_sites_have_the_same_size_classes_and_splits() -> None:
    entries = collection(240, splits=("train", "train", "test"))
    parts = divide(entries, 4, how="iid")
    for kind in ("label", "split"):
        counts = [Counter(getattr(e, kind) for e in {e.patient: e for e in part}.values()) for part in parts]
        for value in counts[0]:
            assert max(c[value] for c in counts) - min(c[value] for c in counts) <= 2
    assert [len({e.patient for e in part}) for part in parts] == [60] * 4


def test_dirichlet_skews_classes_more_for_small_alpha() -> None:
    entries = collection(400)

    def skew(alpha: float) -> float:
        parts = divide(entries, 4, how="dirichlet", alpha=alpha, seed=3)
        shares = [sum(e.label for e in part) / len(part) for part in parts]
        return max(shares) - min(shares)

    assert skew(0.3) > 0.4 > 0.1 > skew(1000)


def test_another_seed_is_another_partition() -> None:
    entries = collection(60)
    assert divide(entries, 3, how="iid", seed=1) != divide(entries, 3, how="iid", seed=2)


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(DataError, match="5 patients are too few for 4 sites"):
        divide(collection(5), 4, how="iid")
    with pytest.raises(DataError, match=r"alpha = 0\.001 leaves a site with fewer than 2 patients"):
        divide(collection(40), 8, how="dirichlet", alpha=0.001)
