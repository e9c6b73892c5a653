"""A site's side of secure aggregation: Flower's own mod around local training, and what the site refuses to unmask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from flwr.app import Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from flpriv.defense import CallNext, Defense, Local, guard
from flpriv.errors import UpdateError
from flpriv.secure_aggregation import CONFIGS


def masked(
    message: Message,
    context: Context,
    train: CallNext,
    *,
    defenses: tuple[Defense, ...],
    local: Callable[[int], Local],
    seed: int,
) -> Message:
    """Answer one message of the protocol; ``train`` is called in the stage that asks for the masked update.

    The reply to that stage carries the update of all floating entries, weighted and masked, and the metrics in the clear.
    Counters stay at the site.

    Args:
        message: of any stage.
        context: of the site, which remembers the round's keys and shares.
        train: answers a training message with ``arrays`` and ``metrics``.
        defenses: of the site; those that act on the protocol may refuse a request.
        local: each defence's surroundings, by position.
        seed: of the rounding.

    Raises:
        UpdateError: if the message is none of the protocol.
    """
    if CONFIGS not in message.content.config_records:
        raise UpdateError("this site sends its update masked or not at all, and the message is not of secure aggregation")
    places = [place for place, defense in enumerate(defenses) if defense.acts_on == "protocol"]
    checks = tuple(defenses[place] for place in places)

    def fit(message: Message, context: Context) -> Message:
        del message.content[CONFIGS]
        reply = train(message, context)
        if reply.has_error():
            raise _Refused(reply)
        return _as_fit_result(reply, message)

    def protocol(message: Message, context: Context) -> Message:
        with _rounding(seed):
            return secaggplus_mod(message, context, fit)

    try:
        return guard(checks, message, context, protocol, local=lambda place: local(places[place]))
    except _Refused as refused:
        return refused.reply


class _Refused(Exception):
    """Local training answered with an error."""

    def __init__(self, reply: Message) -> None:
        super().__init__()
        self.reply = reply


def _as_fit_result(reply: Message, message: Message) -> Message:
    """The reply as Flower's mod reads it: one flat vector of float64, the order of the entries that of the model received."""
    sent = message.content.array_records["arrays"].to_torch_state_dict()
    returned = reply.content.array_records["arrays"].to_torch_state_dict()
    floating = {key: value.double() for key, value in sent.items() if value.is_floating_point()}
    moved = [(returned[key].double() - value).flatten().numpy() for key, value in floating.items()]
    metrics = reply.content.metric_records["metrics"]
    examples = metrics["num-examples"]
    if not isinstance(examples, int):
        raise UpdateError("secure aggregation weighs by 'num-examples', which must be a whole number")
    vector = ndarrays_to_parameters([np.concatenate(moved)])
    content = fitres_to_recorddict(FitRes(Status(Code.OK, ""), vector, examples, {}), keep_input=True)
    content["metrics"] = metrics
    return Message(content, reply_to=message)


@contextmanager
def _rounding(seed: int) -> Iterator[None]:
    """Flower rounds by NumPy's global random state; what is drawn here leaves it as it was."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
