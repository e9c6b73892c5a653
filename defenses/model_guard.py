"""Look at the model before training on it, and refuse one that is built to copy records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flpriv.defense import Defense, Local, Refusal
from flpriv.errors import UpdateError
from flpriv.state import State, check_finite, check_like, parameters


@dataclass(frozen=True, kw_only=True)
class ModelGuard(Defense):
    """Refuse a model received that is not the agreed one, or whose weights are set up as a trap.

    In this order: layers, shapes and types as agreed (where the task is known); no NaN or infinite value; no layer without any
    weight (model inconsistency: sites that are to send nothing); no layer whose rows look alike (imprint blocks: identical
    rows); none whose rows all sum to one side (trap weights: mostly negative rows); no hidden dense layer most of whose neurons
    fire for a few single images (where the site's records can be read). Layers of few rows are left out of all but the first
    two: the two rows of a two-class head oppose each other in every trained model.

    It judges what is received, not the software that trains on it: whoever ships the client can leave the guard out.

    Args:
        similarity: refused above this median absolute cosine between the rows of a layer, in (0, 1]. The shipped models,
            trained and untrained, stay below 0.26; imprint blocks have 1.
        twins: refused above this share of rows that have a twin (absolute cosine over 0.99) in their layer, in (0, 1]. The
            shipped models have none.
        drift: refused above this ratio of the mean row sum to the row sums' standard deviation, > 0. The shipped models stay
            below 1.3; trap weights reach 2 to 26 on images of 64 pixels.
        rare: refused above this share of neurons that some local image switches on, but no more than ``rarity`` of them do, in
            (0, 1]. Trained and untrained dense layers on X-rays stay below 0.2; neurons tuned to fire for one image in 8 to 64
            reach 0.8. Neurons that never fire copy nothing, and healthy layers have many.
        rarity: share of the local images, in (0, 1).
        images: local images to look at, drawn at random; 0 leaves the activations alone.
        rows: smallest number of rows of a layer that is looked at, ≥ 3.
    """

    name: ClassVar[str] = "model-guard"
    acts_on: ClassVar[Literal["received"]] = "received"
    paper: ClassVar[str] = (
        "traps it looks for: Fowl et al., Robbing the Fed, ICLR 2022 (arXiv 2110.13057); "
        "Boenisch et al., When the Curious Abandon Honesty, EuroS&P 2023 (arXiv 2112.02918)"
    )

    similarity: Annotated[float, Field(gt=0, le=1)] = 0.5
    twins: Annotated[float, Field(gt=0, le=1)] = 0.2
    drift: Annotated[float, Field(gt=0)] = 2.0
    rare: Annotated[float, Field(gt=0, le=1)] = 0.5
    rarity: Annotated[float, Field(gt=0, lt=1)] = 0.15
    images: Annotated[int, Field(ge=0)] = 256
    rows: Annotated[int, Field(ge=3)] = 8

    def inspect(self, received: State, *, local: Local) -> Refusal | None:
        """The first reason against the model, naming the layer; ``None`` for a healthy one."""
        weights = self._weights(received)
        reasons = chain(_disagreement(received, local), self._look(weights, local), self._activity(received, local))
        reason = next(reasons, None)
        return None if reason is None else Refusal(reason=reason)

    def _look(self, weights: dict[str, Tensor], local: Local) -> Iterator[str]:
        for layer, rows in weights.items():
            if not bool(rows.any()):
                yield f"all weights of layer {layer!r} are zero: a model that sends no gradient"
            drawn = rows[torch.randperm(len(rows), generator=local.rng)[:_LOOKED_AT]]
            cosine = _cosines(drawn)
            if (alike := float(cosine.median())) > self.similarity:
                yield f"the rows of layer {layer!r} look alike (median cosine {alike:.2f}, at most {self.similarity:g} allowed)"
            if (twins := float((cosine.amax(1) > 0.99).double().mean())) > self.twins:
                yield f"{twins:.0%} of the rows of layer {layer!r} have a twin (at most {self.twins:.0%} allowed)"
            if (drift := _drift(rows)) > self.drift:
                yield f"the rows of layer {layer!r} all sum to one side (ratio {drift:.1f}, at most {self.drift:g} allowed)"

    def _weights(self, received: State) -> dict[str, Tensor]:
        """Layer name to ``(rows, weights of a row)`` in float64, for layers with enough rows and more than one weight in each."""
        found = {key: value.flatten(1).double() for key, value in parameters(received).items() if value.ndim > 1}
        return {key: rows for key, rows in found.items() if len(rows) >= self.rows and rows.shape[1] > 1}

    def _activity(self, received: State, local: Local) -> Iterator[str]:
        if local.task is None or local.records is None or self.images == 0:
            return
        model = local.task.build().eval()
        model.load_state_dict(dict(received))
        classes = len(local.task.classes)
        hidden = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features >= self.rows}
        hidden = {name: module for name, module in hidden.items() if module.out_features != classes}
        if not hidden:
            return
        records = local.records()
        drawn = torch.randperm(len(records), generator=local.rng)[: self.images]
        fired: dict[str, Tensor] = {}
        for name, module in hidden.items():
            module.register_forward_hook(lambda _, __, out, name=name: fired.update({name: (out > 0).double().mean(0)}))
        with torch.no_grad():
            model(records.images[drawn])
        for name, share in fired.items():
            if float(((share > 0) & (share <= self.rarity)).double().mean()) > self.rare:
                yield f"most neurons of layer {name!r} fire for a few single images of this site"


_LOOKED_AT = 512
"""Rows compared with each other at most; more are drawn from."""


def _disagreement(received: State, local: Local) -> Iterator[str]:
    try:
        if local.task is not None:
            agreed = local.task.build().state_dict()
            check_like(received, agreed, who="not the agreed architecture")
            for key, value in agreed.items():
                if received[key].dtype != value.dtype:
                    yield f"not the agreed architecture: layer {key!r} holds {received[key].dtype}, expected {value.dtype}"
        check_finite(received, who="broken model")
    except UpdateError as error:
        yield str(error)


def _cosines(rows: Tensor) -> Tensor:
    """``(n, n - 1)`` absolute cosines of each row with the others; rows of zeros are like none."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    cosines: Tensor = (unit @ unit.T).abs()[others]
    return cosines.reshape(len(rows), -1)


def _drift(rows: Tensor) -> float:
    """Absolute mean row sum over the standard deviation of the row sums."""
    sums = rows.sum(1)
    return float(sums.mean().abs() / sums.std().clamp_min(1e-12))
