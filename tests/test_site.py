"""Splits go by patient, the same on every machine, and images are checked when they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flpriv.errors import DataError
from flpriv.site import Entry, Site, SplitPlan, load, split_patients


def entry(patient: str, image: int = 0, split: str = "", **attributes: str) -> Entry:
    return Entry(id=f"{patient}/{image}", patient=patient, label=image % 2, split=split, attributes=attributes)  # type: ignore[arg-type]


def site(name: str, *entries: Entry, image: object = None) -> Site:
    shown = np.full((1, 2, 2), 0.5) if image is None else image
    return Site(name=name, entries=entries, read=lambda _: shown)


def many(name: str, patients: int, images: int = 2) -> Site:
    return site(name, *(entry(f"{name}-{p}", i) for p in range(patients) for i in range(images)))


PLANS = st.builds(SplitPlan, test=st.floats(0, 0.5), public=st.floats(0, 0.4), seed=st.integers(0, 9))


@given(plan=PLANS, sizes=st.lists(st.integers(3, 30), min_size=1, max_size=4), images=st.integers(1, 3))
@settings(deadline=None)
def test_patients_are_never_torn_apart(plan: SplitPlan, sizes: list[int], images: int) -> None:
    sites = [many(f"s{i}", size, images) for i, size in enumerate(sizes)]
    assume(all(round(plan.test * size) + round(plan.public * size) < size for size in sizes))
    done = split_patients(sites, plan)
    splits: dict[str, set[str]] = {}
    for before, after in zip(sites, done, strict=True):
        assert [e.id for e in after.entries] == [e.id for e in before.entries]
        for e in after.entries:
            splits.setdefault(e.patient, set()).add(e.split)
        shares = [len({e.patient for e in after.select(split)}) for split in ("test", "public", "train")]
        patients = len({e.patient for e in before.entries})
        assert shares[:2] == [round(plan.test * patients), round(plan.public * patients)]
        assert sum(shares) == patients
    assert all(len(found) == 1 for found in splits.values())


def test_the_draw_depends_on_seed_and_patients_alone() -> None:
    first, again = many("a", 40), site("a", *reversed(many("a", 40).entries))

    def drawn(of: Site, seed: int) -> dict[str, str]:
        return {e.id: e.split for e in split_patients([of], SplitPlan(seed=seed))[0].entries}

    assert drawn(first, 1) == drawn(again, 1)
    assert drawn(first, 1) != drawn(first, 2)


def test_splits_the_source_gives_are_kept() -> None:
    given_split = site("a", entry("p", split="test"), entry("q", split="public"), entry("r", split="train"))
    assert split_patients([given_split], SplitPlan(test=0, public=0)) == (given_split,)


def test_a_patient_keeps_a_split_for_images_without_one_and_at_another_site() -> None:
    other = site("b", *(entry(f"b-{i}") for i in range(5)), entry("p", 2))
    done = split_patients([site("a", entry("p", 0, split="test"), entry("p", 1), entry("q", split="train")), other], SplitPlan())
    assert {e.split for s in done for e in s.entries if e.patient == "p"} == {"test"}


def test_a_patient_drawn_at_two_sites_is_in_one_split() -> None:
    shared = [entry(f"p{i}", 0) for i in range(20)]
    more = [Entry(id=f"more/{e.id}", patient=e.patient, label=0) for e in shared]
    for seed in range(5):
        plan = SplitPlan(test=0.4, public=0.2, seed=seed)
        done = split_patients([site("a", *shared[:12]), site("b", *more, *(entry(f"b{i}") for i in range(9)))], plan)
        splits: dict[str, set[str]] = {}
        for e in (e for s in done for e in s.entries):
            splits.setdefault(e.patient, set()).add(e.split)
        assert all(len(found) == 1 for found in splits.values())


def test_a_patient_in_two_splits_is_named() -> None:
    torn = site("b", entry("p", 1, split="test"), entry("q", split="train"))
    with pytest.raises(DataError, match=r"site 'b': patient 'p' is in two splits: 'p/0' in 'train', 'p/1' in 'test'; give all"):
        split_patients([site("a", entry("p", 0, split="train")), torn], SplitPlan())


def test_a_site_without_training_images_is_named() -> None:
    with pytest.raises(DataError, match=r"site 'a': no training image is left; lower sites\.split\.test"):
        split_patients([many("a", 2)], SplitPlan(test=0.9))


def test_load_gives_images_labels_and_attributes() -> None:
    north = site("North", entry("p", 0, "train", sex="F"), entry("q", 1, "train", age="60"), entry("r", 0, "test"))
    records = load(north, "train", shape=(1, 2, 2))
    assert records.images.shape == (2, 1, 2, 2)
    assert records.images.dtype == torch.float32
    assert records.labels.tolist() == [0, 1]
    assert (records.ids, records.patients) == (("p/0", "q/1"), ("p", "q"))
    assert records.attributes == {"site": ("North", "North"), "sex": ("F", ""), "age": ("", "60")}
    assert load(north, "public", shape=(1, 2, 2)).images.shape == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 3, 2)), r"has shape \(1, 3, 2\), expected \(1, 2, 2\)"),
        (np.full((1, 2, 2), np.nan), "holds NaN or infinite values"),
        (torch.full((1, 2, 2), -1000.0), r"has values from -1000 to -1000, not in \[0, 1\]"),
        (np.full((1, 2, 2), 255), r"has values from 255 to 255, not in \[0, 1\]"),
    ],
)
def test_an_image_of_another_kind_is_named(image: object, message: str) -> None:
    with pytest.raises(DataError, match=f"site 'North': image 'p/0' {message}"):
        load(site("North", entry("p", 0, "train"), image=image), "train", shape=(1, 2, 2))
