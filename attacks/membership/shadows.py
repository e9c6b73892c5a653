"""Shadow federations: the adversary trains models like the one it attacks, each on a known half of the records it asks about."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from flpriv import jobs
from flpriv.attacks.membership.federation import Course, federate
from flpriv.capture import Capture
from flpriv.errors import CaptureError
from flpriv.files import private_folder, write_private
from flpriv.records import Records
from flpriv.scratch import shared
from flpriv.seeds import derive
from flpriv.state import State, fingerprint
from flpriv.task import Task
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """One trained shadow.

    Args:
        state: its last global model.
        candidates: ``(N,)`` bool, which candidates it was trained on.
        public: ``(Z,)`` bool, which public images.
    """

    state: State
    candidates: Tensor
    public: Tensor


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What shadows are trained on.

    Candidates come first, then public images, then exposed ones, which every shadow is trained on since the attacked model was.

    Args:
        images: ``(N + Z + E, C, *spatial)``.
        labels: ``(N + Z + E,)``.
        candidates: N.
        public: Z.
        asked: whether candidates are trained on at all.
        filled: public images in each shadow.
    """

    images: Tensor
    labels: Tensor
    candidates: int
    public: int
    asked: bool
    filled: int

    def halves(self, index: int, *, seed: int) -> Tensor:
        """``(N + Z + E,)`` bool, what shadow ``index`` is trained on; shadows 2k and 2k + 1 are trained on opposite halves.

        Each pair halves the candidates anew; of the public images both take ``filled``, different ones while there are enough.
        """
        rng = torch.Generator().manual_seed(derive(seed, "halves", index // 2))
        rank, rank_public = (torch.randperm(count, generator=rng) for count in (self.candidates, self.public))
        if index % 2:
            rank, rank_public = self.candidates - 1 - rank, self.public - 1 - rank_public
        ours = (rank < (self.candidates + 1 - index % 2) // 2) & self.asked
        rest = torch.ones(len(self.labels) - self.candidates - self.public, dtype=torch.bool)
        return torch.cat([ours, rank_public < self.filled, rest])


def pool(capture: Capture, course: Course, *, asked: bool, who: str) -> Pool:
    """Candidates, public and exposed images; public ones fill a shadow up to as many records as the federation had.

    Args:
        capture: with candidates.
        course: tells how many records the federation had; where it does not, half of the public images are taken.
        asked: train on halves of the candidates; ``False`` takes halves of the public images and nothing else.
        who: for errors.

    Raises:
        CaptureError: where there is nothing to train on.
    """
    assert capture.candidates is not None
    candidates, public = capture.candidates, capture.public
    exposed = capture.exposed if asked else None
    z, fixed = len(public) if public is not None else 0, len(exposed) if exposed is not None else 0
    if not asked and z < 2:
        raise CaptureError(
            f"{who}: shadows on public images alone need public images, and the capture holds {z}; set sites.split.public > 0 "
            "or pool = 'candidates'"
        )
    wanted = z // 2 if course.examples is None else course.examples - len(candidates) // 2 - fixed
    parts = [part.anonymous() for part in (candidates, public, exposed) if part is not None]
    everything = Records.concat(parts)
    return Pool(
        images=everything.images,
        labels=everything.labels,
        candidates=len(candidates),
        public=z,
        asked=asked,
        filled=min(max(wanted, 0), z // 2) if asked else z // 2,
    )


def shadows(capture: Capture, course: Course, pool: Pool, *, count: int, seed: int, ray: str = "") -> Iterator[Shadow]:
    """Train ``count`` shadows side by side; those trained before, by any attack of the run, are read.

    There are as many processes of one thread as this process has threads: stacked into one model, shadows train slower than one
    after another (grouped convolutions), and threads within a small model get in each other's way on a machine that does
    anything else. Shadows start from the federation's first model where the adversary has seen it. Each is kept as soon as it
    is done.

    Args:
        capture: whose federation is repeated.
        course: how it was trained.
        pool: what on.
        count: how many, even for balanced halves.
        seed: of halves and training; equal seeds give equal shadows.
        ray: address of a Ray cluster that trains them (it must see the run's folder), ``"local"`` to start one here, or empty.

    Raises:
        CaptureError: if a kept shadow is damaged or a new one cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    start = capture.models[0] if Can.SEE_MODELS in capture.granted and len(capture.models) > 1 else None
    with _place(_key(capture.task, course, pool, start, seed)) as folder:
        held = folder / f"pool-{os.getpid()}.safetensors"
        orders = [
            _Order(folder=folder, pool=held, task=capture.task, course=course, index=index, seed=seed) for index in range(count)
        ]
        if not all(order.path.is_file() for order in orders):
            begin = {f"start.{key}": value.contiguous() for key, value in (start or {}).items()}
            halves = torch.stack([pool.halves(order.index, seed=seed) for order in orders])
            write_private(held, save({"images": pool.images, "labels": pool.labels, "halves": halves, **begin}))
            try:
                for wait in (False, True):
                    missing = [replace(order, wait=wait) for order in orders if not order.path.is_file()]
                    jobs.run(
                        _train, missing, what="shadow federations", name=str, workers=torch.get_num_threads(), here=True, ray=ray
                    )
            finally:
                held.unlink(missing_ok=True)
        for order in orders:
            inside = pool.halves(order.index, seed=seed)
            try:
                state = load(order.path.read_bytes())
            except (OSError, SafetensorError) as error:
                raise CaptureError(f"{order.path}: cannot be read ({error}); delete it and attack again") from error
            asked, rest = inside[: pool.candidates], inside[pool.candidates :]
            yield Shadow(state=state, candidates=asked, public=rest[: pool.public])


@dataclass(frozen=True, kw_only=True)
class _Order:
    """One shadow to train: plain data, so that another process can do it. ``wait`` for another attack that trains it already."""

    folder: Path
    pool: Path
    task: Task
    course: Course
    index: int
    seed: int
    wait: bool = False

    def __str__(self) -> str:
        return f"shadow {self.index + 1}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.index}.safetensors"


def _train(order: _Order) -> None:
    """Train it, unless somebody else does or did."""
    from filelock import FileLock, Timeout
    from safetensors.torch import load_file, save

    try:
        with FileLock(order.path.with_suffix(".lock"), timeout=-1 if order.wait else 0, mode=0o600):
            if order.path.is_file():
                return
            held = load_file(order.pool)
            rows = held["halves"][order.index]
            records = Records(images=held["images"][rows], labels=held["labels"][rows])
            start = {key.removeprefix("start."): value for key, value in held.items() if key.startswith("start.")}
            seed = derive(order.seed, "shadow", order.index)
            write_private(order.path, save(federate(order.task, order.course, records, start=start or None, seed=seed)))
    except Timeout:
        return


@contextmanager
def _place(key: str) -> Iterator[Path]:
    """Where the shadows of one key lie: in the run, or nowhere for long."""
    with ExitStack() as stack:
        base = shared() or Path(stack.enter_context(TemporaryDirectory(prefix="flpriv-")))
        yield private_folder(base / "shadows" / key)


def _key(task: Task, course: Course, pool: Pool, start: State | None, seed: int) -> str:
    facts: dict[str, Any] = {
        "task": asdict(task),
        "course": asdict(course),
        "pool": fingerprint({"images": pool.images, "labels": pool.labels}),
        "plan": [pool.candidates, pool.public, pool.asked, pool.filled],
        "start": fingerprint(start) if start else "",
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
