"""A scenario says what it means or is refused in one line that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flpriv.errors import ScenarioError
from flpriv.recipe import LocalRecipe
from flpriv.scenario import Scenario, parse, read

PLUGINS = """
from dataclasses import dataclass
from typing import ClassVar
from flpriv.attack import Attack
from flpriv.defense import Defense
from flpriv.site import Sites

class LookAttack(Attack):
    name = "look"
    def run(self, capture, *, rng): return []

class LureAttack(Attack):
    name = "lure"
    def run(self, capture, *, rng): return []
    def trap(self, task, *, public, rng): return None

class NoiseDefense(Defense):
    name = "noise"

class NowhereSites(Sites):
    name = "nowhere"

class FlatModel(Model):
    name = "flat"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenario")
    text = PLUGINS.replace("from flpriv.site", "from flpriv.model import Model\nfrom flpriv.site")
    (folder / "mine.py").write_text(text.replace("LookAttack(Attack)", "Look(Attack)"))
    return folder


def tables(**changes: Any) -> dict[str, Any]:
    return {"plugins": ["mine.py"], "sites": {"source": "nowhere"}, "model": {"name": "flat"}} | changes


def made(root: Path, **changes: Any) -> Scenario:
    return parse(tables(**changes), root=root)


def test_defaults(root: Path) -> None:
    scenario = made(root)
    assert (scenario.seed, scenario.engine, scenario.compare) == (0, "inline", ("none",))
    assert scenario.threat.name == "honest-but-curious"
    assert scenario.federation.local == LocalRecipe()
    (setting,) = scenario.settings()
    assert (setting.id, setting.attacks, setting.defenses, setting.rounds) == ("none", (), (), 3)


def test_options_of_plugins_are_kept_apart_from_the_tables_own(root: Path) -> None:
    scenario = made(
        root,
        sites={"source": "nowhere", "root": "images", "split": {"test": 0.5}},
        model={"name": "flat", "mean": 0.5, "width": 3},
        attacks={"l": {"attack": "look", "iterations": 3, "federation": {"rounds": 2}}},
        defenses={"n": {"defense": "noise", "scale": 0.1}},
    )
    assert scenario.sites.options == {"root": "images"}
    assert scenario.sites.split.test == 0.5
    assert (scenario.model.options, scenario.model.mean) == ({"width": 3}, 0.5)
    assert scenario.attack("l").options == {"iterations": 3}
    assert scenario.attack("l").rounds == 2
    assert scenario.defense("n").options == {"scale": 0.1}
    assert scenario.compare == ("none", "n")


def test_settings_share_a_federation_where_attacks_only_look(root: Path) -> None:
    scenario = made(
        root,
        compare=["none", "n", "n+m"],
        attacks={
            "look": {},
            "again": {"attack": "look"},
            "lure": {"against": ["none"]},
            "own": {"attack": "look", "federation": {"local": {"steps": 1}}},
        },
        defenses={"n": {"defense": "noise"}, "m": {"defense": "noise"}},
    )
    found = {setting.id: (setting.trap, setting.attacks, setting.defenses) for setting in scenario.settings()}
    assert found == {
        "none": ("", ("look", "again"), ()),
        "none--lure": ("lure", ("lure",), ()),
        "none--own": ("", ("own",), ()),
        "n": ("", ("look", "again"), ("n",)),
        "n--own": ("", ("own",), ("n",)),
        "n+m": ("", ("look", "again"), ("n", "m")),
        "n+m--own": ("", ("own",), ("n", "m")),
    }
    assert scenario.setting("none--own").local.steps == 1
    with pytest.raises(ScenarioError, match=r"unknown setting 'none--lur'; did you mean 'none--lure'"):
        scenario.setting("none--lur")


