"""The `ask-dist` command: parse, load the configuration, call one function.

Heavy libraries are imported inside the commands, so that `--help` and a configuration error take no time.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ask_dist import __version__, cli_data
from ask_dist.errors import InputError
from ask_dist.files import DISK_ERRORS, refusal, writing

app = typer.Typer(
    help="Train audio-text retrieval models on a Ray cluster, with a shared knowledge bank that is refined while "
    "training runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
corpus_app = typer.Typer(help="Build a corpus from what packages carry.", no_args_is_help=True)
app.add_typer(corpus_app, name="corpus")
bank_app = typer.Typer(help="Knowledge from outside a run: a bank folder of another corpus.", no_args_is_help=True)
app.add_typer(bank_app, name="bank")
app.add_typer(cli_data.shards_app, name="shards")
app.command()(cli_data.pack)
console = Console()
INTERRUPTED = 130  # Typer's exit code for Ctrl-C

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, such as optimization.epochs=5")
]
BankFolder = Annotated[Path, typer.Argument(metavar="BANK", help="folder of a bank, such as banks/wavcaps")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run, such as runs/quickstart")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the last checkpoint, if there is one")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove an earlier run of that name")] = False,
) -> None:
    """Train a model, evaluate it, and write a report.

    Example: ask-dist train configs/quickstart.yaml name=longer optimization.epochs=20
    """
    from ask_dist import config as configuration

    loaded = configuration.load(config, overrides or [])
    from ask_dist.train.run import train as run

    run(loaded, resume=resume, overwrite=overwrite, console=console)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate everything that `train` needs, and take one step on synthetic data, without starting a run."""
    from ask_dist import config as configuration

    loaded = configuration.load(config, overrides or [])
    from ask_dist.train.check import check as dry_run

    dry_run(loaded, console)


@app.command()
def evaluate(
    run: RunFolder,
    shards: Annotated[
        str | None, typer.Option(help="folder of shards, or its URL; default: the run's own test split")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="also write the scores to this JSON file")] = None,
    zero_shot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="classify instead: a file with a class in each line")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="a class's sentence, {} for its name; several are averaged")
    ] = None,
) -> None:
    """Score a finished run in both directions, on its own test split or on other shards; or classify without training.

    Example: ask-dist evaluate runs/quickstart --shards shards/open_sounds/test

    Example: ask-dist evaluate runs/quickstart --shards shards/esc50/test --zero-shot classes.txt
    """
    if zero_shot is not None:
        if shards is None:
            raise InputError("--zero-shot needs --shards, the clips to classify")
        from ask_dist.evaluate.zero_shot import TEMPLATES
        from ask_dist.evaluate.zero_shot import zero_shot as classify

        classify(run, zero_shot, shards, template or TEMPLATES, output, console)
        return
    if template:
        raise InputError("--template needs --zero-shot, the classes that it is for")
    from ask_dist.evaluate.run import evaluate as score

    score(run, shards, output, console)


class Format(StrEnum):
    """What `export` writes."""

    transformers = "transformers"
    safetensors = "safetensors"
    onnx = "onnx"


@app.command()
def export(
    run: RunFolder,
    form: Annotated[Format, typer.Option("--format", help="transformers: a ClapModel; onnx: a graph a tower")],
    output: Annotated[Path, typer.Option(help="folder that is made")],
) -> None:
    """Write the model of a finished run for other programs, with a model card.

    Example: ask-dist export runs/quickstart --format onnx --output exports/quickstart
    """
    from ask_dist.export.command import export as write

    write(run, form.value, output, console)


@app.command()
def search(
    run: RunFolder,
    query: Annotated[str | None, typer.Argument(help="a sentence, such as 'three loud viola notes'")] = None,
    audio: Annotated[Path | None, typer.Option(help="search with a sound instead of a sentence")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="answers")] = 10,
    save: Annotated[Path | None, typer.Option(help="copy the sounds that were found into this folder")] = None,
) -> None:
    """Find the clips that a sentence or a sound describes, among those the run was evaluated on.

    Example: ask-dist search runs/quickstart "three loud viola notes" -k 5 --save hits
    """
    from ask_dist.evaluate.run import search as find

    find(run, query, audio, k, save, console)


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file, such as configs/tune_reliability.yaml")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted sweep")] = False,
) -> None:
    """Search the reliability and knowledge settings with Ray Tune (ASHA); writes best.yaml for `train`.

    Example: ask-dist tune configs/tune_reliability.yaml trials=8
    """
    from ask_dist.tune.space import load

    sweep = load(config, overrides or [])
    from ask_dist.tune.driver import tune as run

    run(sweep, console, resume=resume)


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(metavar="ABLATION", help="YAML file, such as configs/ablation.yaml")],
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="a few scenes, steps and arms: does it all run?")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="run nothing, report what is done")] = False,
) -> None:
    """Train arms of the method and baselines over seeds, and compare them; a second call goes on where one stopped.

    Example: ask-dist ablate configs/ablation.yaml seeds=[0]
    """
    from ask_dist.ablation.space import load, smoke_of

    loaded = load(config, overrides or [])
    from ask_dist.ablation.driver import ablate as run

    run(smoke_of(loaded) if smoke else loaded, console, only_report=report_only)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[str, typer.Option(help="training workers, or a range that doubles")] = "8..1024",
    rows: Annotated[str, typer.Option(help="rows of the bank, or a range in powers of ten")] = "1e6..1e9",
    step_seconds: Annotated[
        float, typer.Option(min=1e-4, help="of a training step; the sum of time/* in metrics.jsonl")
    ] = 0.25,
    clips: Annotated[
        float | None, typer.Option(min=1, help="of an epoch, for refine.every; default: as many as rows")
    ] = None,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB that a node gives its part of the bank")] = 64.0,
    network: Annotated[float, typer.Option(min=0.01, help="Gbit/s of a node, each way")] = 25.0,
    gpu: Annotated[bool, typer.Option("--gpu", help="search on a GPU; needs constants measured on one")] = False,
    constants: Annotated[
        Path | None, typer.Option(help="default: runs/bench/bank.json if there, else what ships")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="also write everything to this JSON file")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw it, a PNG file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="also write the tables to this file")] = None,
) -> None:
    """Say which shards, replicas and index hold so many workers and rows, what they need, and where it breaks.

    Example: ask-dist plan configs/quickstart.yaml --workers 512 --rows 1e8
    """
    from ask_dist import config as configuration

    loaded = configuration.load(config, overrides or [])
    from ask_dist.plan.command import plan as run
    from ask_dist.plan.command import span
    from ask_dist.plan.constants import load
    from ask_dist.plan.model import Node

    run(
        loaded,
        span(workers, 2, "workers"),
        span(rows, 10, "rows"),
        load(constants),
        step_seconds=step_seconds,
        node=Node(memory * 2**30, network * 1e9 / 8, gpu),
        clips=None if clips is None else int(clips),
        console=console,
        output=output,
        plot=plot,
        markdown=markdown,
    )


