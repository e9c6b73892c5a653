"""One TOML file says it all: parsed, checked at the border, frozen. Nothing here imports torch."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from flpriv.arrangement import FEDERATED, RESERVED, Arrangement, arrangement_of
from flpriv.errors import ScenarioError, near
from flpriv.recipe import LocalRecipe
from flpriv.registry import Kind, plugins, validate
from flpriv.secure_aggregation import SecureAggregation
from flpriv.site import SplitPlan
from flpriv.threat import NAMED, Can, Threat, capability, threat

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
UNDEFENDED = "none"
KEYS = frozenset(
    ("name", "seed", "engine", "plugins", "compare", "root", "sites", "model", "federation", "threat", "attacks", "defenses")
)
EngineName = Literal["inline", "simulation"]


@dataclass(frozen=True, kw_only=True)
class SitesTable:
    """``[sites]``: where the images are. Further keys are the source's own options.

    Args:
        source: registered name of the source.
        split: patient-level split where the source has none.
        options: the source's own fields.
    """

    source: str = "phantom"
    split: SplitPlan = SplitPlan()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    """``[model]``: what is trained. Further keys are the model's own options.

    Args:
        name: registered name, or import path ``"package.module:factory"``.
        mean: subtracted from images in [0, 1].
        std: divides them after that, > 0.
        options: the model's own fields.
    """

    name: str = "cnn"
    mean: float = 0.0
    std: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FederationTable:
    """``[federation]``: how it trains.

    Args:
        rounds: number of rounds, ≥ 1.
        strategy: a strategy of Flower by class name (``"FedAvg"``, ``"Krum"``), a registered one, or an import path.
        options: keyword arguments of the strategy, ``[federation.options]``.
        local: the local recipe, ``[federation.local]``.
        timeout: seconds to wait for a round's replies.
        secure_aggregation: training runs Flower's SecAgg+ protocol with these options; ``true`` takes them as they come, and
            ``None`` or ``false`` leaves it out.
        silo: name of the site that trains alone where ``compare`` asks for ``"siloed"``; the one with most training records if
            not given.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rounds: Annotated[int, Field(ge=1)] = 3
    strategy: str = "FedAvg"
    options: Mapping[str, Any] = field(default_factory=dict)
    local: LocalRecipe = LocalRecipe()
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    secure_aggregation: SecureAggregation | None = None
    silo: str | None = None


@dataclass(frozen=True, kw_only=True)
class ThreatTable:
    """``[threat]``: the adversary.

    Args:
        model: a named threat model.
        grant: capabilities added by name.
        deny: capabilities taken away by name.
        tamper_rounds: rounds in which a malicious operator delivers its trap.
        victims: to how many sites it delivers it, the first of those that take part; all where not given.
        exposed: share of each site's training records the adversary holds with their site, for attribute inference.
        candidates: at most this many records are asked about, half of them members.
        canary_site: name of the site at which an audit plants its canaries, the first where empty.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str = "honest-but-curious"
    grant: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    tamper_rounds: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    victims: Annotated[int, Field(ge=1)] | None = None
    exposed: Annotated[float, Field(gt=0, lt=1)] = 0.1
    candidates: Annotated[int, Field(ge=4)] = 2000
    canary_site: str = ""


@dataclass(frozen=True, kw_only=True)
class OwnFederation:
    """``[attacks.LABEL.federation]``: the attack gets a federation of its own that differs in these.

    Args:
        rounds: number of rounds, ≥ 1.
        local: changes to the local recipe.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rounds: Annotated[int, Field(ge=1, strict=True)] | None = None
    local: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    """``[attacks.LABEL]``: one attack. Further keys are the attack's own options.

    Args:
        label: the table's name.
        attack: registered name; the label where not given.
        local: the local recipe of a federation of its own, ``None`` to read the shared one.
        rounds: number of rounds of a federation of its own.
        against: which stacks of ``compare`` it is run against; all of them where not given.
        options: the attack's own fields.
    """

    label: str
    attack: str
    local: LocalRecipe | None = None
    rounds: int | None = None
    against: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DefenseSpec:
    """``[defenses.LABEL]``: one defence. Further keys are the defence's own options."""

    label: str
    defense: str
    options: Mapping[str, Any] = field(default_factory=dict)


