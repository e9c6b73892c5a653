"""From numbers to words: levels with stated thresholds, and caveats that doubt the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flpriv.arrangement import arrangement_of, undefended
from flpriv.claim import Goal
from flpriv.finding import Finding, Level, Metric, SettingResult

Rule = tuple[Level, str]


def judge(finding: Finding) -> Finding:
    """The finding with its level and the rule that gave it. Levels go by the cautious end of an interval where there is one.

    A failed attack stays ``UNKNOWN``; one that a defence refused or the threat model forbids is ``NONE``.
    """
    if finding.status == "failed":
        return replace(finding, level=Level.UNKNOWN, threshold="the attack failed, so nothing is known")
    if finding.status in ("refused", "not granted"):
        return replace(finding, level=Level.NONE, threshold=f"{finding.status}: the attack could not be mounted")
    if finding.headline is None or finding.headline.value is None:
        return replace(finding, level=Level.UNKNOWN, threshold="the sample cannot resolve it")
    rules = {
        Goal.RECONSTRUCTION: _reconstruction,
        Goal.MEMBERSHIP: _membership,
        Goal.ATTRIBUTE: _attribute,
        Goal.PRIVACY_BOUND: _privacy_bound,
    }
    level, threshold = rules[finding.goal](finding, finding.headline, finding.headline.value)
    return replace(finding, level=level, threshold=threshold)


def worst(findings: Sequence[Finding]) -> Finding | None:
    """The finding with the highest level, of several by the same measure the one that measured most; ``None`` for no findings."""
    first = max(findings, key=lambda finding: finding.level, default=None)
    if first is None or first.headline is None:
        return first
    name = first.headline.name
    alike = [f for f in findings if f.level == first.level and f.headline is not None and f.headline.name == name]
    return max(alike, key=lambda finding: (finding.headline and finding.headline.value) or 0.0)


def sentence(findings: Sequence[Finding], adversary: str) -> tuple[Level, str]:
    """The verdict over the findings without a defence: level, and one sentence a privacy officer can act on."""
    base = undefended(f.defense for f in findings)
    plain = [f for f in findings if f.defense == base and not f.site]
    top = worst(plain)
    if top is None or top.level is Level.UNKNOWN:
        failed = sorted({f.attack for f in plain if f.status == "failed"})
        because = f"attacks failed: {', '.join(failed)}" if failed else "no attack gave a number"
        return Level.UNKNOWN, f"No verdict: {because}."
    if top.level is Level.NONE:
        return (
            Level.NONE,
            f"The {adversary} adversary learned nothing that these attacks could measure from the undefended federation.",
        )
    text = f"The {adversary} adversary reaches a {top.level.name.lower()} risk on the undefended federation: {_says(top)}."
    stopped = sorted(
        {
            f.defense
            for f in findings
            if not f.site
            and f.defense != base
            and f.attack == top.attack
            and f.level <= Level.LOW
            and arrangement_of(f.defense) == arrangement_of(base)
        }
    )
    if Level.UNKNOWN in {f.level for f in plain}:
        text += " Some attacks gave no result."
    if stopped:
        text += f" {_listed(stopped)} brought this attack down to low or none."
    return top.level, text


def caveats(
    findings: Sequence[Finding], settings: Sequence[SettingResult], *, same_as_undefended: Sequence[str] = ()
) -> list[str]:
    """Reasons to doubt the results as a whole: inactive defences, failed attacks, passive attacks that beat active ones."""
    found = [
        f"The defence '{label}' changed nothing: the final model is bit for bit the undefended one."
        for label in same_as_undefended
    ]
    for finding in findings:
        if finding.status == "failed" and not finding.site:
            found.append(f"The attack '{finding.attack}' failed on '{finding.setting}': {finding.message}")
        if finding.level is Level.CRITICAL and finding.goal is Goal.PRIVACY_BOUND and finding.headline is not None:
            value, claimed = finding.headline.value or 0.0, finding.headline.null or 0.0
            found.append(
                f"The epsilon that '{finding.defense}' claims is wrong: {claimed:.2f}, and '{finding.attack}' measured at least "
                f"{value:.2f}."
            )
    for setting in settings:
        if lost := sum(not event.what.startswith(("refused:", "not evaluated:")) for event in setting.events):
            replies = "1 reply was" if lost == 1 else f"{lost} replies were"
            found.append(f"In the federation '{setting.id}' {replies} lost or unusable; see its events.")
    if _passive_beats_active(findings, settings):
        found.append(
            "A passive attack surely recovers more than the active one; the active one may be badly tuned for these images."
        )
    return found


def _passive_beats_active(findings: Sequence[Finding], settings: Sequence[SettingResult]) -> bool:
    traps = {setting.id: setting.trap for setting in settings}
    base = undefended(f.defense for f in findings)
    plain = [f for f in findings if f.defense == base and not f.site and f.goal is Goal.RECONSTRUCTION and f.headline]
    active = [f.headline.high for f in plain if f.headline and f.headline.high is not None and traps.get(f.setting)]
    passive = [f.headline.low for f in plain if f.headline and f.headline.low is not None and not traps.get(f.setting)]
    return bool(active and passive) and max(passive) > max(active)


def _reconstruction(finding: Finding, headline: Metric, value: float) -> Rule:
    null = headline.best_null or 0.0
    if value > null and value >= 0.5:
        return Level.CRITICAL, "half of the images or more are recovered"
    if value > null and value >= 0.1:
        return Level.HIGH, "a tenth of the images or more is recovered"
    if value > null:
        return Level.MEDIUM, "some image is recovered"
    found = next((m for m in finding.metrics if m.name.startswith("re-identification")), None)
    if found is not None and found.low is not None and found.best_null is not None:
        if found.low >= found.best_null + 0.25:
            return Level.MEDIUM, "no image is recovered, but a quarter of the reconstructions or more surely find their patient"
        if found.low > found.best_null:
            return Level.LOW, "no image is recovered, but reconstructions find their patients more often than the null"
    return Level.NONE, "no image is recovered beyond the null"


def _membership(finding: Finding, headline: Metric, value: float) -> Rule:
    low = value if headline.low is None else headline.low
    strict = [m.low for m in finding.metrics if m.name.startswith("TPR at 0.1") and m.low is not None]
    if low >= 0.7 or any(x >= 0.05 for x in strict):
        return Level.HIGH, "AUC surely ≥ .70, or TPR at 0.1 % FPR surely ≥ 5 %"
    if low >= 0.6:
        return Level.MEDIUM, "AUC surely ≥ .60"
    if low > 0.5:
        return Level.LOW, "AUC surely above chance"
    return Level.NONE, "AUC not distinguishable from chance"


def _attribute(finding: Finding, headline: Metric, value: float) -> Rule:
    low = value if headline.low is None else headline.low
    lift = low - (headline.null or 0.0)
    if lift >= 0.3:
        return Level.HIGH, "surely 30 points or more above the best baseline"
    if lift >= 0.1:
        return Level.MEDIUM, "surely 10 points or more above the best baseline"
    if lift > 0:
        return Level.LOW, "surely above the best baseline"
    return Level.NONE, "not distinguishable from the best baseline: the model adds nothing to it"


def _privacy_bound(finding: Finding, headline: Metric, value: float) -> Rule:
    if headline.null is not None and value > headline.null:
        return Level.CRITICAL, "the measured bound exceeds the claimed epsilon: the claim is false"
    found = {metric.name: metric for metric in finding.metrics}
    area, allowed = found.get("AUC of canaries"), found.get("largest AUC allowed")
    if area and allowed and area.low is not None and allowed.value is not None and area.low > allowed.value:
        return Level.HIGH, "canaries are surely told better than a Gaussian mechanism of the claimed epsilon allows"
    if value >= 3:
        return Level.MEDIUM, "measured epsilon ≥ 3"
    return (Level.LOW, "measured epsilon above 0") if value > 0 else (Level.NONE, "no leakage measured")


def _says(finding: Finding) -> str:
    metric = finding.headline
    assert metric is not None and metric.value is not None
    value = _number(metric, metric.value)
    what = {
        Goal.RECONSTRUCTION: f"rebuilds {value} of the attacked images ({metric.name.removeprefix('fraction at ')})",
        Goal.MEMBERSHIP: f"tells who took part with an {metric.name} of {value}",
        Goal.ATTRIBUTE: _attribute_says(metric, value),
        Goal.PRIVACY_BOUND: f"measures {metric.name} {value}",
    }[finding.goal]
    null = f"; {metric.null_name}: {_number(metric, metric.null)}" if metric.null is not None else ""
    return f"'{finding.attack}' {what}{null}"


def _attribute_says(metric: Metric, value: str) -> str:
    if metric.name == "AUC":
        return f"tells updates of records with the property with an AUC of {value}"
    if metric.name.startswith("R²"):
        return f"estimates ages with an R² of {value}"
    return f"guesses right for {value} of {'training' if 'on members' in metric.name else 'held-out'} images"


def _number(metric: Metric, value: float) -> str:
    if metric.unit == "%" or metric.name.startswith(("fraction", "accuracy")):
        return f"{100 * value:.0f} %"
    return f"{value:.2f}{' ' + metric.unit if metric.unit else ''}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]
