from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flpriv.errors import ClaimError
from flpriv.measures.guesses import MOST, draw
from flpriv.records import Records
from flpriv.truth import Truth


def records(images: Tensor, patients: tuple[str, ...] | None = None) -> Records:
    names = patients or tuple(f"p{i}" for i in range(len(images)))
    return Records(images=images, labels=torch.zeros(len(images), dtype=torch.long), ids=names, patients=names)


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_public_images_come_first_and_others_stand_in_for_them() -> None:
    everyone, public = records(noise(10)), records(noise(5, seed=1))
    known = draw(Truth(everyone=everyone, public=public), seed=0)
    assert (known.best_name, known.mean_name) == ("best of 5 public images", "mean public image")
    others = draw(Truth(everyone=everyone, public=public.take([])), seed=0)
    assert (others.best_name, others.mean_name) == ("best of 10 other patients' images", "mean of other patients' images")
    with pytest.raises(ClaimError, match="set patients aside"):
        draw(Truth(), seed=0)


def test_at_most_so_many_are_drawn_by_the_seed() -> None:
    public = records(noise(300))
    one, again, other = (draw(Truth(public=public), seed=seed) for seed in (1, 1, 2))
    assert len(one.drawn) == MOST
    assert one.drawn.ids == again.drawn.ids != other.drawn.ids


def test_the_nearest_is_offered_but_never_the_patients_own() -> None:
    everyone = records(noise(6), ("a", "a", "b", "c", "d", "e"))
    guesses = draw(Truth(everyone=everyone), seed=0)
    offered = guesses.nearest(everyone.images, everyone.patients)
    apart = (everyone.images[:, None] - everyone.images[None]).square().mean((2, 3, 4))
    apart[:2, :2] = apart[2, 2] = apart[3, 3] = apart[4, 4] = apart[5, 5] = torch.inf
    assert torch.equal(offered, everyone.images[apart.argmin(1)])


def test_the_mean_leaves_the_patient_out_and_is_black_where_nobody_is_left() -> None:
    everyone = records(noise(4), ("a", "a", "b", "c"))
    guesses = draw(Truth(everyone=everyone), seed=0)
    means = guesses.mean(("a", "c", "somebody"))
    assert torch.allclose(means[0], everyone.images[2:].mean(0), atol=1e-6)
    assert torch.allclose(means[1], everyone.images[:3].mean(0), atol=1e-6)
    assert torch.allclose(means[2], everyone.images.mean(0), atol=1e-6)
    assert not draw(Truth(everyone=everyone.take([0, 1])), seed=0).mean(("a",)).any()