Spec = TypeVar("Spec", AttackSpec, DefenseSpec)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One federation to run: a stack of defences, at most one trap, a local recipe.

    Args:
        id: folder name.
        defense: labels of the defences and at most one arrangement joined by ``+``, or ``"none"``.
        trap: label of the active attack whose trap is delivered, or empty.
        local: the local recipe.
        rounds: number of rounds.
        attacks: labels of the attacks that read its capture.
        canaries: label of the attack whose canaries are planted in it, or empty.
    """

    id: str
    defense: str
    trap: str
    local: LocalRecipe
    rounds: int
    attacks: tuple[str, ...]
    canaries: str = ""

    @property
    def defenses(self) -> tuple[str, ...]:
        """Labels of the stacked defences, the one that touches the update first in front."""
        return tuple(label for label in self.defense.split("+") if label != UNDEFENDED and label not in RESERVED)

    @property
    def arrangement(self) -> Arrangement:
        """Who trains on whose records."""
        return arrangement_of(self.defense)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything an audit needs. Made by :func:`read` or :func:`parse`.

    Args:
        name: title of the report.
        seed: of everything random.
        engine: ``"inline"`` or ``"simulation"``.
        plugins: Python files with further attacks, defences, …, absolute.
        compare: stacks of defences and arrangements to run, e.g. ``("none", "dp-sgd", "clip+top-k", "centralised+dp-sgd")``.
        root: the folder relative paths start from.
    """

    name: str
    seed: int
    engine: EngineName
    plugins: tuple[Path, ...]
    sites: SitesTable
    model: ModelTable
    federation: FederationTable
    threat_table: ThreatTable
    attacks: tuple[AttackSpec, ...]
    defenses: tuple[DefenseSpec, ...]
    compare: tuple[str, ...]
    root: Path

    @property
    def threat(self) -> Threat:
        """The adversary; secure aggregation keeps single updates from every one of them."""
        hidden = () if self.federation.secure_aggregation is None else ("see-updates",)
        return threat(self.threat_table.model, grant=self.threat_table.grant, deny=(*self.threat_table.deny, *hidden))

    def attack(self, label: str) -> AttackSpec:
        """The attack of that label.

        Raises:
            ScenarioError: if there is none.
        """
        return _labelled(self.attacks, label, "attack")

    def defense(self, label: str) -> DefenseSpec:
        """The defence of that label.

        Raises:
            ScenarioError: if there is none.
        """
        return _labelled(self.defenses, label, "defense")

    def settings(self) -> tuple[Setting, ...]:
        """The federations to run: for each stack of defences a shared one, and one per trap, canaries or local recipe."""
        base, found = self.federation, []
        active, planting = _bringing(self, "trap"), _bringing(self, "canaries")
        for defense in self.compare:
            untrained = arrangement_of(defense) == "untrained"
            chosen = [a for a in self.attacks if a.against is None or defense in a.against]
            shared = [a.label for a in chosen if a.label not in active | planting and a.local is None and a.rounds is None]
            if shared or not self.attacks:
                found.append(
                    Setting(
                        id=defense,
                        defense=defense,
                        trap="",
                        local=base.local,
                        rounds=0 if untrained else base.rounds,
                        attacks=tuple(shared),
                    )
                )
            for spec in chosen:
                if spec.label not in shared:
                    found.append(
                        Setting(
                            id=f"{defense}--{spec.label}",
                            defense=defense,
                            trap=spec.label if spec.label in active else "",
                            canaries=spec.label if spec.label in planting else "",
                            local=spec.local or base.local,
                            rounds=0 if untrained else spec.rounds or base.rounds,
                            attacks=(spec.label,),
                        )
                    )
        return tuple(found)

    def setting(self, id: str) -> Setting:
        """The setting of that id.

        Raises:
            ScenarioError: if there is none.
        """
        known = {setting.id: setting for setting in self.settings()}
        if id not in known:
            raise ScenarioError(f"unknown setting {id!r}{near(id, known)}")
        return known[id]

    def to_json(self) -> str:
        """The resolved scenario as one line of JSON; :func:`parse` reads it back."""
        return json.dumps(self.tables())

    def tables(self) -> dict[str, Any]:
        """The resolved scenario as plain tables, in the shape of the TOML file."""
        return {
            "name": self.name,
            "seed": self.seed,
            "engine": self.engine,
            "plugins": [str(path) for path in self.plugins],
            "compare": list(self.compare),
            "root": str(self.root),
            "sites": {"source": self.sites.source, "split": asdict(self.sites.split), **self.sites.options},
            "model": {"name": self.model.name, "mean": self.model.mean, "std": self.model.std, **self.model.options},
            "federation": {
                "rounds": self.federation.rounds,
                "strategy": self.federation.strategy,
                "timeout": self.federation.timeout,
                "secure_aggregation": False if (secure := self.federation.secure_aggregation) is None else asdict(secure),
                "options": dict(self.federation.options),
                "local": _given(self.federation.local),
            }
            | ({} if self.federation.silo is None else {"silo": self.federation.silo}),
            "threat": {
                key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.threat_table).items()
            },
            "attacks": {
                a.label: {"attack": a.attack}
                | _own_tables(a)
                | ({"against": list(a.against)} if a.against is not None else {})
                | dict(a.options)
                for a in self.attacks
            },
            "defenses": {d.label: {"defense": d.defense, **d.options} for d in self.defenses},
        }


