"""Which labels lie behind an update, read from the last layer.

Ways to read them, each a pure function: rules on the gradient alone (:mod:`.rules`), counts from what images of one's own
add to it (:mod:`.counts`), and the labels whose images would have the least unusual features (:mod:`.unusual`).
:mod:`.strategies` feeds them with one update (:mod:`.reading`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flpriv.attacks.inversion.labels.last_layer import marks_of
from flpriv.attacks.inversion.labels.reading import read
from flpriv.attacks.inversion.labels.rules import idlg
from flpriv.attacks.inversion.labels.strategies import STRATEGIES, Strategy
from flpriv.attacks.inversion.unroll import Replay

__all__ = ["STRATEGIES", "Strategy", "idlg", "marks_of", "read", "recover"]


def recover(
    replay: Replay,
    observed: Sequence[Tensor],
    *,
    classes: int,
    guesses: Tensor,
    guessed: Tensor,
    strategy: Strategy = "auto",
) -> Tensor:
    """The labels behind an update, ``(images,)`` int64, sorted.

    One image's label is certain, and so are all labels of one step at an untrained model, given public images. Elsewhere counts
    are estimates: in a trained model by the spread of its answers, over several steps by how far the model moves in the round;
    momentum makes them lean towards the labels of early steps. An update that was clipped says too little and is
    taken for one of labels as even as the model's answers.

    Under a balanced loss class weights are a secret of the site; see :func:`.counts.balanced` for what remains.

    Args:
        replay: of the site's round.
        observed: ``(W₀ - W_τ) / lr`` in the order of ``replay.start``.
        classes: of the task.
        guesses: images like those looked for, ``(M, C, *spatial)``: public ones, or noise for want of them.
        guessed: their labels ``(M,)``, -1 for noise; a class without a guess borrows all of them.
        strategy: how to read them.

    Raises:
        FlprivError: if no layer ends in ``classes`` rows, the update is not finite, or the strategy does not fit it.
    """
    counts = STRATEGIES[strategy](read(replay, observed, classes=classes, guesses=guesses, guessed=guessed))
    return torch.arange(classes).repeat_interleave(counts)
