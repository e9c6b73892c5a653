"""Small contracts: records, claims about captures, seeds, near names, progress, needs and traps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from flpriv.attack import Attack, Trap
from flpriv.capture import Capture, Observation
from flpriv.claim import Claim, Goal, Membership
from flpriv.errors import ThreatError, near
from flpriv.progress import listen, tell, track
from flpriv.records import Records
from flpriv.seeds import derive
from flpriv.state import State
from flpriv.task import Task
from flpriv.threat import Can

TASK = Task(modality="xray", shape=(1, 2, 2), classes=("a", "b"), model="cnn")


def records(count: int, **attributes: tuple[str, ...]) -> Records:
    return Records(
        images=torch.arange(count * 4.0).reshape(count, 1, 2, 2),
        labels=torch.arange(count) % 2,
        ids=tuple(f"r{i}" for i in range(count)),
        patients=tuple(f"p{i}" for i in range(count)),
        attributes=attributes,
    )


def test_records_are_taken_in_the_order_asked_for() -> None:
    taken = records(4, sex=("F", "M", "F", "")).take([2, 0, 2])
    assert taken.ids == ("r2", "r0", "r2")
    assert taken.attributes == {"sex": ("F", "F", "F")}
    assert taken.images[:, 0, 0, 0].tolist() == [8, 0, 8]
    assert len(records(4).take(torch.tensor([], dtype=torch.long))) == 0


def test_anonymous_records_keep_images_labels_and_what_is_named() -> None:
    known = records(2, sex=("F", "M"), site=("a", "b"))
    anonymous = known.anonymous(keep=["site"])
    assert (anonymous.ids, anonymous.patients, anonymous.attributes) == ((), (), {"site": ("a", "b")})
    assert anonymous.images is known.images
    assert anonymous.take([1]).ids == ()


def test_records_are_joined_with_what_some_lack_left_empty() -> None:
    joined = Records.concat([records(1, sex=("F",)), records(2, age=("60", "61"))])
    assert joined.ids == ("r0", "r0", "r1")
    assert joined.attributes == {"age": ("", "60", "61"), "sex": ("F", "", "")}
    with pytest.raises(ValueError, match="nothing"):
        Records.concat([])


def test_seeds_depend_on_every_part_and_fit() -> None:
    parts: list[tuple[object, ...]] = [(), (1,), ("a",), ("a", 1), ("a", 2), (1, "a")]
    found = [derive(3, *rest) for rest in parts]
    assert len({*found, derive(4)}) == len(parts) + 1
    assert all(0 <= seed < 2**63 for seed in found)
    assert derive(7, "site", 3) == 3101166859778709149, "the same on every machine and release"


def test_near_names() -> None:
    assert near("imprnt", ["imprint", "cnn"]) == "; did you mean 'imprint'?"
    assert near("xyz", ["b", "a"]) == "; known: a, b"
    assert near("xyz", []) == ""


def test_progress_reaches_a_listener_within_its_block_alone() -> None:
    heard: list[tuple[str, int, int | None, str]] = []
    tell("before", 1)
    with listen(lambda *told: heard.append(told)):
        assert list(track([5, 6], "work")) == [5, 6]
        tell("more", 1, 4, "note")
    tell("after", 1)
    assert heard == [("work", 1, 2, ""), ("work", 2, 2, ""), ("more", 1, 4, "note")]


@dataclass(frozen=True, kw_only=True)
class Draw(Attack):
    name: ClassVar[str] = "draw"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = ""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        return [Membership(scores=torch.rand(3, generator=rng, dtype=torch.float64))]


def drawn(granted: Can, seed: int) -> Tensor:
    (claim,) = Draw()(Capture(granted=granted, task=TASK), seed=seed)
    assert isinstance(claim, Membership)
    return claim.scores


def test_an_attack_is_refused_what_is_not_granted() -> None:
    with pytest.raises(ThreatError, match="draw needs 'know-candidates', which the threat model does not grant"):
        drawn(Can.SEE_UPDATES, 0)


def test_an_attack_is_random_by_its_seed_alone() -> None:
    granted = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    torch.manual_seed(0)
    first = drawn(granted, 1)
    torch.manual_seed(5)
    assert torch.equal(first, drawn(granted, 1))
    assert not torch.equal(first, drawn(granted, 2))


def test_an_attack_sends_nothing_of_its_own_unless_it_says_so() -> None:
    model = nn.Linear(2, 2)
    assert Draw().trap(TASK, public=None, rng=torch.Generator()) is None
    assert Draw().aim(TASK, public=None, candidates=None, rng=torch.Generator()) is None
    assert Draw().architecture(model, TASK) is model


class Wider(Trap):
    """Puts a layer in front and leaves the rest as it is."""

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        return {"lure": torch.zeros(3), **honest}


def test_a_disarmed_reply_carries_the_update_of_shared_layers() -> None:
    honest: dict[str, Tensor] = {
        "w": torch.ones(2),
        "bn.running_mean": torch.zeros(2),
        "bn.num_batches_tracked": torch.tensor(4),
        "resized": torch.ones(1),
    }
    trap = Wider()
    sent = {**(trap.arm(honest, round=1, node=1, nodes=(1,)) or {}), "resized": torch.ones(5)}
    returned = {key: value + 2 for key, value in sent.items()}
    given = trap.disarm(returned, sent=sent, honest=honest)
    assert given["w"].tolist() == [3, 3]
    assert {key: value.tolist() for key, value in given.items() if key != "w"} == {
        "bn.running_mean": [0, 0],
        "bn.num_batches_tracked": 4,
        "resized": [1],
    }
    assert honest["w"].tolist() == [1, 1]
    assert dict(trap.secrets) == {}


def test_an_observation_gives_the_update_of_parameters() -> None:
    sent = {"w": torch.ones(2), "bn.running_var": torch.ones(2)}
    returned = {"w": torch.full((2,), 3.0), "bn.running_var": torch.zeros(2)}
    seen = Observation(round=1, node=8, sent=sent, returned=returned)
    assert {key: value.tolist() for key, value in seen.update.items()} == {"w": [2, 2]}
    total = Observation(round=1, node=None, sent=sent, returned=returned)
    capture = Capture(granted=Can.SEE_UPDATES, task=TASK, observations=(total, seen), models=(sent, returned))
    assert capture.nodes == (8,)
    assert capture.final is returned
    with pytest.raises(ThreatError, match="holds no global model; grant 'see-final'"):
        _ = Capture(granted=Can.SEE_UPDATES, task=TASK).final
