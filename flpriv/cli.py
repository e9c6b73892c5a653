"""The command line. Heavy libraries are imported when a command needs them, so that ``--help`` answers at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from flpriv import __version__, memory
from flpriv.errors import FlprivError, ScenarioError, near

if TYPE_CHECKING:
    from flpriv.finding import Verdict
    from flpriv.scenario import Scenario

DEMO = Path(__file__).with_name("demo.toml")
WHOLES = ("federations", "attacks")
LEVELS = ("low", "medium", "high", "critical")

app = typer.Typer(
    name="flpriv",
    help="Audit what a federation of hospitals leaks about its patients, and what each defence costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ScenarioPath = Annotated[Path, typer.Argument(help="Scenario (TOML), or 'demo' for the built-in one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the scenario; repeatable.")
]
PluginFiles = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file with further plugins; repeatable.")]
Workers = Annotated[int | None, typer.Option("--jobs", min=1, help="Processes side by side; one per core if not given.")]
Redact = Annotated[bool, typer.Option("--redact-images", help="Leave all images out of the report.")]


def main() -> None:
    """Run the command line: a mistake of the user's ends in one clear line and exit code 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--verbose"]
    verbose = len(arguments) < len(sys.argv) - 1
    memory.keep()
    try:
        app(args=arguments, prog_name="flpriv")
    except FlprivError as error:
        if verbose:
            raise
        typer.secho(f"Error: {error}", err=True, fg="red")
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("Interrupted; go on with: flpriv run --resume", err=True)
        sys.exit(130)
    except Exception as error:
        if verbose:
            raise
        typer.secho(f"Unexpected error: {type(error).__name__}: {error} (--verbose shows where)", err=True, fg="red")
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the traceback of an error; works after a command too.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)] = False,
) -> None:
    """Audit what a federation of hospitals leaks about its patients, and what each defence costs."""


