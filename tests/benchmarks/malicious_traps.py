"""How many images of a batch a crafted layer hands back, and what defences leave of that.

    python tests/benchmarks/malicious_traps.py [batches of each case, 5] [--defenses] [case ...]

Real chest X-rays, one gradient of an untrained model; a small CNN at 64 pixels where the case does not say otherwise. Prints the
share of images recovered at 30 dB or better, assigned one to one, with its 95 % interval over patients, beside the better of two
nulls (mean public image, best of 128 public images). With ``--defenses``, a table of the share left under each defence: clipping
is calibrated to the norm of honest updates of public images, and DP-SGD adds the noise of one step at an epsilon of 8.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from flpriv.attacks.malicious.crafted_layer import CraftedLayerAttack
from flpriv.attacks.malicious.qbi import QBI
from flpriv.attacks.malicious.trap_weights import TrapWeights
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.defense import Defense, Local
from flpriv.defenses.dp_sgd import DPSGD
from flpriv.defenses.gaussian import Gaussian
from flpriv.defenses.model_guard import ModelGuard
from flpriv.defenses.top_k import TopK
from flpriv.finding import Finding
from flpriv.measures import measure
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import State, add, difference, norm
from flpriv.task import Task
from flpriv.threat import NAMED
from flpriv.truth import Truth
from tests.benchmarks.inversion_cases import row, xrays

SHOWN = ("fraction at PSNR", "median PSNR")
Source = tuple[Records, Records]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the sites train and how many images a batch has.

    Args:
        batch: images behind one update.
        size: side of an image.
        model: of the task; ``options`` are its own.
    """

    batch: int
    size: int = 64
    model: str = "cnn"
    options: tuple[tuple[str, object], ...] = ()

    def task(self) -> Task:
        """The task of two classes."""
        shape = (1, self.size, self.size)
        return Task(modality="xray", shape=shape, classes=("a", "b"), model=self.model, options=dict(self.options))