class Half(StrEnum):
    """Of a row of the bank."""

    audio = "audio"
    text = "text"


class Recipe(StrEnum):
    """The corpora that can be built here."""

    sampled_scenes = "sampled-scenes"
    open_sounds = "open-sounds"


@corpus_app.command("build")
def corpus_build(
    recipe: Annotated[Recipe, typer.Argument(help="which corpus")],
    folder: Annotated[Path | None, typer.Argument(help="where to; default: shards/<recipe>")] = None,
    seed: Annotated[int, typer.Option(min=0, help="another seed, another corpus")] = 0,
    train: Annotated[int | None, typer.Option(min=1, help="training scenes")] = None,
    validation: Annotated[int | None, typer.Option(min=1, help="validation scenes")] = None,
    test: Annotated[int | None, typer.Option(min=1, help="test scenes")] = None,
    swap_captions: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="share of training captions swapped among themselves")
    ] = 0.0,
) -> None:
    """Render a corpus of captioned scenes; what is already there with the same settings is kept.

    Example: ask-dist corpus build sampled-scenes shards/noisy --swap-captions 0.3
    """
    from ask_dist.data.corpora.command import build_with_progress

    sizes = {name: value for name, value in (("train", train), ("validation", validation), ("test", test)) if value}
    target = folder or Path("shards") / recipe.value.replace("-", "_")
    with writing(target):
        build_with_progress(recipe.value, target, seed, sizes, swap_captions, console)


@bank_app.command("build")
def bank_build(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="SHARDS", help="folder of shards, or its URL; or a .txt, .csv, .jsonl or .parquet file of captions"
        ),
    ],
    folder: BankFolder,
    run: Annotated[Path, typer.Option("--checkpoint", help="folder of the finished run whose model encodes")],
) -> None:
    """Encode a corpus that training never visits, or captions alone, into a bank folder.

    Example: ask-dist bank build shards/open_sounds/train banks/open_sounds --checkpoint runs/quickstart
    """
    from ask_dist.evaluate.external import build

    build(run, corpus, folder, console)


@bank_app.command("inspect")
def bank_inspect(folder: BankFolder) -> None:
    """Show what the snapshots of a bank folder say of themselves, newest first."""
    from ask_dist.evaluate.external import inspect

    inspect(folder, console)


@bank_app.command("verify")
def bank_verify(folder: BankFolder) -> None:
    """Read every byte of a bank folder; exit code 2 names what is damaged."""
    from ask_dist.evaluate.external import verify

    verify(folder, console)


@bank_app.command("search")
def bank_search(
    folder: BankFolder,
    run: Annotated[Path, typer.Option("--checkpoint", help="folder of the run that encoded the bank")],
    query: Annotated[str | None, typer.Argument(help="a sentence, such as 'three loud viola notes'")] = None,
    audio: Annotated[Path | None, typer.Option(help="search with a sound instead of a sentence")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="answers")] = 10,
    by: Annotated[Half, typer.Option(help="half of a row that is compared with the query")] = Half.audio,
) -> None:
    """Find the rows of a bank folder nearest to a sentence or a sound.

    Example: ask-dist bank search banks/open_sounds "a door closes" --checkpoint runs/quickstart --by text
    """
    from ask_dist.evaluate.external import search as find

    find(folder, run, query, audio, k, by.value, console)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


def _refuse(error: InputError) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Exits with 0, with 2 after an input or configuration error of one line, with 1 otherwise."""
    try:
        app(args=arguments, prog_name="ask-dist")
    except InputError as error:
        _refuse(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _refuse(refusal(Path(error.filename2 or error.filename or "."), error.errno))
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        message = "interrupted; run the command again to go on (train and tune: with --resume)"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)
    return 0