@pytest.mark.parametrize(
    ("own", "steps", "epochs"),
    [({"lr": 0.1}, 5, 2), ({"steps": 1}, 1, 2), ({"epochs": 3}, None, 3), ({"epochs": 3, "steps": 4}, 4, 3)],
)
def test_an_attacks_recipe_starts_from_the_federations(root: Path, own: dict[str, Any], steps: int | None, epochs: int) -> None:
    scenario = made(
        root, federation={"local": {"steps": 5, "epochs": 2, "momentum": 0.9}}, attacks={"look": {"federation": {"local": own}}}
    )
    recipe = scenario.attack("look").local
    assert recipe is not None
    assert (recipe.steps, recipe.epochs, recipe.momentum) == (steps, epochs, 0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atacks": {}}, "unknown key 'atacks'; did you mean 'attacks'?"),
        ({"seed": -1}, "seed = -1: must be a whole number, 0 or more"),
        ({"seed": "7"}, "seed = '7': must be a whole number"),
        ({"seed": True}, "seed = True: must be a whole number"),
        ({"engine": "cloud"}, "engine = 'cloud': must be"),
        ({"plugins": "mine.py"}, "plugins = 'mine.py': must be a list of strings"),
        ({"compare": "none"}, "compare = 'none': must be a list of strings"),
        ({"compare": []}, "compare = []: name one or more stacks"),
        ({"compare": ["none", "none"]}, "compare = ['none', 'none']: name one or more stacks of defenses, each once"),
        ({"compare": ["noise"]}, "compare: no defense labelled 'noise'"),
        ({"compare": ["none+n"], "defenses": {"n": {"defense": "noise"}}}, "compare: no defense labelled 'none'"),
        ({"sites": {"source": "nowere"}}, "sites.source: unknown site 'nowere'; did you mean 'nowhere'?"),
        ({"sites": {"source": "nowhere", "split": {"tset": 0.5}}}, "sites.split: unknown option 'tset'; did you mean 'test'?"),
        ({"sites": 3}, "sites must be a table, not 3"),
        ({"model": {"name": "flatt"}}, "model.name: unknown model 'flatt'; did you mean 'flat'?"),
        ({"model": {"name": "flat", "std": 0}}, "model: std = 0"),
        ({"model": {"name": "flat", "mean": "dark"}}, "model: mean = 'dark': Input should be a valid number"),
        ({"federation": {"round": 3}}, "federation: unknown option 'round'; did you mean 'rounds'?"),
        ({"federation": {"rounds": 0}}, "federation: rounds = 0"),
        ({"federation": {"local": {"lr": -1}}}, "federation.local: lr = -1"),
        ({"federation": {"local": {"batchsize": 4}}}, "federation.local: unknown option 'batchsize'; did you mean 'batch_size'?"),
        ({"federation": {"local": 3}}, "federation.local must be a table"),
        ({"threat": {"model": "malicious"}}, "threat.model = 'malicious'; did you mean 'malicious-server'?"),
        ({"threat": {"grant": ["know-label"]}}, "threat: unknown capability 'know-label'; did you mean 'know-labels'?"),
        ({"threat": {"candidates": 3}}, "threat: candidates = 3"),
        ({"attacks": {"imprnt": {}}}, "attacks.imprnt: unknown attack 'imprnt'"),
        ({"attacks": {"look": 3}}, "attacks.look must be a table"),
        ({"attacks": {"look": {"federation": 3}}}, "attacks.look.federation must be a table"),
        (
            {"attacks": {"look": {"federation": {"local": 3}}}},
            "attacks.look.federation: local = 3: Input should be a valid",
        ),
        (
            {"attacks": {"look": {"federation": {"local": {"step": 3}}}}},
            "attacks.look.federation.local: unknown option 'step'; did you mean 'steps'?",
        ),
        ({"attacks": {"look": {"federation": {"rounds": 0}}}}, "attacks.look.federation: rounds = 0: "),
        ({"attacks": {"look": {"against": "none"}}}, "attacks.look.against = 'none': must be a list of strings"),
        ({"attacks": {"look": {"against": ["nine"]}}}, "attacks.look.against: no defense labelled 'nine'"),
        ({"attacks": {"a b": {"attack": "look"}}}, "attacks.a b: a label is letters"),
        ({"attacks": {"../up": {"attack": "look"}}}, "attacks.../up: a label is letters"),
        ({"attacks": {"a--b": {"attack": "look"}}}, "attacks.a--b: a label is letters"),
        ({"defenses": {"none": {"defense": "noise"}}}, "defenses.none: a label is letters"),
        ({"defenses": {"noice": {}}}, "defenses.noice: unknown defense 'noice'; did you mean 'noise'?"),
        ({"plugins": ["gone.py"]}, "plugins: no such file: "),
    ],
)
def test_what_is_wrong_is_named(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        made(root, **changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=4", "seed", 4),
        ("federation.rounds=9", "federation.rounds", 9),
        ("federation.local.lr=1e-3", "federation.local.lr", 1e-3),
        ('compare=["none"]', "compare", ["none"]),
        ("sites.root=/data/x y", "sites.root", "/data/x y"),
        ("sites.root=", "sites.root", ""),
        ("name=a=b", "name", "a=b"),
        ("attacks.look.federation.rounds=2", "attacks.look.federation.rounds", 2),
    ],
)
def test_overrides(root: Path, override: str, key: str, value: Any) -> None:
    file = root / "run.toml"
    file.write_text('plugins = ["mine.py"]\n[sites]\nsource = "nowhere"\n[model]\nname = "flat"\n[attacks.look]\n')
    found: Any = read(file, overrides=[override]).tables()
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize("override", ["seed", "=3", "seed.more=3"])
def test_an_override_that_says_nothing_is_refused(root: Path, override: str) -> None:
    (root / "seeded.toml").write_text("seed = 1\n")
    with pytest.raises(ScenarioError, match=f"--set '{override}'"):
        read(root / "seeded.toml", overrides=[override])


