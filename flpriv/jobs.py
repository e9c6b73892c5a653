"""Independent pieces of work side by side: one process per core, results in the order they were asked for."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from flpriv import memory
from flpriv.errors import RunError
from flpriv.progress import tell

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    what: str,
    name: Callable[[T], str],
    workers: int = 1,
    here: bool = False,
    ray: str = "",
) -> list[R]:
    """``[work(item) for item in items]``, by up to ``workers`` processes; in this one where that is 1 or there is one item.

    Workers share the cores' threads evenly, and end when this process dies. On Ray each item is a task of one core.

    Args:
        work: a function of a module, called with one item; what it raises is raised here, and nothing further is started.
        items: plain data.
        what: the whole, for progress.
        name: of one item, for progress.
        workers: at most this many processes.
        here: whether this process is one of them, and works while the others start.
        ray: address of a Ray cluster to work on instead, or ``"local"`` to start one here.

    Raises:
        RunError: if the cluster cannot be reached.
    """
    workers = min(workers, len(items))
    tell(what, 0, len(items))
    if ray and items:
        return _on_ray(work, items, what=what, name=name, address=ray)
    if workers <= 1:
        found = []
        for done, item in enumerate(items):
            found.append(work(item))
            tell(what, done + 1, len(items), name(item))
        return found
    threads = max(1, cores() // workers)
    context = multiprocessing.get_context("spawn")
    own: dict[int, R] = {}
    with ProcessPoolExecutor(workers - here, context, initializer=_start, initargs=(os.getpid(), threads)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            with _threads(threads) if here else nullcontext():
                for place in reversed(range(len(items))) if here else ():
                    if futures[place].cancel():
                        own[place] = work(items[place])
                        tell(what, len(own) + _finished(futures), len(items), name(items[place]))
            theirs = {future: item for future, item in zip(futures, items, strict=True) if not future.cancelled()}
            for done, future in enumerate(as_completed(theirs)):
                future.result()
                tell(what, len(own) + done + 1, len(items), name(theirs[future]))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return [own[place] if place in own else future.result() for place, future in enumerate(futures)]


def _finished(futures: Sequence[Future[R]]) -> int:
    """How many processes have done; what one of them raised is raised."""
    done = [future for future in futures if future.done() and not future.cancelled()]
    for future in done:
        future.result()
    return len(done)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads of torch in this process, as in a worker."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    memory.keep()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_ray(work: Callable[[T], R], items: Sequence[T], *, what: str, name: Callable[[T], str], address: str) -> list[R]:
    """Every item a task of one core; what one raises is raised here, and the others are cancelled."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    own = not ray.is_initialized()
    if own:
        try:
            where = None if address == "local" else address
            ray.init(address=where, num_cpus=cores() if where is None else None, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, OSError) as error:
            raise RunError(f"ray = {address!r}: no Ray cluster was reached ({error}); give its address or 'local'") from error
    try:
        task: Any = ray.remote(num_cpus=1)(_one_thread)
        names = {task.remote(work, item): name(item) for item in items}
        order, waiting = list(names), list(names)
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                for other in waiting:
                    ray.cancel(other)
                raise error.cause from None
            tell(what, len(items) - len(waiting), len(items), names[done])
        results: list[R] = ray.get(order)
        return results
    finally:
        if own:
            ray.shutdown()


def _one_thread(work: Callable[[T], R], item: T) -> R:
    import torch

    torch.set_num_threads(1)
    memory.keep()
    return work(item)


def _start(parent: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    memory.keep()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
