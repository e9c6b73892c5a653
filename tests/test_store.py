"""Captures on disk: what is written reads back, what is not granted never reaches the disk, what is broken is told by name."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flpriv.capture import Observation
from flpriv.errors import CaptureError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import fingerprint
from flpriv.store import (
    Sink,
    StoredState,
    finished_rounds,
    open_capture,
    write_knowledge,
    write_labels,
    write_tensors,
)
from flpriv.task import Task
from flpriv.threat import NAMED, Can

TASK = Task(
    modality="ct",
    shape=(1, 4, 4, 4),
    classes=("no", "yes"),
    model="cnn",
    options={"channels": [8, 16]},
    mean=0.5,
    std=0.25,
    changes=(("dp-sgd", {"noise_multiplier": 1.0}),),
)
LOCAL = LocalRecipe(lr=0.1, steps=2, batch_size=4)
DEFENSES = (("gaussian", {"max_grad_norm": math.inf, "noise_multiplier": 0.0}), ("top-k", {"keep": 0.1}))
EVERYTHING = NAMED["malicious-server"] | Can.KNOW_LABELS
NODE = 2**64 - 3


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Not in alphabetical order, and of every kind of dtype models have."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "z.weight": torch.randn(3, 2, generator=rng),
        "a.weight": torch.randn(2, generator=rng).half(),
        "m.weight": torch.randn(2, generator=rng).bfloat16(),
        "bn.num_batches_tracked": torch.tensor(7 + seed),
        "empty": torch.zeros(0, 3),
    }


def observation(round: int = 1, node: int | None = 5, seed: int = 1, **options: object) -> Observation:
    facts = {"examples": 12, "metrics": {"loss": 0.5}, **options}
    return Observation(round=round, node=node, sent=state(0), returned=state(seed), **facts)  # type: ignore[arg-type]


def written(folder: Path, granted: Can = EVERYTHING, rounds: int = 2) -> Path:
    sink = Sink(folder, granted=granted, task=TASK, local=LOCAL, defenses=DEFENSES)
    sink.initial(state(10))
    for round in range(1, rounds + 1):
        sink.observe(observation(round, NODE, 3, trap="imprint", metrics={"loss": float("nan")}))
        sink.observe(observation(round, 5, 2))
        sink.finish_round(round, model=state(10 + round))
    sink.finish(state(10 + rounds))
    sink.keep({"bins": torch.arange(4.0)})
    return folder


def same(first: object, second: dict[str, torch.Tensor]) -> bool:
    assert isinstance(first, StoredState)
    return list(first) == list(second) and all(
        first[key].dtype == value.dtype and torch.equal(first[key], value) for key, value in second.items()
    )


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    capture = open_capture(written(tmp_path / "c"))
    assert (capture.granted, capture.task) == (EVERYTHING, TASK)
    assert [(seen.round, seen.node) for seen in capture.observations] == [(1, 5), (1, NODE), (2, 5), (2, NODE)]
    first, second = capture.observations[:2]
    assert same(first.sent, state(0))
    assert same(first.returned, state(2))
    assert same(second.returned, state(3))
    assert (first.examples, dict(first.metrics), first.local, first.trap, second.trap) == (
        12,
        {"loss": 0.5},
        LOCAL,
        "",
        "imprint",
    )
    assert first.defenses == second.defenses == DEFENSES
    assert second.metrics["loss"] != second.metrics["loss"]
    assert [model["bn.num_batches_tracked"].item() for model in capture.models] == [17, 18, 19]
    assert torch.equal(capture.secrets["bins"], torch.arange(4.0))
    assert finished_rounds(tmp_path / "c") == (1, 2)


def test_the_layout_reads_without_flpriv(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    facts = json.loads((folder / "capture.json").read_text())
    assert facts["format"] == 1
    assert "see-updates" in facts["granted"]
    row = json.loads((folder / "round-0001" / "round.json").read_text())["observations"][0]
    assert row["node"] == NODE
    assert row["metrics"] == {"loss": None}
    assert torch.equal(load_file(folder / "round-0001" / row["returned"])["z.weight"], state(3)["z.weight"])
    assert row["sent"] == f"sent-{fingerprint(state(0))}.safetensors"
    assert len(list(folder.rglob("sent-*"))) == 2


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    write_labels(folder, {(1, 5): torch.tensor([1, 0])})
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())
    assert not [path for path in modes if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (Can.SEE_UPDATES, ["node-*", "sent-*"]),
        (Can.SEE_MODELS, ["initial*", "global*"]),
        (Can.SEE_MODELS | Can.SEE_FINAL, ["initial*", "global*", "final*"]),
    ],
)
def test_what_is_not_granted_never_reaches_the_disk(missing: Can, gone: list[str], tmp_path: Path) -> None:
    whole, folder = written(tmp_path / "whole"), written(tmp_path / "c", EVERYTHING & ~missing)
    for pattern in gone:
        assert list(whole.rglob(pattern))
        assert not list(folder.rglob(pattern))


def test_the_local_recipe_is_stored_only_where_known(tmp_path: Path) -> None:
    folder = written(tmp_path / "c", EVERYTHING & ~Can.KNOW_LOCAL)
    assert json.loads((folder / "capture.json").read_text())["local"] is None
    assert all(seen.local is None for seen in open_capture(folder).observations)


def test_defences_are_stored_only_where_known(tmp_path: Path) -> None:
    folder = written(tmp_path / "c", EVERYTHING & ~Can.KNOW_DEFENSES)
    assert "top-k" not in (folder / "capture.json").read_text()
    assert all(seen.defenses is None for seen in open_capture(folder).observations)


def test_no_defence_is_not_the_same_as_an_unknown_one(tmp_path: Path) -> None:
    for defenses in ((), None):
        sink = Sink(tmp_path / str(defenses), granted=EVERYTHING, task=TASK, defenses=defenses)
        sink.observe(observation())
        sink.finish_round(1, model=state())
        assert [seen.defenses for seen in open_capture(sink.folder).observations] == [defenses]


def test_a_capture_from_before_defences_were_told_still_opens(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    facts = json.loads((folder / "capture.json").read_text())
    del facts["defenses"]
    (folder / "capture.json").write_text(json.dumps(facts))
    assert [seen.defenses for seen in open_capture(folder).observations] == [None] * 4


def test_the_last_model_alone(tmp_path: Path) -> None:
    capture = open_capture(written(tmp_path / "c", NAMED["model-user"]))
    assert len(capture.models) == 1
    assert same(capture.final, state(12))


def test_a_sum_over_clients_is_seen_with_the_models(tmp_path: Path) -> None:
    for granted, count in ((NAMED["sums-only"], 1), (NAMED["model-user"], 0)):
        sink = Sink(tmp_path / str(count), granted=granted, task=TASK)
        sink.observe(observation(1, None))
        sink.finish_round(1, model=state())
        seen = open_capture(tmp_path / str(count)).observations
        assert [one.node for one in seen] == [None] * count


def test_what_a_trap_opened_is_seen_by_who_tampers(tmp_path: Path) -> None:
    for granted, count in ((NAMED["malicious-sums-only"], 1), (NAMED["sums-only"], 0)):
        folder = tmp_path / str(count)
        sink = Sink(folder, granted=granted, task=TASK)
        sink.observe(observation(trap="opening", opened=True))
        sink.observe(observation(node=6))
        sink.finish_round(1, model=state())
        found = open_capture(folder).observations
        assert [(seen.node, seen.opened, seen.trap) for seen in found] == [(5, True, "opening")] * count


def records(n: int = 6) -> Records:
    columns = {"site": ("a",) * n, "sex": ("F",) * n, "age": ("61",) * n, "scanner": ("X",) * n}
    names = tuple(f"p{i}" for i in range(n))
    return Records(images=torch.rand(n, 1, 4, 4), labels=torch.arange(n) % 2, ids=names, patients=names, attributes=columns)


def test_side_knowledge_is_anonymous(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    for what in ("public", "candidates", "exposed"):
        write_knowledge(folder, what, records())
    capture = open_capture(folder)
    for held in (capture.public, capture.candidates, capture.exposed):
        assert held is not None
        assert len(held) == 6
        assert held.ids == held.patients == ()
    assert capture.public is not None
    assert capture.exposed is not None
    assert dict(capture.public.attributes) == {}
    assert set(capture.exposed.attributes) == {"site", "sex", "age"}
    assert b"p3" not in b"".join(path.read_bytes() for path in folder.rglob("*.json"))


def test_side_knowledge_that_is_not_granted_is_not_written(tmp_path: Path) -> None:
    folder = written(tmp_path / "c", Can.SEE_FINAL)
    before = sorted(folder.rglob("*"))
    write_knowledge(folder, "public", records())
    write_knowledge(folder, "exposed", records())
    write_labels(folder, {(1, 5): torch.tensor([1, 0])})
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("extra", "expected"), [(Can(0), [0, 1, 2]), (Can.KNOW_ORDER, [2, 0, 1])])
def test_labels_tell_their_order_only_where_granted(extra: Can, expected: list[int], tmp_path: Path) -> None:
    folder = written(tmp_path / "c", EVERYTHING | extra)
    write_labels(folder, {(1, NODE): torch.tensor([2, 0, 1])})
    seen = {(one.round, one.node): one.labels for one in open_capture(folder).observations}
    assert seen[1, 5] is None
    assert (found := seen[1, NODE]) is not None
    assert found.tolist() == expected


def test_tensors_stay_on_disk_until_they_are_looked_at(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "c", granted=EVERYTHING & ~Can.SEE_MODELS, task=TASK)
    big = {"w": torch.ones(10 * 2**20)}
    for node in range(4):
        sink.observe(Observation(round=1, node=node, sent=big, returned=big))
    sink.finish_round(1, model=big)
    del big

    def held() -> int:
        """Private memory in KiB: pages mapped from a file can be dropped at any time and do not count."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    before = held()
    capture = open_capture(tmp_path / "c")
    total = sum(float(one.returned["w"].sum()) for one in capture.observations)
    assert total == 40 * 2**20
    assert held() - before < 10 * 1024


