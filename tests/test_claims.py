"""Claims and private files survive a round trip, and damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flpriv.claim import Attribute, Estimate, Membership, PrivacyBound, Property, Reconstruction
from flpriv.claims import Outcome, load_outcome, save_outcome
from flpriv.errors import CaptureError
from flpriv.files import private_folder, write_private


def outcome() -> Outcome:
    return Outcome(
        claims=(
            Reconstruction(images=torch.rand(3, 1, 4, 4), round=1, node=7, confidence=torch.rand(3)),
            Reconstruction(images=torch.rand(0, 1, 4, 4), round=2, node=None),
            Membership(scores=torch.rand(5, dtype=torch.float64), node=3),
            Attribute(
                attribute="site", classes=("a", "b"), probabilities=torch.rand(2, 2), probe="p", baseline="majority", repeat=2
            ),
            PrivacyBound(scores=torch.rand(6, dtype=torch.float64), delta=1e-6, confidence=0.9),
            Property(property="sex=F", share=0.5, round=2, node=7, probability=0.25),
            Estimate(attribute="age", values=torch.rand(4, dtype=torch.float64), probe="head", baseline="mean age", repeat=1),
        ),
        seconds=1.25,
    )


def test_round_trip(tmp_path: Path) -> None:
    save_outcome(tmp_path / "x", outcome_ := outcome())
    back = load_outcome(tmp_path / "x")
    assert back is not None
    assert back.status == "ok"
    assert back.seconds == 1.25
    assert [type(c) for c in back.claims] == [type(c) for c in outcome_.claims]
    first, _, membership, attribute, bound, property, estimate = back.claims
    assert isinstance(first, Reconstruction)
    assert isinstance(outcome_.claims[0], Reconstruction)
    assert torch.equal(first.images, outcome_.claims[0].images)
    assert first.node == 7
    assert first.labels is None
    assert isinstance(membership, Membership)
    assert membership.scores.dtype == torch.float64
    assert isinstance(attribute, Attribute)
    assert attribute.classes == ("a", "b")
    assert property == outcome_.claims[5]
    assert isinstance(estimate, Estimate)
    assert (estimate.values.dtype, estimate.baseline, estimate.repeat) == (torch.float64, "mean age", 1)
    saved = outcome_.claims[4]
    assert isinstance(bound, PrivacyBound)
    assert isinstance(saved, PrivacyBound)
    assert torch.equal(bound.scores, saved.scores)
    assert (bound.delta, bound.confidence) == (1e-6, 0.9)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_outcome(tmp_path) is None


def test_no_claims_at_all(tmp_path: Path) -> None:
    save_outcome(tmp_path, Outcome(status="failed", message="why"))
    back = load_outcome(tmp_path)
    assert back is not None
    assert (back.status, back.message, tuple(back.claims)) == ("failed", "why", ())


def test_damage_is_told_with_the_folder(tmp_path: Path) -> None:
    save_outcome(tmp_path, outcome())
    (tmp_path / "claims.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(CaptureError, match=str(tmp_path)):
        load_outcome(tmp_path)


def test_private_files_are_private_and_whole(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "b")
    assert folder.stat().st_mode & 0o777 == 0o700
    write_private(folder / "f", b"one")
    write_private(folder / "f", b"two")
    assert (folder / "f").read_bytes() == b"two"
    assert (folder / "f").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["f"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private(tmp_path / "f", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flpriv.files.os.fsync", full)
    with pytest.raises(CaptureError, match="No space left"):
        write_private(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
