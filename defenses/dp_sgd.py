"""DP-SGD: bound and blur what each record adds to each local step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flpriv.defense import Defense, Local, Loop
from flpriv.defenses.ledger import Accountant, fingerprint, spend
from flpriv.errors import ScenarioError


@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Clip each record's gradient, add Gaussian noise to their sum, draw batches at random; ε is kept per site (Opacus).

    The federation agrees on a model without BatchNorm (GroupNorm takes its place) and without in-place layers. ε after each
    round goes into the site's notes, composed over every round and across restarts by a ledger in the site's folder. It
    protects one record of the site, not one patient with several records, and it does not count what is chosen from the data
    beforehand (class weights, the number of records). Noise comes from torch's generator, not from a cryptographic one.

    Args:
        noise_multiplier: standard deviation of the noise in units of ``max_grad_norm``, ≥ 0; 0 gives no guarantee.
        max_grad_norm: largest Euclidean norm of one record's gradient, > 0.
        delta: δ at which ε is said, in (0, 1); keep it below one over the number of records.
        poisson: draw each record into each step independently, as the proof wants; ``False`` keeps the loader's own batches, and
            ε is then a habit of the field and no proof.
        accountant: ``"rdp"``, or ``"prv"``, which is tighter and may take a minute.
    """

    name: ClassVar[str] = "dp-sgd"
    acts_on: ClassVar[Literal["loop"]] = "loop"
    paper: ClassVar[str] = "Abadi et al., Deep Learning with Differential Privacy, CCS 2016 (arXiv 1607.00133)"

    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    poisson: bool = True
    accountant: Accountant = "rdp"

    def architecture(self, model: nn.Module) -> nn.Module:
        """``model`` with GroupNorm for BatchNorm and nothing computed in place."""
        from opacus.validators import ModuleValidator

        fixed: nn.Module = ModuleValidator.fix(model)
        for module in fixed.modules():
            if getattr(module, "inplace", False):
                vars(module)["inplace"] = False
        return fixed

    def prepare(self, loop: Loop, *, local: Local) -> Loop:
        """The loop with per-record gradients, clipped and noised at each step; the model keeps its keys.

        Raises:
            ScenarioError: naming the layer, for a model that was not built through :meth:`architecture`.
        """
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
        from opacus.optimizers import DPOptimizer

        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        _check(loop.model)
        received = fingerprint(loop.model.state_dict())
        _train_weights(loop.model)
        hooks = GradSampleHooks(loop.model)
        batch, rate = _sampling(loop.loader)
        device = next(loop.model.parameters()).device
        steps = _Count()
        optimizer = DPOptimizer(
            loop.optimizer,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=batch,
            generator=torch.Generator(device).manual_seed(_draw(local.rng)),
        )
        optimizer.attach_step_hook(steps)

        def finish() -> None:
            hooks.cleanup()
            spent = spend(
                local,
                ledger=self.name,
                key=received,
                noise_multiplier=self.noise_multiplier,
                sample_rate=rate,
                steps=steps.done,
            )
            if self.noise_multiplier > 0:
                local.notes.update(epsilon=spent.epsilon(self.delta, accountant=self.accountant), delta=self.delta)
            else:
                local.notes["privacy"] = "none: the noise is zero"

        loader = _poisson(loop.loader, rate=rate, rng=local.rng) if self.poisson else loop.loader
        return replace(loop, optimizer=optimizer, loader=loader, loss=_or_zero(loop.loss), finish=(*loop.finish, finish))


@dataclass
class _Count:
    """Counts the optimiser's steps."""

    done: int = 0

    def __call__(self, _: object) -> None:
        self.done += 1


def _check(model: nn.Module) -> None:
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.validators import ModuleValidator

    for name, module in model.named_modules():
        if type(module) in ModuleValidator.FIXERS or getattr(module, "inplace", False):
            raise ScenarioError(
                f"dp-sgd: layer {name!r} ({type(module).__name__}) cannot be trained with it; the whole federation must agree on "
                "the model that this defence's architecture() gives"
            )
    if errors := GradSampleHooks.validate(model, strict=False):
        raise ScenarioError(f"dp-sgd: {errors[0]}")


def _train_weights(model: nn.Module) -> None:
    """Opacus looks at layers in train mode alone: layers with weights go there, dropout stays as it was."""
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.training = True


def _sampling(loader: DataLoader[Any]) -> tuple[int, float]:
    """(expected records in a step, chance of one record to be in it)."""
    records = len(cast(Sized, loader.dataset))
    batch = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(batch, int):
        raise ScenarioError("dp-sgd: the loader tells no batch size; give its batch sampler an attribute 'batch_size'")
    return min(batch, records), min(batch, records) / records


def _poisson(loader: DataLoader[Any], *, rate: float, rng: torch.Generator) -> DataLoader[Any]:
    """As many steps over the same records, each record in each with chance ``rate``; a step may be empty."""
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    def collate(records: list[Any]) -> list[Tensor]:
        if records:
            return list(loader.collate_fn(records))
        return [part[:0] for part in loader.collate_fn([loader.dataset[0]])]

    sampler = UniformWithReplacementSampler(
        num_samples=len(cast(Sized, loader.dataset)),
        sample_rate=rate,
        steps=len(loader),
        generator=torch.Generator().manual_seed(_draw(rng)),
    )
    return DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=collate, num_workers=loader.num_workers)


def _or_zero(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An empty batch has loss 0: its step adds noise alone."""
    return lambda logits, labels: loss(logits, labels) if len(labels) else logits.sum() * 0.0


def _draw(rng: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=rng, device=rng.device))
