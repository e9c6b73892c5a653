"""What a probe looks at: a model's pooled features, or plain pixel statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flpriv.attacks.frozen import frozen
from flpriv.capture import Capture
from flpriv.errors import ScenarioError

UNTRAINED = "untrained backbone"
PIXELS = "pixel statistics"
PERCENTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@torch.inference_mode()
def features(model: nn.Module, images: Tensor, *, chunk: int = 64) -> Tensor:
    """The input of the model's last dense layer: ``(N, features)`` float32 on the CPU.

    Where that input is a flattened feature map, the map is averaged over space, so that a record has one number per channel.

    Raises:
        ScenarioError: for a model without a dense layer.
    """
    device = next(model.parameters()).device
    maps: list[Tensor] = []
    inputs: list[Tensor] = []

    def remember(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() > 3:
            maps[:] = [output]

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [_pooled(args[0], maps)]

    hooks = [m.register_forward_hook(remember) for m in model.modules() if not list(m.children())]
    hooks += [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        found = []
        for part in torch.split(images, chunk):
            maps.clear()
            inputs.clear()
            model(part.to(device))
            if not inputs:
                raise ScenarioError("site inference reads the input of the last dense layer, and this model has none")
            found.append(inputs[0].float().cpu())
        return torch.cat(found)
    finally:
        for hook in hooks:
            hook.remove()


def pixel_statistics(images: Tensor) -> Tensor:
    """Mean, standard deviation, seven percentiles and the edge energy along each axis: ``(N, 9 + axes)``.

    What a scanner and its post-processing leave in any image, without a model.
    """
    flat = images.float().flatten(1)
    steps = [images.diff(dim=axis).abs().flatten(1).mean(1) for axis in range(2, images.dim())]
    spread = flat.quantile(torch.tensor(PERCENTILES), dim=1)
    return torch.stack([flat.mean(1), flat.std(1), *spread, *steps], 1)


def looked_at(capture: Capture, baseline: str, images: Tensor, *, seed: int, who: str) -> Tensor:
    """What a probe of one baseline looks at: ``(N, features)``, of the captured model where ``baseline`` is empty.

    Args:
        capture: with a final model.
        baseline: :data:`UNTRAINED`, :data:`PIXELS` or empty.
        images: N of them.
        seed: of untrained weights.
        who: for errors.

    Raises:
        UpdateError: if the captured model is not the task's.
        ScenarioError: for a model without a dense layer.
    """
    if baseline == PIXELS:
        return pixel_statistics(images)
    state = capture.task.build(seed=seed).state_dict() if baseline == UNTRAINED else capture.final
    return features(frozen(capture.task, state, who=f"{who}: the final model"), images)


def _pooled(inputs: Tensor, maps: list[Tensor]) -> Tensor:
    """One vector per record: a flattened map, or tokens, averaged."""
    if inputs.dim() > 2:
        return inputs.flatten(1, -2).mean(1)
    if maps and maps[0][0].numel() == inputs.shape[1]:
        return inputs.reshape(len(inputs), maps[0].shape[1], -1).mean(2)
    return inputs
