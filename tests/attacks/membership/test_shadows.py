from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from flpriv.attacks.membership import shadows as module
from flpriv.attacks.membership.federation import Course
from flpriv.attacks.membership.shadows import Pool, Shadow, pool, shadows
from flpriv.capture import Capture
from flpriv.errors import CaptureError
from flpriv.recipe import LocalRecipe
from flpriv.scratch import scratch
from flpriv.state import fingerprint

Federation = tuple[Capture, Tensor]
WAY = Course(shares=(0.5, 0.5), examples=100, rounds=1, recipe=LocalRecipe(lr=0.1, batch_size=16))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with scratch(tmp_path / "own", shared=tmp_path):
        yield tmp_path


def train(capture: Capture, *, count: int = 4, seed: int = 0, asked: bool = True, ray: str = "") -> list[Shadow]:
    own = pool(capture, WAY, asked=asked, who="test")
    return list(shadows(capture, WAY, own, count=count, seed=seed, ray=ray))


def test_pairs_are_trained_on_opposite_halves(known: Federation) -> None:
    found = train(known[0], count=6)
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(one.candidates, ~two.candidates)
        assert not bool((one.public & two.public).any())
    assert len({tuple(one.candidates.tolist()) for one in found}) == 6
    assert {int(one.candidates.sum()) for one in found} == {80}


def test_shadows_are_filled_up_to_the_size_of_the_federation(known: Federation) -> None:
    capture, _ = known
    assert capture.public is not None
    assert pool(capture, WAY, asked=True, who="test").filled == 100 - 80
    assert pool(capture, replace(WAY, examples=1000), asked=True, who="test").filled == len(capture.public) // 2
    assert pool(capture, replace(WAY, examples=10), asked=True, who="test").filled == 0
    exposed = capture.public.take(range(8))
    with_exposed = pool(replace(capture, exposed=exposed), WAY, asked=True, who="test")
    assert with_exposed.filled == 100 - 80 - 8
    assert bool(with_exposed.halves(3, seed=0)[-8:].all())


def test_public_images_alone(known: Federation) -> None:
    found = train(known[0], asked=False, count=2)
    assert not any(bool(one.candidates.any()) for one in found)
    assert [int(one.public.sum()) for one in found] == [30, 30]
    with pytest.raises(CaptureError, match="need public images"):
        pool(replace(known[0], public=None), WAY, asked=False, who="test")


def test_what_is_kept_is_not_trained_again(known: Federation, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(known[0], count=4)
    trained: list[int] = []
    work = module._train

    def counted(order: module._Order) -> None:
        trained.append(order.index)
        work(order)

    monkeypatch.setattr(module, "_train", counted)
    again = train(known[0], count=4)
    assert trained == []
    assert [fingerprint(one.state) for one in again] == [fingerprint(one.state) for one in first]
    (folder,) = (run / "shadows").iterdir()
    (folder / "2.safetensors").unlink()
    assert fingerprint(train(known[0], count=6)[2].state) == fingerprint(first[2].state)
    assert trained == [2, 4, 5]
    train(known[0], seed=1, count=2)
    assert trained == [2, 4, 5, 0, 1]


def test_no_image_is_left_behind_and_files_are_private(known: Federation, run: Path) -> None:
    train(known[0], count=2)
    (folder,) = (run / "shadows").iterdir()
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".lock") == ["0.safetensors", "1.safetensors"]
    assert {file.stat().st_mode & 0o077 for file in (folder, *folder.iterdir())} == {0}


def test_a_damaged_shadow_is_named(known: Federation, run: Path) -> None:
    train(known[0], count=2)
    (folder,) = (run / "shadows").iterdir()
    (folder / "1.safetensors").write_bytes(b"damaged")
    with pytest.raises(CaptureError, match=r"1\.safetensors: cannot be read .* delete it and attack again"):
        train(known[0], count=2)


def test_processes_and_this_one_train_the_same(known: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = train(known[0], count=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    both = train(known[0], count=2)
    for one, two in zip(alone, both, strict=True):
        assert all(torch.allclose(value, two.state[key], atol=1e-6) for key, value in one.state.items())


def test_a_shadow_that_another_attack_trains_is_waited_for(known: Federation, run: Path) -> None:
    """Its lock is held: the others are trained first, and this one is not trained twice."""
    first = train(known[0], count=4)
    (folder,) = (run / "shadows").iterdir()
    content = (folder / "1.safetensors").read_bytes()
    for index in range(4):
        (folder / f"{index}.safetensors").unlink()
    lock = FileLock(folder / "1.lock")
    with lock:
        done = ThreadPoolExecutor(1).submit(copy_context().run, train, known[0], count=4)
        while not all((folder / f"{index}.safetensors").is_file() for index in (0, 2, 3)):
            assert not done.done()
            time.sleep(0.05)
        assert not (folder / "1.safetensors").exists()
        (folder / "1.safetensors").write_bytes(content)
    assert [fingerprint(one.state) for one in done.result(60)] == [fingerprint(one.state) for one in first]


@pytest.mark.slow
def test_ray_trains_the_same(known: Federation) -> None:
    alone, on_ray = train(known[0], count=2), train(known[0], count=2, ray="local")
    for one, two in zip(alone, on_ray, strict=True):
        assert all(torch.allclose(value, two.state[key], atol=1e-6) for key, value in one.state.items())


def test_halves_of_odd_numbers_are_opposite_too() -> None:
    odd = Pool(images=torch.zeros(8, 1), labels=torch.zeros(8).long(), candidates=5, public=3, asked=True, filled=1)
    one, two = odd.halves(0, seed=3), odd.halves(1, seed=3)
    assert torch.equal(one[:5], ~two[:5])
    assert int(one[:5].sum()) == 3
