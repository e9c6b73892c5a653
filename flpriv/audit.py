"""The whole way: run the federations, attack the captures, measure the claims, judge, report. Every step resumes."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flpriv import data, engine, jobs, risk, verdicts
from flpriv.arrangement import FEDERATED
from flpriv.attack import Attack
from flpriv.canary import planted
from flpriv.claim import Goal
from flpriv.claims import Outcome, load_outcome, save_outcome
from flpriv.errors import FlprivError, RunError, ScenarioError, ThreatError
from flpriv.files import private_folder
from flpriv.finding import Event, Finding, Level, SettingResult, SiteSummary, Verdict
from flpriv.knowledge import Knowledge, gather, labels, truth
from flpriv.measures import measure
from flpriv.recipe import LocalRecipe
from flpriv.registry import create, plugins
from flpriv.runfolder import RunFolder
from flpriv.scenario import UNDEFENDED, Scenario, Setting
from flpriv.scratch import scratch
from flpriv.seeds import derive
from flpriv.store import open_capture, write_canaries, write_knowledge, write_labels
from flpriv.threat import DESCRIPTIONS, Can, threat
from flpriv.witness import Witness, read_witnesses

if TYPE_CHECKING:
    from torch import nn

    from flpriv.finding import Metric
    from flpriv.truth import Truth

MADE_WITH = ("flpriv", "flwr", "torch", "monai", "opacus", "numpy", "ray")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One federation to run, or one attack on it: plain data, so that another process can do it.

    Args:
        scenario: the whole scenario.
        setting: the federation.
        folder: the setting's folder.
        attack: label of the attack; empty to run the federation.
        resume: go on with an interrupted federation.
    """

    scenario: Scenario
    setting: Setting
    folder: Path
    attack: str = ""
    resume: bool = False

    def __str__(self) -> str:
        return f"{self.attack} on {self.setting.id}" if self.attack else self.setting.id

    @property
    def outcome(self) -> Path:
        """Where the attack's claims lie."""
        return self.folder / "claims" / self.attack


def run(scenario: Scenario, *, out: Path, resume: bool = False, command: str = "", workers: int = 1) -> Verdict:
    """Audit a federation from images to verdict; everything is kept under ``out``.

    Finished federations and attacks of an interrupted run are not repeated with ``resume``.

    Args:
        scenario: what to audit.
        out: the run's folder.
        resume: go on with the run in ``out``, if there is one.
        command: the command line, for the report.
        workers: processes that run federations and attacks side by side; a federation on Flower's simulation has its own.

    Raises:
        FlprivError: for anything the user can mend; a failing attack is a failed finding instead.
    """
    check(scenario)
    folder = RunFolder.create(out, scenario, command=command, resume=resume)
    knowledge = gather(scenario)
    todo = [
        Job(scenario=scenario, setting=setting, folder=private_folder(folder.setting(setting)), resume=resume)
        for setting in scenario.settings()
        if not (folder.setting(setting) / "result.json").is_file()
    ]
    side_by_side = workers if scenario.engine == "inline" else 1
    jobs.run(_federate, todo, what="federations", name=str, workers=side_by_side)
    for setting in scenario.settings():
        _inform(scenario, setting, folder.setting(setting), knowledge)
    return attack(folder, scenario=scenario, knowledge=knowledge, workers=workers)


