"""Source: of the records that were trained on, how many are traced to the hospital they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from flpriv.claim import Attribute
from flpriv.errors import ClaimError
from flpriv.finding import Finding
from flpriv.measures.attribute import Sample, at_site, overall
from flpriv.records import Records
from flpriv.truth import Truth

SOURCE = "source"
"""The attribute whose classes are nodes."""
LABEL = ("label alone", "most frequent site of the label")
"""What somebody guesses who knows a record's label and how labels lie at the sites, and has no model."""


def findings(claims: Sequence[Attribute], truth: Truth, new: Callable[..., Finding], *, seed: int) -> list[Finding]:
    """One finding over all nodes, then one for each: its recall. Nodes bear the names of their sites, or of an arrangement.

    Scored on candidates that were trained on, for nobody else has a source. Nodes are translated to sites; a guess of a node
    whose site is not known is wrong. Beside the share of the largest site stand chance, one in the number of clients claimed
    about, and the label alone: where sites' class shares differ, a local model prefers its site's labels. So does the null of a
    site's recall: its share among records of the same label. One claim says what one round tells; accuracies of several rounds
    are not to be compared for the best of them.

    Raises:
        ClaimError: for several claims, one of a wrong size, or where no member's site is known.
    """
    if len(claims) != 1:
        raise ClaimError(f"source claims: {len(claims)} claims; fix the round beforehand and make one")
    (claim,) = claims
    if truth.members is None or truth.candidates is None or "site" not in truth.candidates.attributes:
        raise ClaimError("source cannot be measured: it is not known which candidates were trained on, and where")
    count = len(truth.candidates)
    if claim.probabilities.shape != (count, len(claim.classes)):
        shape = tuple(claim.probabilities.shape)
        raise ClaimError(
            f"source claim: probabilities of shape {shape}, expected ({count}, {len(claim.classes)}): candidates, nodes"
        )
    site = np.asarray(_trained_at(truth.candidates, truth))
    rows = truth.members.numpy().astype(bool) & (site != "")
    if not rows.any():
        raise ClaimError("source cannot be measured: no candidate was trained on at a site that is known")
    named = {str(node): name for node, name in truth.site_of.items()}
    guessed = [named.get(node, f"node {node}") for node in claim.classes]
    classes = tuple(dict.fromkeys([*guessed, *sorted(set(site[rows].tolist()))]))
    codes = np.array([classes.index(name) for name in guessed], dtype=np.int64)
    ids = truth.candidates.patients or tuple(str(i) for i in range(count))
    true = np.array([classes.index(name) for name in site[rows]], dtype=np.int64)
    labels = truth.candidates.labels.numpy()[rows]
    by_label = {label: np.bincount(true[labels == label]).argmax() for label in set(labels.tolist())}
    sample = Sample(
        classes=classes,
        true=true,
        guesses={
            ("", claim.probe): codes[claim.probabilities.argmax(1).cpu().numpy()][None, rows],
            LABEL: np.array([[by_label[label] for label in labels.tolist()]], dtype=np.int64),
        },
        site=site[rows],
        patient=np.asarray(ids)[rows],
    )
    caveats = []
    if absent := sorted(set(site[rows].tolist()) - set(guessed)):
        caveats.append(f"No reply of {', '.join(absent)} was compared; records from there count as wrong.")
    found = overall(sample, new, caveats, seed=seed)
    headline = found.headline and replace(
        found.headline,
        name="accuracy on members",
        second_null=1 / len(claim.classes),
        second_null_name=f"chance, 1 in {len(claim.classes)} clients",
    )
    metrics = (*((headline,) if headline else ()), *found.metrics[1:])
    found_at = []
    for name in sorted(set(sample.site.tolist())):
        here = sample.site == name
        prior = np.mean([np.mean(here[labels == label]) for label in labels[here].tolist()])
        own = replace(sample.take(here), guesses={key: guess[:, here] for key, guess in sample.guesses.items() if key != LABEL})
        finding = at_site(own, new, name, float(prior))
        recall = finding.headline and replace(finding.headline, null_name="share of the site among the same labels")
        found_at.append(replace(finding, headline=recall, metrics=(recall,) if recall else ()))
    return [replace(found, headline=headline, metrics=metrics), *found_at]


def _trained_at(candidates: Records, truth: Truth) -> list[str]:
    """Whose node each candidate was trained at: as witnessed, else its own site's where that took part."""
    seen = {id: truth.site_of[node] for (_, node), used in truth.used.items() if node in truth.site_of for id in used.ids}
    taking_part = set(truth.site_of.values())
    sites = [site if site in taking_part else "" for site in candidates.attributes.get("site", ("",) * len(candidates))]
    return [seen.get(id, site) for id, site in zip(candidates.ids or ("",) * len(candidates), sites, strict=True)]