def test_a_file_that_cannot_be_read_is_named(root: Path) -> None:
    with pytest.raises(ScenarioError, match=r"no such scenario: .*gone\.toml"):
        read(root / "gone.toml")
    (root / "bad.toml").write_text("seed = \n")
    with pytest.raises(ScenarioError, match=r"bad\.toml: .*line 1"):
        read(root / "bad.toml")
    (root / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ScenarioError, match=r"latin\.toml"):
        read(root / "latin.toml")
    with pytest.raises(ScenarioError, match=str(root)):
        read(root)


def test_the_name_is_the_files_and_paths_start_beside_it(root: Path) -> None:
    (root / "north.toml").write_text('plugins = ["mine.py"]\n[sites]\nsource = "nowhere"\n[model]\nname = "flat"\n')
    scenario = read(root / "north.toml")
    assert (scenario.name, scenario.root, scenario.plugins) == ("north", root, (root / "mine.py",))
    assert parse(tables(root="sub", plugins=["../mine.py"]), root=root).root == root / "sub"


LABELS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.]{0,8}", fullmatch=True).filter(lambda label: label != "none")
OPTIONS = st.dictionaries(st.sampled_from(["alpha", "beta"]), st.one_of(st.integers(-9, 9), st.booleans(), st.text(max_size=4)))
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(1e-5, 1),
        "steps": st.integers(1, 9),
        "epochs": st.integers(1, 9),
        "optimizer": st.sampled_from(["sgd", "adam"]),
    },
)
SCENARIOS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "name": st.text(max_size=5),
        "engine": st.sampled_from(["inline", "simulation"]),
        "federation": st.fixed_dictionaries({}, optional={"rounds": st.integers(1, 99), "local": RECIPES}),
        "threat": st.fixed_dictionaries({}, optional={"model": st.just("model-user"), "grant": st.just(["know-order"])}),
        "attacks": st.dictionaries(
            LABELS,
            st.builds(
                lambda name, options, recipe: {"attack": name, **options} | ({"federation": {"local": recipe}} if recipe else {}),
                st.sampled_from(["look", "lure"]),
                OPTIONS,
                RECIPES,
            ),
            max_size=3,
        ),
        "defenses": st.dictionaries(LABELS, OPTIONS.map(lambda options: {"defense": "noise", **options}), max_size=2),
    },
)


@given(changes=SCENARIOS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resolved_scenario_reads_back_as_itself(root: Path, changes: dict[str, Any]) -> None:
    scenario = made(root, **changes)
    assert parse(json.loads(scenario.to_json()), root=Path("/elsewhere")) == scenario
    ids = [setting.id for setting in scenario.settings()]
    assert len(set(ids)) == len(ids)
    assert sorted(label for s in scenario.settings() for label in s.attacks) == sorted(
        a.label for a in scenario.attacks for _ in scenario.compare
    )