def attack(
    folder: RunFolder,
    names: Sequence[str] = (),
    *,
    scenario: Scenario | None = None,
    knowledge: Knowledge | None = None,
    workers: int = 1,
) -> Verdict:
    """Attack stored captures: those attacks not done yet, and again those in ``names``; then measure and judge all.

    Raises:
        ScenarioError: if the scenario has no attack of a given name.
        RunError: if a federation has not finished.
    """
    scenario = scenario or folder.scenario()
    knowledge = knowledge or gather(scenario)
    for name in names:
        scenario.attack(name)
    settings = scenario.settings()
    for setting in settings:
        if not (folder.setting(setting) / "result.json").is_file():
            again = f"flpriv run --resume --out {folder.path}"
            raise RunError(f"the federation {setting.id!r} has not finished; go on with: {again}")
    everything = [
        Job(scenario=scenario, setting=setting, folder=folder.setting(setting), attack=label)
        for setting in settings
        for label in setting.attacks
    ]
    todo = [job for job in everything if job.attack in names or load_outcome(job.outcome) is None]
    jobs.run(_attack, todo, what="attacks", name=str, workers=workers)
    findings: list[Finding] = []
    results = []
    for setting in settings:
        witnesses = read_witnesses(folder.setting(setting))
        facts = truth(scenario, knowledge, witnesses, planted=planted(scenario, setting))
        results.append(_result(scenario, setting, folder.setting(setting), witnesses))
        for job in everything:
            if job.setting is setting:
                findings += _measure(job, facts)
    verdict = _verdict(scenario, folder, findings, results)
    verdicts.save(verdict, folder.path)
    return verdict


def check(scenario: Scenario) -> None:
    """Make everything the scenario names once, so that a wrong option is told before anything runs; no image is read.

    Raises:
        ScenarioError: naming the name or option that is wrong, or an active attack that the threat model does not allow, or that
            is on secure aggregation where there is none.
        DataError: naming the file, row, site or patient that is wrong.
    """
    for attack_spec in scenario.attacks:
        made = create("attacks", attack_spec.attack, attack_spec.options, files=scenario.plugins)
        if made.secure_aggregation and scenario.federation.secure_aggregation is None:
            raise ScenarioError(
                f"attacks.{attack_spec.label}: {made.name!r} attacks secure aggregation; set federation.secure_aggregation = true"
            )
    for defense_spec in scenario.defenses:
        create("defenses", defense_spec.defense, defense_spec.options, files=scenario.plugins)
    engine.check(scenario)
    threat = scenario.threat
    for setting in scenario.settings():
        data.task(scenario, setting.defenses).build()
        _check_members(scenario, setting)
        if setting.trap and Can.TAMPER not in threat.granted:
            raise ScenarioError(
                f"attacks.{setting.trap}: an active attack needs 'tamper', which threat.model = {threat.name!r} does not grant; "
                "use threat.model = 'malicious-server' or threat.grant = ['tamper']"
            )


def _check_members(scenario: Scenario, setting: Setting) -> None:
    """Candidates count as members by whether their site trains; where one site trains alone that would be wrong."""
    if setting.arrangement != "siloed":
        return
    for spec in map(scenario.attack, setting.attacks):
        if create("attacks", spec.attack, spec.options, files=scenario.plugins).goal is Goal.MEMBERSHIP:
            rest = [stack for stack in scenario.compare if stack != setting.defense]
            raise ScenarioError(
                f"attacks.{spec.label}: under {setting.defense!r} one site trains alone, and candidates of the others would "
                f"count as members; name the stacks to run it against, e.g. attacks.{spec.label}.against = {json.dumps(rest)}"
            )


def _federate(job: Job) -> None:
    engine.run(job.scenario, job.setting, folder=job.folder, resume=job.resume)


def _inform(scenario: Scenario, setting: Setting, folder: Path, knowledge: Knowledge) -> None:
    """Lay the adversary's side knowledge beside its capture, as far as the threat model grants it, and the auditor's canaries."""
    capture = folder / "capture"
    if knowledge.public is not None:
        write_knowledge(capture, "public", knowledge.public)
    write_knowledge(capture, "candidates", knowledge.candidates)
    write_knowledge(capture, "exposed", knowledge.exposed)
    witnesses, sown = read_witnesses(folder), planted(scenario, setting)
    write_labels(capture, labels(scenario, witnesses, planted=sown))
    if sown is not None:
        node_of = {witness.site: witness.node for witness in witnesses}
        write_canaries(capture, replace(sown.canaries, nodes=tuple(node_of.get(site, -1) for site in sown.sites)))


