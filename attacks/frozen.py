"""A captured model, frozen: every weight loaded, eval mode, no gradients kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flpriv.records import Records
from flpriv.state import State, check_like
from flpriv.task import Task


def frozen(task: Task, state: State, *, who: str) -> nn.Module:
    """The task's model with the weights and running statistics of ``state``, in eval mode, on the GPU where there is one.

    Raises:
        UpdateError: naming ``who`` and the first layer that ``state`` lacks, adds or has in another shape.
    """
    model = task.build()
    check_like(state, model.state_dict(), who=who)
    model.load_state_dict(dict(state), strict=True)
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def losses(model: nn.Module, records: Records, *, chunk: int = 64) -> Tensor:
    """Cross-entropy of ``model`` on each record: ``(N,)`` float64 on the CPU.

    Taken in float64 as ``log(1 + exp(logsumexp of the other logits - own logit))``, which tells certain predictions apart too.
    """
    device = next(model.parameters()).device
    logits = torch.cat([model(images.to(device)).cpu() for images in torch.split(records.images, chunk)]).double()
    own = functional.one_hot(records.labels, logits.shape[1]).bool()
    return functional.softplus(logits.masked_fill(own, -torch.inf).logsumexp(1) - logits[own])
