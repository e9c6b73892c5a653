"""Attributes (site, sex, age): accuracy, F1 and confusion on held-out records, and the lift over the best baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flpriv.bands import band, is_band
from flpriv.claim import Attribute
from flpriv.errors import ClaimError
from flpriv.finding import Confusion, Finding, Metric
from flpriv.measures.intervals import bootstrap, clopper_pearson, student
from flpriv.truth import Truth

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

FEW = 20
"""Held-out records needed to score on them alone."""
MAJORITY = "majority class"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The scored records: true class, site and patient of each, and every probe's guesses.

    Args:
        classes: names, in code order.
        true: ``(n,)`` class codes.
        guesses: (baseline, probe) to ``(repeats, n)`` class codes; baseline ``""`` is the attack itself.
        site: ``(n,)`` names, ``""`` where unknown.
        patient: ``(n,)`` ids.
    """

    classes: tuple[str, ...]
    true: Codes
    guesses: Mapping[tuple[str, str], Codes]
    site: NDArray[np.str_]
    patient: NDArray[np.str_]

    def take(self, rows: NDArray[np.bool_]) -> Sample:
        """The records where ``rows`` is true."""
        return Sample(
            classes=self.classes,
            true=self.true[rows],
            guesses={key: guess[:, rows] for key, guess in self.guesses.items()},
            site=self.site[rows],
            patient=self.patient[rows],
        )

    def accuracy(self, key: tuple[str, str]) -> float:
        """Mean over records and repeats."""
        return float((self.guesses[key] == self.true).mean())

    def best(self, baseline: str) -> tuple[str, str]:
        """The most accurate probe on the features of ``baseline``."""
        return max((key for key in self.guesses if key[0] == baseline), key=self.accuracy)

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines that come with the claims."""
        return list(dict.fromkeys(baseline for baseline, _ in self.guesses if baseline))


def confusion(true: Codes, guess: Codes, count: int) -> NDArray[np.int64]:
    """Counts ``(count, count)``, rows true classes and columns guesses."""
    return np.bincount(true * count + guess, minlength=count * count).reshape(count, count).astype(np.int64)


def f1(counts: NDArray[np.int64], *, weighted: bool = False) -> float:
    """F1 averaged over the classes that occur, plainly (macro) or by how often they are true; 0 where nothing is right."""
    hits, true, guessed = np.diag(counts), counts.sum(1), counts.sum(0)
    occur = (true + guessed) > 0
    scores = 2 * hits[occur] / (true + guessed)[occur]
    return float(np.average(scores, weights=true[occur] if weighted else None))


def findings(claims: Sequence[Attribute], truth: Truth, new: Callable[..., Finding], *, seed: int) -> list[Finding]:
    """One finding over all sites, then one per site.

    Scored on candidates no site trained on, where at least ``FEW`` of them have a known value; else on all candidates, with a
    caveat. Each set of features is represented by its most accurate probe, baselines like the attack itself. Repeats are
    averaged; intervals are over patients.

    At a site, the attribute "site" is scored by recall, against the class's share and the baselines' recall; any other
    attribute by accuracy among the site's own records.

    Raises:
        ClaimError: for claims about several attributes, of a wrong size, without the attack's own guesses, or where the truth
            is known of no candidate.
    """
    attributes = {claim.attribute for claim in claims}
    if len(attributes) > 1:
        raise ClaimError(
            f"attribute claims: one attack claims several attributes ({', '.join(sorted(attributes))}); run it once for each"
        )
    sample, caveats = _sample(claims, truth)
    found = [overall(sample, new, caveats, seed=seed)]
    shares = np.bincount(sample.true, minlength=len(sample.classes)) / len(sample.true)
    for name in sorted(set(sample.site.tolist()) - {""}):
        here = sample.take(sample.site == name)
        prior = float(shares[sample.classes.index(name)]) if attributes == {"site"} else None
        found.append(at_site(here, new, name, prior))
    return found


def _sample(claims: Sequence[Attribute], truth: Truth) -> tuple[Sample, list[str]]:
    attribute, candidates = claims[0].attribute, truth.candidates
    if candidates is None or attribute not in candidates.attributes:
        raise ClaimError(f"attribute {attribute!r} cannot be measured: it is not known of the candidates")
    guessable = list(dict.fromkeys(name for claim in claims for name in claim.classes))
    values = [_value(value, guessable) for value in candidates.attributes[attribute]]
    known = np.array([value != "" for value in values])
    held_out = known & ~truth.members.numpy().astype(bool) if truth.members is not None else known & False
    caveats = []
    rows = held_out
    if held_out.sum() < FEW:
        rows = known
        caveats.append(
            f"Only {held_out.sum()} held-out records tell their {attribute}: scored on all {known.sum()}, trained on or not."
        )
    if not rows.any():
        raise ClaimError(f"attribute {attribute!r} cannot be measured: it is known of no candidate")
    classes = tuple(dict.fromkeys([*guessable, *(values[i] for i in np.flatnonzero(rows))]))
    if unseen := sorted(set(classes) - set(guessable)):
        caveats.append(f"The adversary has seen no {attribute} {', '.join(unseen)}; records of it count as wrong.")
    code = {name: i for i, name in enumerate(classes)}
    grouped: dict[tuple[str, str], list[Codes]] = {}
    for claim in sorted(claims, key=lambda c: c.repeat):
        if claim.probabilities.shape != (len(candidates), len(claim.classes)):
            raise ClaimError(
                f"attribute claim: probabilities of shape {tuple(claim.probabilities.shape)}, "
                f"expected ({len(candidates)}, {len(claim.classes)}): candidates, classes"
            )
        names = np.array([code[name] for name in claim.classes], dtype=np.int64)
        grouped.setdefault((claim.baseline, claim.probe), []).append(names[claim.probabilities.argmax(1).cpu().numpy()][rows])
    if not any(baseline == "" for baseline, _ in grouped):
        raise ClaimError("attribute claims: every claim is a baseline's; the attack's own guesses are missing")
    n = len(candidates)
    return Sample(
        classes=classes,
        true=np.array([code[values[i]] for i in np.flatnonzero(rows)], dtype=np.int64),
        guesses={key: np.stack(guesses) for key, guesses in grouped.items()},
        site=np.asarray(candidates.attributes.get("site", ("",) * n))[rows],
        patient=np.asarray(candidates.patients or [str(i) for i in range(n)])[rows],
    ), caveats


def _value(value: str, classes: Sequence[str]) -> str:
    return band(value, classes) if all(map(is_band, classes)) else value


def overall(sample: Sample, new: Callable[..., Finding], caveats: Sequence[str], *, seed: int) -> Finding:
    """The finding over all sites: accuracy, lift, F1 and confusion of the best probe, against the best baseline."""
    own, count = sample.best(""), len(sample.classes)
    guesses, patients = sample.guesses[own], len(set(sample.patient.tolist()))
    majority = int(np.bincount(sample.true).argmax())
    rivals = {MAJORITY: np.full((1, len(sample.true)), majority)} | {
        name: sample.guesses[sample.best(name)] for name in sample.baselines
    }
    accuracies = {name: float((rival == sample.true).mean()) for name, rival in rivals.items()}
    strongest = max(accuracies, key=lambda name: accuracies[name])
    rival, accuracy = rivals[strongest], sample.accuracy(own)
    low, high = clopper_pearson(accuracy * patients, patients)
    headline = Metric(
        name="accuracy",
        value=accuracy,
        low=low,
        high=high,
        n=len(sample.true),
        null=accuracies[strongest],
        null_name=strongest,
        note=f"{own[1]}, mean over {_times(len(guesses))}; interval as of {patients} patients",
    )

    def spread(name: str, of: Callable[[Codes, Codes], float], null: float, null_name: str, note: str = "") -> Metric:
        """A statistic of (true, guesses), its interval over patients."""
        interval = bootstrap(lambda rows: of(sample.true[rows], guesses[:, rows]), sample.patient.tolist(), seed=seed)
        low, high = interval or (None, None)
        value = of(sample.true, guesses)
        return Metric(name=name, value=value, low=low, high=high, n=len(sample.true), null=null, null_name=null_name, note=note)

    def mean_f1(true: Codes, guess: Codes, *, weighted: bool) -> float:
        return float(np.mean([f1(confusion(true, one, count), weighted=weighted) for one in guess]))

    gained = (guesses == sample.true).mean(0) - (rival == sample.true).mean(0)
    interval = bootstrap(lambda rows: float(gained[rows].mean()), sample.patient.tolist(), seed=seed)
    lift = Metric(
        name="lift over the best baseline",
        value=float(gained.mean()),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        n=len(sample.true),
        null=0.0,
        null_name=strongest,
        note="difference of accuracies",
    )
    metrics = [
        headline,
        lift,
        spread("macro F1", lambda t, g: mean_f1(t, g, weighted=False), mean_f1(sample.true, rival, weighted=False), strongest),
        spread("weighted F1", lambda t, g: mean_f1(t, g, weighted=True), mean_f1(sample.true, rival, weighted=True), strongest),
        *(_repeated(sample, key) for key in sorted(sample.guesses)),
    ]
    counts = sum((confusion(sample.true, one, count) for one in guesses), np.zeros((count, count), dtype=np.int64))
    doubts = [f"Only {patients} patients are scored: the interval is wide."] if patients < FEW else []
    if lift.low is not None and lift.low <= 0:
        doubts.append(f"Not told apart from the baseline '{strongest}': the trained model may add nothing to it.")
    matrix = Confusion(classes=sample.classes, counts=counts, accuracy=accuracy, baselines=accuracies)
    return new(site="", headline=headline, metrics=tuple(metrics), confusion=matrix, caveats=(*caveats, *doubts))


def _repeated(sample: Sample, key: tuple[str, str]) -> Metric:
    """Accuracy of one probe on one set of features, its interval over repeats."""
    each = (sample.guesses[key] == sample.true).mean(1)
    low, high = (min(max(end, 0.0), 1.0) for end in ends) if (ends := student(each)) else (None, None)
    name = f"accuracy, {key[0] or 'trained model'}, {key[1]}"
    note = f"interval over {_times(len(each))}" if len(each) > 1 else "one run, no randomness"
    return Metric(name=name, value=float(each.mean()), low=low, high=high, n=len(each), note=note)


def at_site(sample: Sample, new: Callable[..., Finding], site: str, prior: float | None) -> Finding:
    """The finding at one site: recall against ``prior``, the share of its class, or accuracy where that is ``None``."""
    own = sample.best("")
    rivals = {name: sample.accuracy(sample.best(name)) for name in sample.baselines}
    if prior is None:
        rivals[MAJORITY] = float(np.bincount(sample.true).max() / len(sample.true))
    else:
        rivals["share of the site"] = prior
    strongest = max(rivals, key=lambda name: rivals[name])
    patients, value = len(set(sample.patient.tolist())), sample.accuracy(own)
    low, high = clopper_pearson(value * patients, patients)
    headline = Metric(
        name="accuracy" if prior is None else "recall",
        value=value,
        low=low,
        high=high,
        n=len(sample.true),
        null=rivals[strongest],
        null_name=strongest,
        note=own[1],
    )
    caveats = (f"Only {patients} patients are scored: the interval is wide.",) if patients < FEW else ()
    return new(site=site, headline=headline, metrics=(headline,), caveats=caveats)


def _times(repeats: int) -> str:
    return "1 repeat" if repeats == 1 else f"{repeats} repeats"