def _attack(job: Job) -> None:
    """Run one attack and store what came of it; whatever it raises becomes a failed outcome."""
    start = time.perf_counter()
    try:
        outcome = _outcome(job)
    except ThreatError as error:
        outcome = Outcome(status="not granted", message=str(error))
    except Exception as error:
        message = str(error) if isinstance(error, FlprivError) else f"{type(error).__name__}: {error}"
        outcome = Outcome(status="failed", message=message)
    save_outcome(job.outcome, replace(outcome, seconds=time.perf_counter() - start))


def _outcome(job: Job) -> Outcome:
    scenario, setting, spec = job.scenario, job.setting, job.scenario.attack(job.attack)
    made: Attack = create("attacks", spec.attack, spec.options, files=scenario.plugins)
    capture = open_capture(job.folder / "capture", task=data.task(scenario, setting.defenses))
    if setting.trap:
        delivered = tuple(seen for seen in capture.observations if seen.trap == setting.trap)
        events = [str(event["what"]) for event in _ran(job.folder)["events"]]
        refusals = [what.removeprefix("refused: ") for what in events if what.startswith("refused: ")]
        if not delivered and refusals:
            return Outcome(status="refused", message=refusals[0])
        capture = replace(capture, observations=delivered)
    with scratch(job.outcome / "scratch", shared=job.folder.parent.parent / "shared"):
        claims = made(capture, seed=derive(scenario.seed, "attack", spec.label))
    return Outcome(claims=claims) if claims else Outcome(status="failed", message="the attack made no claim")