@app.command()
def run(
    scenario: Annotated[Path | None, typer.Argument(help="Scenario (TOML); without one, the built-in demo.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME if not given.")] = None,
    engine: Annotated[str | None, typer.Option(help="inline or simulation.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    fail_above: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="Exit 3 from this level on: low, medium, high, critical.")
    ] = None,
    jobs: Workers = None,
    redact_images: Redact = False,
) -> None:
    """Run a federation, attack it, and write the report."""
    from flpriv import audit
    from flpriv.finding import Level
    from flpriv.jobs import cores
    from flpriv.runfolder import RunFolder

    if fail_above is not None and fail_above not in LEVELS:
        raise ScenarioError(f"--fail-above {fail_above!r}{near(fail_above, LEVELS)}")
    if resume and scenario is None:
        if overrides or engine:
            raise ScenarioError("--resume goes on with the run as it was started; leave out --set and --engine")
        out = out or _newest()
        chosen = RunFolder.open(out).scenario()
    else:
        chosen = _scenario(scenario or Path("demo"), [*(overrides or []), *([f'engine="{engine}"'] if engine else [])])
        out = out or _folder(chosen.name, resume=resume)
    command = shlex.join(["flpriv", *sys.argv[1:]])
    with _progress():
        verdict = audit.run(chosen, out=out, resume=resume, command=command, workers=jobs or cores())
        page = _write([verdict], out / "report.html", redact_images)
    _summary(verdict, page)
    if audit.failed(verdict):
        raise typer.Exit(1)
    if fail_above and audit.reaches(verdict, Level[fail_above.upper()]):
        raise typer.Exit(3)


@app.command()
def attack(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    names: Annotated[list[str] | None, typer.Argument(help="Labels of the attacks to repeat; all if none is given.")] = None,
    jobs: Workers = None,
    redact_images: Redact = False,
) -> None:
    """Attack a run's stored captures again, without training."""
    from flpriv import audit
    from flpriv.jobs import cores
    from flpriv.runfolder import RunFolder

    folder = RunFolder.open(run_dir)
    scenario = folder.scenario()
    with _progress():
        verdict = audit.attack(
            folder, names or [spec.label for spec in scenario.attacks], scenario=scenario, workers=jobs or cores()
        )
        page = _write([verdict], run_dir / "report.html", redact_images)
    _summary(verdict, page)
    if audit.failed(verdict):
        raise typer.Exit(1)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page; JSON and CSV are written beside it.")] = Path(
        "report.html"
    ),
    redact_images: Redact = False,
) -> None:
    """Write one self-contained page about one or more runs."""
    from flpriv import verdicts

    page = _write([verdicts.load(folder) for folder in run_dirs], output, redact_images)
    typer.echo(f"Report: {page}")


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Argument(help="attacks, defenses, strategies, sites or models; all if not given.")] = None,
    plugin: PluginFiles = None,
) -> None:
    """List attacks, defences, strategies, sources of sites and models."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flpriv import registry

    kinds = get_args(registry.Kind)
    if kind is not None and kind not in kinds:
        raise ScenarioError(f"no kind of plugin {kind!r}{near(kind, kinds)}")
    for one in kinds if kind is None else (kind,):
        table = Table(title=one, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in ("name", "what it does", "paper"):
            table.add_column(column, no_wrap=column == "name", overflow="fold")
        flower = registry.flower_strategies() if one == "strategies" else ()
        for found in (*registry.plugins(one, files=plugin or ()).values(), *flower):
            table.add_row(found.name, Text(found.summary), Text(found.paper))
        Console().print(table, Text())


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of an attack, defence, source of sites or model.")],
    plugin: PluginFiles = None,
) -> None:
    """Show one plugin: what it does, its paper, its options with their defaults."""
    import inspect
    from dataclasses import MISSING, fields, is_dataclass

    from flpriv import registry

    kinds = get_args(registry.Kind)
    everything = [found for kind in kinds for found in registry.plugins(kind, files=plugin or ()).values()]
    named = [found for found in everything if found.name == name]
    if not named:
        raise ScenarioError(f"no plugin is called {name!r}{near(name, (found.name for found in everything))}")
    for found in named:
        loaded = found.load()
        typer.secho(f"{found.name} ({found.kind})", bold=True)
        shared = [base for base in loaded.__mro__[1:] if is_dataclass(base) and fields(base)]
        typer.echo("\n\n".join(inspect.getdoc(cls) or "" for cls in (loaded, *shared)))
        if found.paper:
            typer.echo(f"\nPaper: {found.paper}")
        if hasattr(loaded, "needs"):
            from flpriv.threat import spell

            typer.echo(f"Needs: {spell(loaded.needs)}")
        typer.echo("\nDefaults:")
        for field in (field for field in fields(loaded) if field.init):
            default = (
                field.default
                if field.default is not MISSING
                else field.default_factory()
                if field.default_factory is not MISSING
                else "(required)"
            )
            typer.echo(f"  {field.name} = {default!r}")


@app.command()
def check(scenario: ScenarioPath, overrides: Overrides = None) -> None:
    """Check a scenario without running it: names, options, sites and splits; shows what would be run."""
    from flpriv import audit

    chosen = _scenario(scenario, overrides or [])
    audit.check(chosen)
    for site in audit.summaries(chosen):
        classes = ", ".join(f"{name} {count}" for name, count in site.classes.items())
        typer.echo(
            f"site {site.name}: {site.patients} patients; train {site.train}, test {site.test}, public {site.public}; {classes}"
        )
    for setting in chosen.settings():
        trap = f", trap {setting.trap}" if setting.trap else ""
        attacks = ", ".join(setting.attacks) or "none"
        rounds = f"{setting.rounds} round{'s' if setting.rounds != 1 else ''}"
        typer.echo(f"federation {setting.id}: {rounds} of {audit.in_words(setting.local)}{trap}; attacks: {attacks}")
    typer.echo(f"adversary ({chosen.threat.name}): {'; '.join(chosen.threat.lines())}")


def _scenario(path: Path, overrides: list[str]) -> Scenario:
    from flpriv.scenario import read

    return read(DEMO if str(path) == "demo" and not path.exists() else path, overrides=overrides)


def _folder(name: str, *, resume: bool) -> Path:
    """``runs/NAME``, or the first free ``runs/NAME-2``, …; the last one in use to resume."""
    stem = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    taken = None
    number = 1
    while (path := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
        taken, number = path, number + 1
    return taken if resume and taken else path


def _newest() -> Path:
    found = sorted(Path("runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ScenarioError("nothing to resume: there is no run under runs/; give --out DIR")
    return found[-1].parent


def _write(chosen: list[Verdict], path: Path, redact_images: bool) -> Path:
    from flpriv.report import write

    return write(chosen, path, redact_images=redact_images).resolve()


def _progress() -> Any:
    """Show what is told on a terminal; a line per finished piece elsewhere."""
    from flpriv.progress import listen

    if sys.stderr.isatty():
        return _Bars()
    return listen(_line)


def _line(what: str, done: int, total: int | None, note: str) -> None:
    if what in WHOLES and done:
        typer.echo(f"{what} {done}/{total}: {note}", err=True)
    elif done and done == total:
        typer.echo(f"{what}: done{f' ({note})' if note else ''}", err=True)


class _Bars:
    """A rich progress display that listens for the length of a ``with`` block."""

    def __enter__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from flpriv.progress import listen

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}
        self._progress.start()
        self._listening = listen(self._show)
        self._listening.__enter__()

    def __exit__(self, *error: Any) -> Literal[False]:
        self._listening.__exit__(*error)
        self._progress.stop()
        return False

    def _show(self, what: str, done: int, total: int | None, note: str) -> None:
        from rich.markup import escape

        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(escape(what), total=total, note="")
        self._progress.update(self._tasks[what], completed=done, total=total, note=escape(note))


def _summary(verdict: Verdict, page: Path) -> None:
    """The verdict and the findings over all sites, then the report's path as the last line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("attack", "defence", "result", "null", "risk"):
        table.add_column(column, overflow="fold")
    for finding in verdict.findings:
        if not finding.site:
            metric = finding.headline
            value = "n/a" if metric is None or metric.value is None else f"{metric.name} {metric.value:.3g} {metric.unit}".strip()
            null = "" if metric is None or metric.null is None else f"{metric.null:.3g} ({metric.null_name})"
            shown = value if finding.status == "ok" else f"{finding.status}: {finding.message}"
            table.add_row(*map(Text, (finding.attack, finding.defense, shown, null, finding.level.name.lower())))
    console = Console(soft_wrap=True)
    console.print(table)
    for caveat in verdict.caveats:
        console.print(Text(f"Caveat: {caveat}"))
    console.print(Text(verdict.sentence, style="bold"))
    typer.echo(f"Report: {page}")


if __name__ == "__main__":
    main()
