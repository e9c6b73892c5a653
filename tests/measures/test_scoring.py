from __future__ import annotations

import torch
from torch import Tensor

from flpriv.measures.guesses import draw
from flpriv.measures.images import mse, psnr, ssim
from flpriv.measures.scoring import assign, score
from flpriv.records import Records
from flpriv.truth import Truth


def noise(count: int, seed: int = 0, side: int = 24) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def records(images: Tensor, names: tuple[str, ...]) -> Records:
    return Records(images=images, labels=torch.zeros(len(images), dtype=torch.long), ids=names, patients=names)


def federation() -> Truth:
    a, b = records(noise(3), ("a0", "a1", "a2")), records(noise(2, seed=1), ("b0", "b1"))
    return Truth(
        used={(1, 7): a, (2, 8): b},
        site_of={7: "a", 8: "b"},
        everyone=Records.concat([a, b]),
        public=records(noise(9, seed=2), tuple(f"x{i}" for i in range(9))),
    )


def test_assignment_is_the_best() -> None:
    originals = noise(5)
    assert assign(originals[[3, 1, 4, 0, 2]], originals) == [(0, 3), (1, 1), (2, 4), (3, 0), (4, 2)]
    assert len(assign(originals[:2], originals)) == 2
    assert assign(originals[:0], originals) == []


def test_an_exact_reconstruction_is_never_given_to_another_original() -> None:
    grey = torch.linspace(0.2, 1, 5)[:, None, None, None].expand(5, 1, 8, 8)
    claimed = torch.cat([grey[:4], torch.zeros(1, 1, 8, 8)])
    assert assign(claimed, grey) == [(i, i) for i in range(5)]


def test_updates_are_matched_one_by_one_and_scored_together() -> None:
    truth = federation()
    a, b = truth.used[1, 7].images, truth.used[2, 8].images
    scored = score({(2, 8): [b.flip(0)], (1, 7): [a[2:], b]}, truth, draw(truth, seed=0))
    assert scored.matched.patient == ("a0", "a1", "a2", "b0", "b1")
    assert scored.matched.site == ("a", "a", "a", "b", "b")
    assert scored.matched.assigned.all()
    assert scored.found.psnr[2:].tolist() == [100.0] * 3
    assert scored.found.psnr[:2].max() < 20
    assert scored.rank.tolist()[2:] == [1, 1, 1]
    assert torch.equal(scored.found.ssim, ssim(scored.matched.best, scored.matched.originals))
    assert torch.equal(scored.guessed.psnr, psnr(mse(scored.guess, scored.matched.originals)))
    assert truth.public is not None
    mean = truth.public.images.mean(0).expand_as(scored.matched.originals)
    assert torch.allclose(scored.average.psnr, psnr(mse(mean, scored.matched.originals)))


def test_some_originals_taken_keep_their_rows() -> None:
    truth = federation()
    scored = score({(1, 7): [truth.used[1, 7].images]}, truth, draw(truth, seed=0))
    taken = scored.take([2, 0])
    assert len(taken) == 2
    assert taken.matched.patient == ("a2", "a0")
    assert torch.equal(taken.found.ms_ssim, scored.found.ms_ssim[[2, 0]])
    assert torch.equal(taken.matched.best, scored.matched.best[[2, 0]])
    assert torch.equal(taken.guess_rank, scored.guess_rank[[2, 0]])


def test_a_patient_nobody_knows_has_no_place() -> None:
    truth = federation()
    alone = Truth(used=truth.used, everyone=truth.used[2, 8], public=truth.public)
    scored = score({(1, 7): [truth.used[1, 7].images], (2, 8): [truth.used[2, 8].images]}, alone, draw(alone, seed=0))
    assert scored.rank.tolist() == [0, 0, 0, 1, 1]
