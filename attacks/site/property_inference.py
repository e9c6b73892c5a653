"""Property inference: updates of records with a property look alike, and the adversary can make such updates itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Property
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.property import PATTERN, has
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import State, difference
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class PropertyInference(Attack):
    """Asks of each update whether more than a share of the records behind it have a property (sex, an age, a finding).

    At each model sent, the adversary follows the local recipe on exposed records, mixed with all shares of the property, and
    trains a random forest to tell updates above ``share`` from those below. Features are the absolute update, the largest of each
    kernel, pooled to ``width`` numbers a layer, L2-normalised and standardised by the simulated updates of the round. The forest
    is shared by all rounds. It works best on updates of few records, as with ``steps = 1`` and a batch of 16, and many rounds.
    What it tells may be the label or the site, where the property goes with them. Defences of the sites are not simulated.

    Args:
        property: ``"sex=F"``, ``"age>=60"``, ``"age<18"``, or ``"label=1"`` by class index.
        share: the update has the property if more than this share of the records behind it have it; 0 asks for any at all.
        updates: simulated for each model sent.
        width: largest number of features of a layer.
        spread: look at no more than this many rounds, spread evenly over those seen.
    """

    name: ClassVar[str] = "property-inference"
    goal: ClassVar[Goal] = Goal.ATTRIBUTE
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_LOCAL | Can.KNOW_EXPOSED
    paper: ClassVar[str] = "Melis et al. 2019, https://arxiv.org/abs/1805.04049"

    property: Annotated[str, Field(pattern=PATTERN)] = "sex=F"
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    updates: Annotated[int, Field(ge=20)] = 60
    width: Annotated[int, Field(ge=1)] = 256
    spread: Annotated[int, Field(ge=1)] = 20

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Property]:
        """One claim for each observation of a single node that was sent the honest model.

        Raises:
            CaptureError: if there is no such observation, its recipe is not known, or the exposed records are not of both kinds.
            ScenarioError: for a property that cannot be read.
            UpdateError: if a model sent is not the task's.
        """
        from sklearn.ensemble import RandomForestClassifier

        kinds = self._kinds(capture)
        seen = [o for o in capture.observations if o.node is not None and o.local is not None and not o.trap]
        rounds = sorted({o.round for o in seen})
        places = torch.linspace(0, max(0, len(rounds) - 1), min(self.spread, len(rounds))).round().long().tolist()
        known, answers, asked = [], [], []
        for round in track([rounds[place] for place in places], self.name):
            group = [o for o in seen if o.round == round]
            made, truths = self._simulated(capture, group[0], kinds, rng)
            mean, deviation = made.mean(0), made.std(0).clamp_min(1e-12)
            known.append((made - mean) / deviation)
            answers.append(truths)
            asked += [(o, (features(o.update, width=self.width) - mean) / deviation) for o in group]
        if not asked:
            raise CaptureError(f"{self.name}: the capture holds no reply of a single node to the honest model")
        seed = int(torch.randint(2**31, (1,), generator=rng))
        forest = RandomForestClassifier(n_estimators=100, min_samples_leaf=5, random_state=seed, n_jobs=1)
        forest.fit(torch.cat(known).numpy(), torch.cat(answers).numpy())
        guesses = forest.predict_proba(torch.stack([row for _, row in asked]).numpy())[:, 1].tolist()
        return [
            Property(property=self.property, share=self.share, round=o.round, node=o.node, probability=float(guess))
            for (o, _), guess in zip(asked, guesses, strict=True)
            if o.node is not None
        ]

    def _kinds(self, capture: Capture) -> tuple[Records, Records]:
        """The exposed records without the property, and those with it."""
        if capture.exposed is None or not len(capture.exposed):
            raise CaptureError(f"{self.name}: the capture holds no exposed records")
        held, known = has(capture.exposed, self.property)
        without, those = (known & ~held).nonzero().flatten(), held.nonzero().flatten()
        if len(without) < 2 or len(those) < 2:
            raise CaptureError(
                f"{self.name}: {len(those)} exposed records have {self.property!r} and {len(without)} have not, of "
                f"{len(capture.exposed)}; at least two of each are needed: raise threat.exposed, or ask for another property"
            )
        return capture.exposed.take(without), capture.exposed.take(those)

    def _simulated(
        self, capture: Capture, seen: Observation, kinds: tuple[Records, Records], rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Features ``(updates, F)`` of simulated updates, half of them above the share, and which those are."""
        assert seen.local is not None
        model = frozen(capture.task, seen.sent, who=f"{self.name}: the model of round {seen.round}").requires_grad_(True)
        count = _behind(seen.local, seen.examples or 2 * len(kinds[1]))
        rows, truths = [], []
        for place in range(self.updates):
            above = place % 2 == 1
            least, most = (int(self.share * count) + 1, count) if above else (0, int(self.share * count))
            those = int(torch.randint(least, most + 1, (1,), generator=rng))
            parts = [kind.take(_drawn(len(kind), n, rng)) for kind, n in zip(kinds, (count - those, those), strict=True)]
            update = local_update(model, seen.sent, Records.concat(parts), seen.local, len(capture.task.classes), rng)
            rows.append(features(update, width=self.width))
            truths.append(above)
        return torch.stack(rows), torch.tensor(truths)


