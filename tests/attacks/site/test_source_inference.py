from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from flpriv import audit, scenario
from flpriv.attacks.site.source_inference import SourceInference
from flpriv.capture import Capture
from flpriv.claim import Attribute, Goal
from flpriv.errors import CaptureError
from flpriv.measures import measure
from flpriv.testing import Glass, glass


@pytest.fixture(scope="module")
def federation() -> Glass:
    """Three sites whose images have nothing to do with their labels: what tells a source is memory."""
    return glass(Goal.MEMBERSHIP)


def claim(capture: Capture, attack: SourceInference | None = None) -> Attribute:
    (found,) = (attack or SourceInference())(capture)
    assert isinstance(found, Attribute)
    return found


def test_probabilities_are_the_softmax_of_minus_losses(federation: Glass) -> None:
    capture = federation.capture
    assert capture.candidates is not None
    found = claim(capture, SourceInference(round=2))
    losses = []
    for node in found.classes:
        (seen,) = (o for o in capture.observations if o.round == 2 and str(o.node) == node)
        model = capture.task.build().double().eval()
        model.load_state_dict(dict(seen.returned))
        losses.append(cross_entropy(model(capture.candidates.images.double()), capture.candidates.labels, reduction="none"))
    stacked = torch.stack(losses, 1).detach()
    assert torch.allclose(found.probabilities, torch.softmax(-stacked, 1), atol=1e-6)
    assert torch.equal(found.probabilities.argmax(1), stacked.argmin(1))
    assert found.probe == "loss of the models returned in round 2"


def test_members_are_traced_to_their_sites(federation: Glass) -> None:
    found = measure(
        [claim(federation.capture)], federation.truth, attack="a", name="b", goal=Goal.ATTRIBUTE, setting="none", defense="none"
    )
    head = found[0].headline
    assert head is not None
    assert head.low is not None
    assert head.low > 1 / 3 + 0.2
    assert head.n == 72


def test_the_last_round_is_the_default_and_fixed(federation: Glass) -> None:
    capture = federation.capture
    last = max(o.round for o in capture.observations)
    assert torch.equal(claim(capture).probabilities, claim(capture, SourceInference(round=last)).probabilities)
    alone = tuple(o for o in capture.observations if o.round < last or o.node == capture.nodes[0])
    assert claim(replace(capture, observations=alone)).probe.endswith(f"round {last - 1}")


def test_untrained_replies_tell_no_source(federation: Glass) -> None:
    capture, truth = federation.capture, federation.truth
    blank = tuple(replace(o, returned=capture.task.build(seed=40 + i).state_dict()) for i, o in enumerate(capture.observations))
    found = measure(
        [claim(replace(capture, observations=blank))],
        truth,
        attack="a",
        name="b",
        goal=Goal.ATTRIBUTE,
        setting="none",
        defense="none",
    )
    head = found[0].headline
    assert head is not None
    assert head.low is not None
    assert head.low < 1 / 3


def test_it_says_what_it_lacks(federation: Glass) -> None:
    capture = federation.capture
    with pytest.raises(CaptureError, match="no candidates"):
        SourceInference()(replace(capture, candidates=None))
    with pytest.raises(CaptureError, match="no two of round 99"):
        SourceInference(round=99)(capture)
    with pytest.raises(CaptureError, match="not on sums"):
        SourceInference()(replace(capture, observations=tuple(replace(o, node=None) for o in capture.observations)))
    with pytest.raises(CaptureError, match="no two of any round"):
        SourceInference()(replace(capture, observations=tuple(replace(o, trap="imprint") for o in capture.observations)))


@pytest.mark.slow
def test_real_xrays_of_five_sites_are_traced_above_chance(test_data: Path, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[3] / "examples" / "xray_multisite.toml"
    tables = scenario.read(example, overrides=[f"sites.root={test_data / 'xray_multisite'}", "sites.size=48"]).tables()
    local = {"lr": 0.01, "momentum": 0.9, "batch_size": 8, "epochs": 4}
    tables |= {
        "model": {**tables["model"], "width": 8},
        "federation": {"rounds": 6, "local": local},
        "attacks": {"source-inference": {}},
        "defenses": {},
        "compare": ["none"],
    }
    finding = next(f for f in audit.run(scenario.parse(tables, root=tmp_path), out=tmp_path / "run").findings if not f.site)
    head = finding.headline
    assert head is not None
    assert head.low is not None
    assert head.second_null == pytest.approx(1 / 5)
    assert head.low > 1 / 5
    assert finding.confusion is not None
    assert len(finding.confusion.classes) == 5