Run = tuple[CraftedLayerAttack, Setting]
DENSE = ("flpriv.testing:dense_net", (("inputs", 4096), ("width", 512), ("classes", 2)))
MADE: Mapping[str, Callable[[int, int], CraftedLayerAttack]] = {
    "qbi": lambda neurons, batch: QBI(neurons=neurons, batch=batch),
    "qbi for half the batch": lambda neurons, batch: QBI(neurons=neurons, batch=batch // 2),
    "trap-weights": lambda neurons, batch: TrapWeights(neurons=neurons, batch=batch),
    "trap-weights, scale .95": lambda neurons, batch: TrapWeights(neurons=neurons, scale=0.95),
    "trap-weights, mic-dkfz": lambda neurons, batch: TrapWeights(neurons=neurons, variant="mic-dkfz"),
}
CASES: Mapping[str, Run] = {
    **{
        f"{name}, K={neurons}, batch {batch}": (make(neurons, batch), Setting(batch=batch))
        for batch in (8, 64)
        for neurons in (128, 512)
        for name, make in MADE.items()
    },
    "qbi in a dense net of 512, batch 64": (
        QBI(placement="parameters", batch=64),
        Setting(batch=64, model=DENSE[0], options=DENSE[1]),
    ),
    "trap-weights in a dense net of 512, batch 64": (
        TrapWeights(placement="parameters", batch=64),
        Setting(batch=64, model=DENSE[0], options=DENSE[1]),
    ),
}
LARGE: Mapping[str, Run] = {
    f"trap-weights, mic-dkfz, K={neurons}, batch 64, ResNet18, 224 px": (
        TrapWeights(neurons=neurons, variant="mic-dkfz"),
        Setting(batch=64, size=224, model="resnet18", options=(("stem_stride", 2),)),
    )
    for neurons in (128, 500)
}
"""Minutes each; run by name alone."""


def main() -> None:
    """Attack every case, or those named; or print the table of defences."""
    torch.set_num_threads(1)
    given = [argument for argument in sys.argv[1:] if argument != "--defenses"]
    batches = int(given[0]) if given else 5
    if "--defenses" in sys.argv:
        print_defenses(batches)
        return
    for name in given[1:] or CASES:
        attack, setting = {**CASES, **LARGE}[name]
        start = time.perf_counter()
        finding = attacked(attack, setting, batches=batches)
        shown = row(finding, SHOWN) if finding else "nothing was sent"
        print(f"{name}: {shown}; {(time.perf_counter() - start) / batches:.1f} s a batch", flush=True)


def attacked(attack: CraftedLayerAttack, setting: Setting, *, batches: int, defense: Defense | None = None) -> Finding | None:
    """What comes of the attack on so many batches, each of other images; ``None`` where every site refuses."""
    private, public = images(setting.size)
    task = setting.task()
    seen, used = [], {}
    for node in range(batches):
        own = private.take(range(node * setting.batch, (node + 1) * setting.batch))
        reply = trained(attack, task, own, public=public, node=node, defense=defense)
        if reply is not None:
            seen.append(reply)
            used[1, node] = own
    if not seen:
        return None
    capture = Capture(granted=NAMED["malicious-server"], task=task, observations=tuple(seen), public=public)
    truth = Truth(used=used, everyone=private, public=public)
    return measure(
        attack(capture), truth, attack=attack.name, name=attack.name, goal=attack.goal, setting="none", defense="none"
    )[0]


def trained(
    attack: CraftedLayerAttack, task: Task, own: Records, *, public: Records, node: int, defense: Defense | None
) -> Observation | None:
    """The reply to the trap of a site that holds all private images, or ``None`` where it refuses."""
    honest = task.build().state_dict()
    trap = attack.trap(task, public=public, rng=torch.Generator().manual_seed(node))
    armed = trap.arm(honest, round=1, node=node, nodes=(node,))
    assert armed is not None
    sent = {key: value.clone() for key, value in armed.items()}
    local = Local(
        site="site", round=1, rng=torch.Generator().manual_seed(node), task=task, records=lambda: images(task.shape[-1])[0]
    )
    if defense is not None and defense.inspect(sent, local=local) is not None:
        return None
    recipe = LocalRecipe(lr=0.1, steps=1, batch_size=len(own), train_mode=False)
    update = step(attack, task, sent, own, recipe, defense=defense, local=local, seed=node)
    update = defense.protect(update, local=local) if defense is not None else update
    return Observation(
        round=1,
        node=node,
        sent=sent,
        returned=add(sent, update),
        examples=len(own),
        local=recipe,
        trap=attack.name,
        nodes=(node,),
    )


def step(
    attack: CraftedLayerAttack | None,
    task: Task,
    sent: State,
    own: Records,
    recipe: LocalRecipe,
    *,
    defense: Defense | None,
    local: Local,
    seed: int,
) -> State:
    """A site's update from ``sent``."""
    model = task.build() if attack is None else attack.architecture(task.build(), task)
    model.load_state_dict(dict(sent))
    prepare = None if defense is None else lambda loop: defense.prepare(loop, local=local)
    train(model, own, recipe, classes=2, seed=seed, prepare=prepare)
    return difference({key: value.detach() for key, value in model.state_dict().items()}, sent)


def print_defenses(batches: int) -> None:
    """Shares recovered at batch 8 and K = 512 under each defence, and in larger batches without any.

    Under noise and clipping also with a thousandfold ``carry``, which is how an operator who expects them would set the trap.
    """
    setting = Setting(batch=8)
    clip = honest_norm(setting)
    noise = {f"gaussian, C = {clip:.2g}, z = {z:g}": Gaussian(max_grad_norm=clip, noise_multiplier=z) for z in SWEEP}
    defenses: Mapping[str, Defense | None] = {
        "none": None,
        "model-guard": ModelGuard(),
        **noise,
        "top-k, 10 %": TopK(keep=0.1),
        "top-k, 1 %": TopK(keep=0.01),
        f"dp-sgd, epsilon 8 (z = {least_noise():.2f})": DPSGD(noise_multiplier=least_noise(), max_grad_norm=clip, poisson=False),
    }
    for name, defense in defenses.items():
        print_row(name, [attacked(make(8), setting, batches=batches, defense=defense) for make in ATTACKS])
        if isinstance(defense, Gaussian | DPSGD):
            loud = [replace(make(8), carry=1000.0) for make in ATTACKS]
            print_row(f"{name}, carry 1000", [attacked(one, setting, batches=batches, defense=defense) for one in loud])
    dense = Setting(batch=8, model=DENSE[0], options=DENSE[1])
    for name, guard in {"none": None, "model-guard": ModelGuard()}.items():
        within = [replace(make(8), placement="parameters") for make in ATTACKS]
        print_row(f"{name}, in a dense net", [attacked(attack, dense, batches=batches, defense=guard) for attack in within])
    for batch in (64, 128, 192):
        count = min(batches, len(images(64)[0]) // batch)
        print_row(f"batch {batch}", [attacked(make(batch), Setting(batch=batch), batches=count) for make in ATTACKS])


ATTACKS: Sequence[Callable[[int], CraftedLayerAttack]] = (
    lambda batch: TrapWeights(neurons=512, batch=batch),
    lambda batch: QBI(neurons=512, batch=batch),
)
SWEEP = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)


def print_row(name: str, findings: Sequence[Finding | None]) -> None:
    """One line: the defence, then trap-weights and qbi."""
    cells = [row(found, SHOWN[:1]) if found else "refused" for found in findings]
    print(f"{name:45} | " + " | ".join(cell.removeprefix("fraction at PSNR ≥ 30 dB ") for cell in cells), flush=True)


def honest_norm(setting: Setting) -> float:
    """The median norm of honest updates of batches of public images: what a site would clip to."""
    task, (_, public) = setting.task(), images(setting.size)
    recipe = LocalRecipe(lr=0.1, steps=1, batch_size=setting.batch, train_mode=False)
    local = Local(site="site", round=1, rng=torch.Generator().manual_seed(0))
    norms = []
    for place in range(len(public) // setting.batch):
        own = public.take(range(place * setting.batch, (place + 1) * setting.batch))
        sent = {key: value.clone() for key, value in task.build().state_dict().items()}
        norms.append(norm(step(None, task, sent, own, recipe, defense=None, local=local, seed=place)))
    return float(torch.stack(norms).median())


def least_noise() -> float:
    """The noise multiplier of a single step over all of a site's records at an epsilon of 8 and a delta of 1e-5."""
    from opacus.accountants.utils import get_noise_multiplier

    return float(get_noise_multiplier(target_epsilon=8, target_delta=1e-5, sample_rate=1.0, steps=1))


@cache
def images(size: int) -> Source:
    """Private and public X-rays."""
    return xrays(size)


if __name__ == "__main__":
    main()
