"""What a site's model makes of trial images, in the mode in which the site trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flpriv.attacks.inversion.unroll import Replay

Batch = tuple[int, ...]


def received(site: Replay, images: Tensor, layers: Sequence[str]) -> dict[Batch, list[Tensor]]:
    """The inputs of ``layers`` under the model sent, for every different batch of the round.

    Batches come in the order of their images. Works under the transforms of ``torch.func``, differentiable in ``images``
    ``(N, C, *spatial)``.
    """
    modules = dict(site.model.named_modules())
    kept: dict[str, Tensor] = {}
    hooks = [modules[name].register_forward_pre_hook(_keeping(kept, name)) for name in layers]
    try:
        return {batch: [kept[name] for name in layers] for batch, _ in _passes(site, images)}
    finally:
        for hook in hooks:
            hook.remove()


def answered(site: Replay, images: Tensor) -> Tensor:
    """Logits ``(N, classes)`` under the model sent; as :func:`received` otherwise."""
    return torch.cat([logits for _, logits in _passes(site, images)])


def _passes(site: Replay, images: Tensor) -> Iterator[tuple[Batch, Tensor]]:
    for batch in dict.fromkeys(site.batches):
        rows = torch.tensor(batch, device=images.device)
        yield batch, functional_call(site.model, {**site.start, **site.rest}, (images[rows],))


def _keeping(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[name] = inputs[0]

    return keep