def features(update: Mapping[str, Tensor], *, width: int) -> Tensor:
    """What the forest looks at of an update: ``(F,)`` in [0, 1], of length 1."""
    parts = []
    for value in update.values():
        large = value.abs().flatten(2).amax(2) if value.dim() > 2 else value.abs()
        flat = large.flatten().float()
        parts.append(functional.adaptive_max_pool1d(flat[None], width)[0] if flat.numel() > width else flat)
    return functional.normalize(torch.cat(parts), dim=0)


def local_update(
    model: nn.Module, start: State, records: Records, recipe: LocalRecipe, classes: int, rng: torch.Generator
) -> dict[str, Tensor]:
    """``returned - sent`` of a site that follows ``recipe`` on ``records``; ``model`` is used and left changed."""
    model.load_state_dict(dict(start))
    model.train(recipe.train_mode)
    device = next(model.parameters()).device
    weight = None
    if recipe.loss == "balanced-cross-entropy":
        counts = torch.bincount(records.labels, minlength=classes).float()
        inverse = len(records) / ((counts > 0).sum() * counts.clamp_min(1))
        weight = torch.where(counts > 0, inverse, 0).to(device)
    decay, parameters = recipe.weight_decay, list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=decay)
        if recipe.optimizer == "adam"
        else torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=decay)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        for rows in _batches(len(records), recipe, rng):
            optimizer.zero_grad()
            logits, labels = model(records.images[rows].to(device)), records.labels[rows].to(device)
            torch.autograd.backward(functional.cross_entropy(logits, labels, weight=weight, reduction="none").mean())
            optimizer.step()
    return difference({key: value.detach().cpu() for key, value in model.state_dict().items()}, start)


def _batches(count: int, recipe: LocalRecipe, rng: torch.Generator) -> Iterator[Tensor]:
    def epochs() -> Iterator[Tensor]:
        for _ in range(recipe.epochs if recipe.steps is None else recipe.steps):
            yield from torch.split(torch.randperm(count, generator=rng), recipe.batch_size)

    return islice(epochs(), recipe.steps)


def _behind(recipe: LocalRecipe, examples: int) -> int:
    """How many records are behind an update of a site with so many."""
    return examples if recipe.steps is None else min(examples, recipe.steps * recipe.batch_size)


def _drawn(count: int, wanted: int, rng: torch.Generator) -> Tensor:
    """Rows of ``wanted`` records out of ``count``, each used as evenly as can be."""
    turns = [torch.randperm(count, generator=rng) for _ in range(-(-wanted // count))]
    return torch.cat(turns)[:wanted] if turns else torch.zeros(0, dtype=torch.long)