def _ran(folder: Path) -> dict[str, Any]:
    """What the ServerApp wrote at the end of a federation."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def _measure(job: Job, facts: Truth) -> list[Finding]:
    spec, outcome = job.scenario.attack(job.attack), load_outcome(job.outcome)
    if outcome is None:
        raise RunError(f"{job.outcome}: the attack left no outcome; attack again with: flpriv attack RUN_DIR {job.attack}")
    made: Attack = create("attacks", spec.attack, spec.options, files=job.scenario.plugins)
    bare = Finding(
        attack=spec.label,
        name=spec.attack,
        goal=made.goal,
        setting=job.setting.id,
        defense=job.setting.defense,
        status=outcome.status,
        message=outcome.message,
    )
    found = [bare]
    if outcome.status == "ok":
        try:
            found = measure(
                outcome.claims,
                facts,
                attack=bare.attack,
                name=bare.name,
                goal=bare.goal,
                setting=bare.setting,
                defense=bare.defense,
            )
        except FlprivError as error:
            found = [replace(bare, status="failed", message=str(error))]
    return [risk.judge(replace(finding, seconds=outcome.seconds)) for finding in found]


def _result(scenario: Scenario, setting: Setting, where: Path, witnesses: Sequence[Witness]) -> SettingResult:
    ran = _ran(where)
    names = {witness.node: witness.site for witness in witnesses}
    real = {node.name for node in data.nodes(scenario, setting.arrangement)}
    events = tuple(Event(round=int(e["round"]), who=_named(e["who"], names), what=str(e["what"])) for e in ran.get("events", ()))
    events = tuple(event for event in events if event.who in real or not event.what.startswith("not evaluated:"))
    epsilon: dict[str, float] = {}
    for witness in witnesses:
        for notes in witness.notes.values():
            if "epsilon" in notes and witness.site in real:
                epsilon[witness.site] = max(epsilon.get(witness.site, 0.0), float(notes["epsilon"]))
    return SettingResult(
        id=setting.id,
        defense=setting.defense,
        nodes=tuple(node.name for node in data.nodes(scenario, setting.arrangement)),
        trap=setting.trap,
        recipe=in_words(setting.local),
        rounds=setting.rounds,
        utility=_utility(scenario, setting, where, "test"),
        train_utility=_utility(scenario, setting, where, "train"),
        armed_utility=_armed_utility(scenario, setting, where),
        epsilon=epsilon,
        seconds=float(ran.get("seconds", 0.0)),
        events=events,
    )


def _utility(scenario: Scenario, setting: Setting, where: Path, split: Any) -> tuple[Metric, ...]:
    """Metrics of the final model on one split of all sites; the auditor may look, the adversary may not."""
    from safetensors.torch import load_file

    model = data.task(scenario, setting.defenses).build()
    model.load_state_dict(load_file(where / "final.safetensors"), strict=True)
    return _tried(model, scenario, split)


def _armed_utility(scenario: Scenario, setting: Setting, where: Path) -> tuple[Metric, ...]:
    """What a site would see that tries the trapped model it received, beside the honest model of that round."""
    import torch

    if not setting.trap:
        return ()
    spec, task = scenario.attack(setting.trap), data.task(scenario, setting.defenses)
    capture = open_capture(where / "capture", task=task)
    delivered = [seen for seen in capture.observations if seen.trap == setting.trap and seen.nodes]
    delivered = [seen for seen in delivered if seen.round <= len(capture.models)]
    if not delivered:
        return ()
    seen, honest = delivered[-1], capture.models[delivered[-1].round - 1]
    made: Attack = create("attacks", spec.attack, spec.options, files=scenario.plugins)
    rng = torch.Generator().manual_seed(derive(scenario.seed, "trap", spec.label))
    trap = made.aim(task, public=capture.public, candidates=capture.candidates, rng=rng)
    node = seen.nodes[0] if seen.node is None else seen.node
    sent = trap.arm(honest, round=seen.round, node=node, nodes=seen.nodes) if trap is not None else None
    if sent is None:
        return ()
    model, armed = task.build(), made.architecture(task.build(), task)
    model.load_state_dict(dict(honest))
    armed.load_state_dict(dict(sent))
    without = {metric.name: metric.value for metric in _tried(model, scenario, "test")}
    return tuple(
        replace(metric, null=without[metric.name], null_name="honest model") for metric in _tried(armed, scenario, "test")
    )


def _tried(model: nn.Module, scenario: Scenario, split: Any) -> tuple[Metric, ...]:
    """Metrics of a model on one split of all sites, none where that is empty."""
    import torch

    from flpriv.measures.utility import utility

    model.eval()
    parts = [data.records(scenario, index, split) for index in range(len(data.sites(scenario)))]
    parts = [part for part in parts if len(part)]
    if not parts:
        return ()
    with torch.inference_mode():
        logits = torch.cat([model(batch) for part in parts for batch in torch.split(part.images, 64)])
    patients = [patient for part in parts for patient in part.patients]
    return utility(logits, torch.cat([part.labels for part in parts]), patients, seed=derive(scenario.seed, "utility"))


def _verdict(scenario: Scenario, folder: RunFolder, findings: Sequence[Finding], results: Sequence[SettingResult]) -> Verdict:
    threat = scenario.threat
    level, sentence = risk.sentence(findings, threat.name)
    task = data.task(scenario)
    shape = " x ".join(map(str, task.shape))
    return Verdict(
        title=scenario.name,
        sentence=sentence,
        level=level,
        threat=threat.name,
        adversary=tuple(threat.lines()),
        task=f"{task.modality}, {shape} pixels, classes {', '.join(task.classes)}, model {task.model}",
        sites=summaries(scenario),
        settings=tuple(results),
        findings=tuple(sorted(findings, key=lambda f: bool(f.site))),
        caveats=(*_hidden(scenario), *risk.caveats(findings, results, same_as_undefended=_inactive(scenario, folder))),
        methods=_methods(scenario),
        provenance={
            "command": folder.command(),
            "seed": str(scenario.seed),
            "engine": scenario.engine,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "python": platform.python_version(),
            **{name: _version(name) for name in MADE_WITH},
        },
        scenario=json.dumps(scenario.tables(), indent=2),
    )


def summaries(scenario: Scenario) -> tuple[SiteSummary, ...]:
    """Each site in numbers; no image is read."""
    classes = data.source(scenario).classes
    found = []
    for site in data.sites(scenario):
        found.append(
            SiteSummary(
                name=site.name,
                patients=len({entry.patient for entry in site.entries}),
                train=len(site.select("train")),
                test=len(site.select("test")),
                public=len(site.select("public")),
                classes={name: sum(entry.label == label for entry in site.entries) for label, name in enumerate(classes)},
            )
        )
    return tuple(found)


def in_words(recipe: LocalRecipe) -> str:
    """``"1 step of batch 4, SGD, learning rate 0.05"``."""
    if recipe.steps is not None:
        length = f"{recipe.steps} step{'s' if recipe.steps > 1 else ''} of batch {recipe.batch_size}"
    else:
        length = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''} of batch {recipe.batch_size}"
    extra = f", momentum {recipe.momentum:g}" if recipe.momentum else ""
    mode = "" if recipe.train_mode else ", eval mode"
    return (
        f"{length}, {recipe.optimizer.upper() if recipe.optimizer == 'sgd' else 'Adam'}, learning rate {recipe.lr:g}{extra}{mode}"
    )


def failed(verdict: Verdict) -> bool:
    """Whether any attack failed."""
    return any(finding.status == "failed" for finding in verdict.findings)


def reaches(verdict: Verdict, level: Level) -> bool:
    """Whether the undefended federation is at ``level`` or worse."""
    return verdict.level >= level


def not_granted(verdict: Verdict) -> tuple[str, ...]:
    """What the adversary could not see or do, in plain words."""
    return tuple(text for text in DESCRIPTIONS.values() if text not in verdict.adversary)


def _inactive(scenario: Scenario, folder: RunFolder) -> list[str]:
    """Defences under which the shared federation ended with the very weights of the undefended one, though they act on them."""
    known = plugins("defenses", files=scenario.plugins)
    shared = {
        s.defense: folder.setting(s) / "final.safetensors"
        for s in scenario.settings()
        if s.id == s.defense and s.arrangement == FEDERATED
    }
    if UNDEFENDED not in shared:
        return []
    bare = shared.pop(UNDEFENDED).read_bytes()
    return [
        stack
        for stack, final in shared.items()
        if any(
            known[scenario.defense(label).defense].load().acts_on not in ("received", "protocol") for label in stack.split("+")
        )
        and final.read_bytes() == bare
    ]


def _hidden(scenario: Scenario) -> list[str]:
    """What secure aggregation took from the threat model that was asked for, and where it does not hold what it promises."""
    secure, found = scenario.federation.secure_aggregation, []
    if secure is None:
        return []
    if Can.SEE_UPDATES in threat(scenario.threat.name, deny=scenario.threat_table.deny).granted:
        found.append(
            f"Secure aggregation hides single updates: '{scenario.threat.name}' saw only sums here, each site's number of images "
            "and metrics, and what an attack on the protocol opened."
        )
    if secure.shares(len(data.sites(scenario))) <= 3:
        found.append(
            "Each site shares masks with one or two others alone. Flower draws them from 28 bits, and whoever sees masked "
            "updates can try them all; raise federation.secure_aggregation.num_shares, or count single updates as seen."
        )
    return found


def _methods(scenario: Scenario) -> dict[str, tuple[str, str]]:
    known: Iterable[tuple[str, Any]] = [
        *((a.label, plugins("attacks", files=scenario.plugins)[a.attack]) for a in scenario.attacks),
        *((d.label, plugins("defenses", files=scenario.plugins)[d.defense]) for d in scenario.defenses),
    ]
    return {label: (plugin.summary, plugin.paper) for label, plugin in known}


def _named(who: object, names: dict[int, str]) -> str:
    text = str(who)
    return f"{names[int(text)]}" if text.isdigit() and int(text) in names else text


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
