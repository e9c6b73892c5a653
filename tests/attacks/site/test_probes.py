from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flpriv.attacks.site.probes import head, logistic


def blobs(count: int, *, seed: int, apart: float = 3.0) -> tuple[Tensor, Tensor]:
    """Three classes, the first twenty times as frequent as the last."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.multinomial(torch.tensor([20.0, 10.0, 1.0]), count, replacement=True, generator=rng)
    codes[:6] = torch.tensor([0, 1, 2, 0, 1, 2])
    centres = apart * torch.eye(3, 8)
    return centres[codes] + torch.randn(count, 8, generator=rng), codes


def test_both_probes_find_what_is_there() -> None:
    known, codes = blobs(600, seed=0)
    asked, true = blobs(300, seed=1)
    trained = head(known, codes, asked, classes=3, epochs=20, seed=0)
    for guess, least in ((trained, 0.7), (logistic(known, codes, asked, classes=3), 0.9)):
        assert guess.shape == (300, 3)
        assert torch.allclose(guess.sum(1), torch.ones(300, dtype=torch.float64))
        assert float((guess.argmax(1) == true).double().mean()) > least
        assert float((guess.argmax(1) == 2)[true == 2].double().mean()) > 0.5


def test_both_probes_find_nothing_where_nothing_is() -> None:
    known, codes = blobs(600, seed=0, apart=0)
    asked, true = blobs(600, seed=1, apart=0)
    for guess in (head(known, codes, asked, classes=3, epochs=20, seed=0), logistic(known, codes, asked, classes=3)):
        assert float((guess.argmax(1) == true).double().mean()) < 0.66


def test_the_head_depends_on_its_seed_alone() -> None:
    known, codes = blobs(50, seed=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = head(known, codes, known, classes=3, epochs=2, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(head(known, codes, known, classes=3, epochs=2, seed=4), one)
    assert not torch.equal(head(known, codes, known, classes=3, epochs=2, seed=5), one)


def test_the_smallest_batches_still_have_two_records() -> None:
    for count in (2, 3, 129, 257):
        known = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
        assert head(known, torch.arange(count) % 2, known, classes=2, epochs=1, seed=0).isfinite().all()


def test_the_head_is_the_paper_s_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[nn.Sequential] = []
    optimizers: list[torch.optim.Adam] = []
    seen: list[tuple[int, Tensor]] = []

    class Kept(nn.Sequential):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            heads.append(self)

    class Counted(torch.optim.Adam):
        def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
            super().__init__(parameters, lr=lr)
            optimizers.append(self)

    def noted(logits: Tensor, codes: Tensor, *, weight: Tensor) -> Tensor:
        seen.append((len(codes), weight))
        return cross_entropy(logits, codes, weight=weight)

    monkeypatch.setattr("flpriv.attacks.site.probes.nn.Sequential", Kept)
    monkeypatch.setattr("flpriv.attacks.site.probes.torch.optim.Adam", Counted)
    monkeypatch.setattr("flpriv.attacks.site.probes.functional.cross_entropy", noted)
    known, codes = blobs(256, seed=0)
    head(known, codes, known, classes=3, epochs=20, seed=0)
    (made,), (adam,) = heads, optimizers
    assert [type(layer).__name__ for layer in made] == ["BatchNorm1d", "Dropout", "ReLU", "Linear"] * 2
    assert [layer.p for layer in made if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert [(layer.in_features, layer.out_features) for layer in made if isinstance(layer, nn.Linear)] == [(8, 32), (32, 3)]
    assert adam.param_groups[0]["lr"] == 1e-3
    assert [count for count, _ in seen] == [128] * 40
    assert torch.allclose(
        seen[0][1], torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=codes.numpy())).float()
    )