def read(path: Path, *, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in a TOML file, with ``key.path=value`` overrides applied.

    Raises:
        ScenarioError: if the file is missing or not TOML, or as :func:`parse`.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScenarioError(f"no such scenario: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    for override in overrides:
        _override(tables, override)
    return parse({"name": path.stem, **tables}, root=path.resolve().parent)


def parse(tables: Mapping[str, Any], *, root: Path) -> Scenario:
    """A scenario from plain tables, every name and option checked.

    Raises:
        ScenarioError: naming the key that is unknown or the value that is wrong, with the nearest known name.
    """
    for key in sorted(tables.keys() - KEYS):
        raise ScenarioError(f"unknown key {key!r}{near(key, KEYS)}")
    root = root / str(tables.get("root", "."))
    if type(seed := tables.get("seed", 0)) is not int or seed < 0:
        raise ScenarioError(f"seed = {seed!r}: must be a whole number, 0 or more")
    if (engine := tables.get("engine", "inline")) not in ("inline", "simulation"):
        raise ScenarioError(f"engine = {engine!r}: must be 'inline' or 'simulation'")
    files = tuple((root / file).resolve() for file in _strings(tables, "plugins"))
    federation = dict(_table(tables, "federation"))
    local = validate(LocalRecipe, _table(federation, "local", "federation.local"), where="federation.local")
    federation["local"] = local
    federation["secure_aggregation"] = _secure(federation.get("secure_aggregation", False))
    threat_table = validate(ThreatTable, _table(tables, "threat"), where="threat")
    attacks = tuple(_attack(label, table, local) for label, table in _table(tables, "attacks").items())
    defenses = tuple(_defense(label, table) for label, table in _table(tables, "defenses").items())
    compare = _strings(tables, "compare", (UNDEFENDED, *(d.label for d in defenses)))
    scenario = Scenario(
        name=str(tables.get("name", "scenario")),
        seed=seed,
        engine=engine,
        plugins=files,
        sites=_sites(_table(tables, "sites")),
        model=_model(_table(tables, "model")),
        federation=validate(FederationTable, federation, where="federation"),
        threat_table=threat_table,
        attacks=attacks,
        defenses=defenses,
        compare=compare,
        root=root,
    )
    _check(scenario)
    return scenario


def _check(scenario: Scenario) -> None:
    """Names that other tables refer to; options are checked when the plugins are made."""
    if scenario.threat_table.model not in NAMED:
        raise ScenarioError(f"threat.model = {scenario.threat_table.model!r}{near(scenario.threat_table.model, NAMED)}")
    _ = scenario.threat
    if scenario.federation.secure_aggregation and Can.SEE_UPDATES in map(capability, scenario.threat_table.grant):
        raise ScenarioError(
            "threat.grant: secure aggregation hides single updates, and no grant of 'see-updates' brings them back; "
            "leave one of both out, or open the protocol with the attack 'secagg-opening'"
        )
    labels = {d.label for d in scenario.defenses}
    if not scenario.compare or len(set(scenario.compare)) < len(scenario.compare):
        raise ScenarioError(f"compare = {list(scenario.compare)}: name one or more stacks of defenses, each once")
    stacks = [("compare", stack) for stack in scenario.compare]
    stacks += [(f"attacks.{spec.label}.against", stack) for spec in scenario.attacks for stack in spec.against or ()]
    for where, stack in stacks:
        _check_stack(where, stack, labels)
    named: dict[Kind, dict[str, str]] = {
        "attacks": {a.label: a.attack for a in scenario.attacks},
        "defenses": {d.label: d.defense for d in scenario.defenses},
        "sites": {"source": scenario.sites.source},
    }
    for kind, names in named.items():
        registered = plugins(kind, files=scenario.plugins)
        for label, name in names.items():
            if name not in registered:
                raise ScenarioError(f"{kind}.{label}: unknown {kind.removesuffix('s')} {name!r}{near(name, registered)}")
    if ":" not in scenario.model.name and scenario.model.name not in (models := plugins("models", files=scenario.plugins)):
        raise ScenarioError(f"model.name: unknown model {scenario.model.name!r}{near(scenario.model.name, models)}")
    _check_alone(scenario)


def _check_stack(where: str, stack: str, labels: Collection[str]) -> None:
    """Every part of a stack is known, and at most one is an arrangement."""
    parts = () if stack == UNDEFENDED else stack.split("+")
    for label in parts:
        if label not in labels and label not in RESERVED:
            raise ScenarioError(
                f"{where}: no defense labelled {label!r} and no such arrangement{near(label, [*labels, *RESERVED])}"
            )
    if len(named := [label for label in parts if label in RESERVED]) > 1:
        raise ScenarioError(f"{where}: {stack!r} names {len(named)} arrangements ({', '.join(named)}); leave one")


def _check_alone(scenario: Scenario) -> None:
    """Where one node trains alone or nobody trains there is nothing to add up and no site to send a trap to."""
    alone = [stack for stack in scenario.compare if arrangement_of(stack) not in (FEDERATED, "iid")]
    if alone and scenario.federation.secure_aggregation is not None:
        raise ScenarioError(
            f"compare: {alone[0]!r} has no updates of several sites to add up; leave it out, or federation.secure_aggregation"
        )
    active = _bringing(scenario, "trap") | _bringing(scenario, "canaries") if alone else set()
    for spec in scenario.attacks:
        if spec.label in active and (lured := [stack for stack in alone if spec.against is None or stack in spec.against]):
            rest = [stack for stack in scenario.compare if stack not in alone]
            raise ScenarioError(
                f"attacks.{spec.label}: an active attack, or one with canaries, needs sites of their own, and {lured[0]!r} has "
                f"none; name the stacks to run it against, e.g. attacks.{spec.label}.against = {json.dumps(rest)}"
            )


def _sites(table: Mapping[str, Any]) -> SitesTable:
    rest = {key: value for key, value in table.items() if key not in ("source", "split")}
    split = validate(SplitPlan, _table(table, "split", "sites.split"), where="sites.split")
    return SitesTable(source=str(table.get("source", "phantom")), split=split, options=rest)


def _model(table: Mapping[str, Any]) -> ModelTable:
    own = {f.name for f in fields(ModelTable)} - {"options"}
    rest = {key: value for key, value in table.items() if key not in own}
    model = validate(ModelTable, {key: value for key, value in table.items() if key in own}, where="model")
    if model.std <= 0:
        raise ScenarioError(f"model: std = {model.std}: must be larger than 0")
    return replace(model, options=rest)


def _secure(given: Any) -> SecureAggregation | None:
    where = "federation.secure_aggregation"
    if not isinstance(given, bool | Mapping):
        raise ScenarioError(f"{where} = {given!r}: must be true, false or a table of its options")
    return None if given is False else validate(SecureAggregation, {} if given is True else given, where=where)


def _attack(label: str, table: Any, base: LocalRecipe) -> AttackSpec:
    table, where = _labelled_table("attacks", label, table), f"attacks.{label}"
    own = validate(OwnFederation, _table(table, "federation", f"{where}.federation"), where=f"{where}.federation")
    against = _strings(table, "against", where=f"{where}.against") if "against" in table else None
    return AttackSpec(
        label=label,
        attack=str(table.get("attack", label)),
        local=_own_recipe(own.local, base, where=f"{where}.federation.local") if own.local is not None else None,
        rounds=own.rounds,
        against=against,
        options={key: value for key, value in table.items() if key not in ("attack", "federation", "against")},
    )


def _own_recipe(own: Mapping[str, Any], base: LocalRecipe, *, where: str) -> LocalRecipe:
    """The federation's recipe with an attack's changes; ``epochs`` without ``steps`` asks for whole epochs."""
    inherited = asdict(base) | ({"steps": None} if "epochs" in own else {})
    return validate(LocalRecipe, inherited | dict(own), where=where)


def _defense(label: str, table: Any) -> DefenseSpec:
    table = _labelled_table("defenses", label, table)
    rest = {key: value for key, value in table.items() if key != "defense"}
    return DefenseSpec(label=label, defense=str(table.get("defense", label)), options=rest)


def _labelled_table(where: str, label: str, table: Any) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ScenarioError(f"{where}.{label} must be a table, e.g. [{where}.{label}]")
    if label in RESERVED:
        raise ScenarioError(f"{where}.{label}: {label!r} is an arrangement that compare may name; choose another label")
    if not LABEL.fullmatch(label) or label == UNDEFENDED or "--" in label:
        raise ScenarioError(f"{where}.{label}: a label is letters, digits, '.', '_' and single '-', and not {UNDEFENDED!r}")
    return dict(table)


def _table(tables: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    table = tables.get(key, {})
    if not isinstance(table, Mapping):
        raise ScenarioError(f"{where or key} must be a table, not {table!r}")
    return table


def _strings(tables: Mapping[str, Any], key: str, default: Sequence[str] = (), where: str = "") -> tuple[str, ...]:
    value = tables.get(key, default)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ScenarioError(f"{where or key} = {value!r}: must be a list of strings")
    return tuple(value)


def _override(tables: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ScenarioError(f"--set {override!r}: write it as key=value, e.g. federation.rounds=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    table = tables
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ScenarioError(f"--set {override!r}: {part!r} is not a table")
    table[last] = value


def _bringing(scenario: Scenario, what: Literal["trap", "canaries"]) -> set[str]:
    """Labels of the attacks that bring a trap, or canaries: those whose class overrides the methods that make them."""
    from flpriv.attack import Attack
    from flpriv.registry import find

    methods = {"trap": ("trap", "aim"), "canaries": ("canaries",)}[what]
    classes = {spec.label: find("attacks", spec.attack, files=scenario.plugins) for spec in scenario.attacks}
    return {label for label, cls in classes.items() if any(getattr(cls, m) is not getattr(Attack, m) for m in methods)}


def _labelled(specs: Sequence[Spec], label: str, kind: str) -> Spec:
    known = {spec.label: spec for spec in specs}
    if label not in known:
        raise ScenarioError(f"unknown {kind} {label!r}{near(label, known)}")
    return known[label]


def _own_tables(spec: AttackSpec) -> dict[str, Any]:
    own = ({"rounds": spec.rounds} if spec.rounds else {}) | ({"local": _given(spec.local)} if spec.local else {})
    return {"federation": own} if own else {}


def _given(recipe: LocalRecipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if value is not None}