def test_a_tensor_read_cannot_change_the_capture(tmp_path: Path) -> None:
    seen = open_capture(written(tmp_path / "c")).observations[0]
    seen.returned["z.weight"].zero_()
    assert same(seen.returned, state(2))


def test_a_stored_state_is_a_mapping_that_travels(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", state())
    stored = StoredState(tmp_path / "x.safetensors")
    assert same(copy.deepcopy(stored), state())
    assert len(stored) == 5
    assert "unknown" not in stored
    with pytest.raises(KeyError):
        stored["unknown"]


def test_tensors_that_share_memory_or_need_gradients_are_written(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    odd = {"a": base, "b": base[::2], "c": base.expand(2, 6), "d": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "x.safetensors", odd)
    assert same(StoredState(tmp_path / "x.safetensors"), odd)


def test_a_folder_that_holds_a_capture_is_not_written_over(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    with pytest.raises(CaptureError, match="holds a capture already; choose another folder, or resume"):
        Sink(folder, granted=EVERYTHING)
    Sink(folder, granted=EVERYTHING, task=TASK, resume=True)
    assert len(open_capture(folder).observations) == 4


def test_an_unfinished_round_is_left_out_and_removed(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    sink = Sink(folder, granted=EVERYTHING, task=TASK, resume=True)
    sink.observe(observation(3))
    assert finished_rounds(folder) == (1, 2)
    assert len(open_capture(folder).observations) == 4
    sink.discard_after(1)
    assert finished_rounds(folder) == (1,)
    assert not (folder / "round-0003").exists()


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Makes every write beyond so many bytes fail, as a full disk does."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_finished_rounds_survive(full_disk: Callable[[int], None], tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    sink = Sink(folder, granted=EVERYTHING, task=TASK, resume=True)
    full_disk(4096)
    with pytest.raises(CaptureError, match=r"node-5\.safetensors"):
        sink.observe(Observation(round=3, node=5, sent=state(), returned={"w": torch.zeros(9999)}))
    full_disk(resource.RLIM_INFINITY)
    assert len(open_capture(folder).observations) == 4
    assert not list(folder.rglob(".*"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptureError, match="file"):
        Sink(tmp_path / "file" / "c", granted=EVERYTHING)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def oversized(path: Path) -> None:
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")


def replaced(text: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.write_text(text)

    return replace


def edited(**facts: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return edit


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other_shape(path: Path) -> None:
    path.unlink()
    write_tensors(path, state() | {"z.weight": torch.zeros(4)})


ROW = {"node": 5, "sent": "../../secret", "returned": "node-5.safetensors", "examples": 1, "metrics": {}, "trap": ""}
BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("round-0001/node-5.safetensors", truncate, r"node-5\.safetensors: truncated"),
    "missing": ("round-0001/node-5.safetensors", Path.unlink, r"node-5\.safetensors: No such file"),
    "oversized header": ("round-0001/node-5.safetensors", oversized, r"node-5\.safetensors: a header of 1099511627776 bytes"),
    "foreign": ("round-0001/node-5.safetensors", replaced("PK\x03\x04 not one of ours"), r"node-5\.safetensors"),
    "link": ("round-0001/node-5.safetensors", linked, r"node-5\.safetensors: not a plain file"),
    "pipe": ("round-0001/node-5.safetensors", piped, r"node-5\.safetensors: not a plain file"),
    "other shape": ("round-0001/node-5.safetensors", other_shape, r"node-5\.safetensors: layer 'z\.weight' differs"),
    "half a round": ("round-0001/round.json", truncate, r"round\.json: not JSON"),
    "deep": ("round-0001/round.json", replaced("[" * 100_000), r"round\.json: not JSON"),
    "no rows": ("round-0001/round.json", replaced("{}"), r"round\.json: not as flpriv writes it"),
    "path": ("round-0001/round.json", edited(observations=[ROW]), r"'\.\./\.\./secret' is no file of a capture"),
    "newer": ("capture.json", edited(format=2), r"capture\.json: format 2 is newer than 1, .*update flpriv"),
    "capability": ("capture.json", edited(granted=["see-evrything"]), r"capture\.json: .*see-evrything"),
    "recipe": ("capture.json", edited(local={"lr": -1}), r"capture\.json: .*lr = -1"),
    "defences": ("capture.json", edited(defenses=[["top-k"]]), r"capture\.json: not as flpriv writes it"),
    "task": ("capture.json", edited(task={"shape": 3}), r"capture\.json: not as flpriv writes it"),
    "no task": ("capture.json", edited(task=None), "open it with a task"),
    "no capture": ("capture.json", Path.unlink, r"is not a capture: it has no capture\.json"),
    "not ours": ("capture.json", replaced("[]"), "not written by flpriv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_capture_is_told_by_file(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    file, harm, expected = BROKEN[name]
    harm(folder / file)
    with pytest.raises(CaptureError, match=expected):
        open_capture(folder)


def test_a_capture_does_not_decide_which_code_runs(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    facts = json.loads((folder / "capture.json").read_text())
    facts["task"]["model"] = "os:system"
    (folder / "capture.json").write_text(json.dumps(facts))
    with pytest.raises(CaptureError, match="'os:system' is code"):
        open_capture(folder)
    assert open_capture(folder, task=TASK).task == TASK


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_gives_the_documented_error_or_a_capture(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    if not folder.exists():
        written(folder, rounds=1)
        write_knowledge(folder, "exposed", records())
        write_labels(folder, {(1, 5): torch.tensor([1, 0])})
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    intact = file.read_bytes()
    place = data.draw(st.integers(0, len(intact) - 1))
    what = data.draw(st.binary(max_size=12))
    file.write_bytes(intact[:place] + what + intact[place + data.draw(st.integers(0, 12)) :])
    try:
        capture = open_capture(folder)
        [value for seen in capture.observations for value in seen.update.values()]
    except CaptureError as error:
        assert str(folder) in str(error)
    finally:
        file.write_bytes(intact)
