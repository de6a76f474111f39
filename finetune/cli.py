"""The `ft` command: one function per command, no logic, and the one place where errors become exit codes.

Only what `--help` needs is imported at the top; each command imports its own stage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from finetune import __version__
from finetune.console import Console
from finetune.errors import FinetuneError
from finetune.stopping import RESUMABLE, Stopped

HELP = {"help_option_names": ["-h", "--help"]}
INTERRUPTED = 130
"""What shells report for Ctrl-C: 128 + SIGINT."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
    help="Fine-tune open language models on one GPU: a YAML file in, a model that runs anywhere out.",
)
config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, context_settings=HELP, help="What can stand in a config."
)
app.add_typer(config_app, name="config")

console = Console()

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML config, for instance configs/quickstart.yaml.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its name below runs/.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a value of the config; repeatable."),
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where run folders are kept.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs on stdout.")]
OntoOption = Annotated[
    str,
    typer.Option(
        "--base", help="What the adapter is put onto: stored, the 16-bit weights; nf4, as training held them."
    ),
]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare the result with what was trained before it gets its name.")
]
RUNS = Path("runs")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        console.data(f"ft {__version__}")
        raise typer.Exit


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The config to write.")] = Path("configs/my-model.yaml"),
    data: Annotated[Path | None, typer.Option(help="Your data file; its format is looked at.")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id or folder of the model to start from.")] = None,
) -> None:
    """Write a config to start from.

    \b
    Example:
      ft init configs/contracts.yaml --data contracts.jsonl --base meta-llama/Llama-3.2-3B-Instruct
    """
    from finetune.starter import write_starter

    for line in write_starter(path, data, base):
        console.say(line)


@app.command()
def check(
    config: ConfigArgument,
    overrides: SetOption = None,
    show: Annotated[bool, typer.Option("--show", help="Print every value and where it was written.")] = False,
) -> None:
    """Check a config in under a second: keys, types, values, files, the format of the data.

    \b
    Examples:
      ft check configs/legal-llama3-8b.yaml
      ft check configs/legal-llama3-8b.yaml --show -s lora.rank=32
    """
    from finetune.overview import check as run_check

    run_check(config, overrides or [], console, show=show)


@app.command()
def data(
    config: ConfigArgument,
    overrides: SetOption = None,
    row: Annotated[int, typer.Option(help="The first row to show, counted from 1.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    find: Annotated[str | None, typer.Option(metavar="TEXT", help="Show rows that hold this text.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead.")] = None,
    runs: RunsOption = RUNS,
    json_output: JsonOption = False,
) -> None:
    """Show the data as the model will see it: what was read, what carries loss, how long it is.

    \b
    Examples:
      ft data configs/quickstart.yaml
      ft data configs/quickstart.yaml --row 17 --rows 1
      ft data configs/quickstart.yaml --find "force majeure"
      ft data configs/quickstart.yaml --rows 50 --html data.html
    """
    console.json_events = json_output
    from finetune.data.inspect import Wanted
    from finetune.overview import show_data

    show_data(config, overrides or [], runs, console, Wanted(row, rows, find, html))


@app.command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    gpu: Annotated[str | None, typer.Option(metavar="CARD", help="A card, such as rtx-4090, t4 or h100.")] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Any card with so much memory, such as 12GB.")
    ] = None,
    runs: RunsOption = RUNS,
    json_output: JsonOption = False,
) -> None:
    """Say beforehand whether a config fits a card, how long it takes and what it costs.

    Without a card: the one that is here, or a line for every card there is. Nothing large is downloaded or loaded.

    \b
    Examples:
      ft plan configs/legal-llama3-8b.yaml
      ft plan configs/legal-llama3-8b.yaml --gpu rtx-4090
      ft plan configs/legal-llama3-8b.yaml --vram 12GB -s train.sequence_length=4096
    """
    console.json_events = json_output
    from finetune.planning import plan as run_plan

    run_plan(config, overrides or [], runs, console, gpu=gpu, vram=vram)


@app.command()
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run even if there is one to go on with.")] = False,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed", metavar="KEY", help="Go on although this differs from the last checkpoint; repeatable."
        ),
    ] = None,
    runs: RunsOption = RUNS,
    json_output: JsonOption = False,
) -> None:
    """Fine-tune: from a config to a trained adapter, evaluated against its base.

    The same command again goes on where a run stopped. Ctrl-C saves the run at the end of the step; twice stops at
    once. A finished run can be given more epochs.

    \b
    Examples:
      ft train configs/legal-llama3-8b.yaml
      ft train configs/legal-llama3-8b.yaml -s lora.rank=32 -s train.learning_rate=1e-4 --fresh
      ft train configs/legal-llama3-8b.yaml -s train.learning_rate=1e-4 --allow-changed train.learning_rate
    """
    console.json_events = json_output
    from finetune.pipeline import train as run_training

    finished = run_training(config, overrides or [], runs, console, fresh=fresh, allow_changed=allow_changed or ())
    path = finished.run.path
    console.event("finished", run=str(path), already=finished.already)
    if finished.already:
        console.say(f"{path} is finished; nothing to do. `ft train {config} --fresh` trains again in a new folder.")
        return
    console.say()
    console.say(f"done: {path}")
    console.say(f"next: `ft chat {path}` to talk to it, `ft export {path} --to gguf` to take it elsewhere")


@app.command("eval")
def evaluate(run: RunArgument, json_output: JsonOption = False) -> None:
    """Compare a run's adapter with its base again, on the held-out rows.

    \b
    Example:
      ft eval runs/quickstart
    """
    console.json_events = json_output
    from finetune.pipeline import evaluate as run_evaluation
    from finetune.pipeline import show_comparison
    from finetune.runs.folder import finished_run

    comparison = run_evaluation(finished_run(run), console)
    if comparison is None:
        console.say("nothing was held out (evaluation.split is 0), so there is nothing to compare on")
    else:
        show_comparison(comparison, console)


@app.command()
def chat(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Ask this one thing and exit; `-` reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    using: Annotated[
        str, typer.Option("--using", help="adapter, merged, gguf, or auto: the newest there is.")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 gives the most likely answer every time.")] = 0.0,
) -> None:
    """Talk to a trained model. Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists what else there is.

    \b
    Examples:
      ft chat runs/quickstart
      ft chat runs/quickstart --system "Answer in one word."
      ft chat runs/quickstart --prompt "Which kind of clause is this? ..."
      ft chat runs/quickstart --prompt - < question.txt
    """
    from finetune.runs.folder import finished_run
    from finetune.serve.chat import Settings, talk

    talk(finished_run(run), Settings(using, system, max_tokens, temperature), prompt, console)


@app.command()
def serve(
    run: RunArgument,
    using: Annotated[
        str, typer.Option("--using", help="gguf, merged, adapter, or auto: the newest GGUF file, else the newest.")
    ] = "auto",
    host: Annotated[
        str, typer.Option(help="The address to listen on. Others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="FT_API_KEY",
            help="What clients must show. Without one, web pages of other machines are turned away all the same.",
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(min=0, help="Tokens that all requests together may hold; 0: as many as in training.")
    ] = 8192,
    gpu_layers: Annotated[
        int | None, typer.Option(min=0, help="Layers on the GPU; as many as fit if left out. For a GGUF file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. For a GGUF file.")] = None,
) -> None:
    """Serve a trained model: an OpenAI-compatible endpoint at http://127.0.0.1:8000/v1.

    \b
    Examples:
      ft serve runs/quickstart
      FT_API_KEY=... ft serve runs/quickstart --host 0.0.0.0 --port 8080
    """
    from finetune.runs.folder import finished_run
    from finetune.serve.server import Settings
    from finetune.serve.server import serve as run_server

    settings = Settings(using, host, port, api_key, context, gpu_layers, threads)
    run_server(finished_run(run), settings, console)


@app.command()
def merge(run: RunArgument, base: OntoOption = "stored", verify: VerifyOption = True) -> None:
    """Add the adapter to its 16-bit base: a model folder that needs no PEFT, proven to say what was trained.

    \b
    Examples:
      ft merge runs/quickstart
      ft merge runs/quickstart --base nf4
    """
    from finetune.delivery import Wishes
    from finetune.delivery import merge as run_merge
    from finetune.runs.folder import finished_run

    run_merge(finished_run(run), Wishes(onto=base, verify=verify), console)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="gguf: Ollama, LM Studio, llama.cpp. hf: transformers, vLLM, MLX. gguf-lora: the adapter alone.",
        ),
    ] = "gguf",
    quant: Annotated[
        list[str] | None,
        typer.Option("--quant", help="For gguf: q8_0, q6_k, q5_k_m, q4_k_m, f16 …; several with commas."),
    ] = None,
    base: OntoOption = "stored",
    verify: VerifyOption = True,
    system: Annotated[str | None, typer.Option(help="A system message for the Modelfile.")] = None,
    ollama_template: Annotated[
        bool, typer.Option("--ollama-template", help="Write the chat template into the Modelfile as well.")
    ] = False,
    ollama_base: Annotated[
        str | None,
        typer.Option(
            "--ollama-base", metavar="NAME", help="For gguf-lora: what Ollama calls the base; makes a Modelfile."
        ),
    ] = None,
) -> None:
    """Export a trained model to where it will run, and prove that it says what was trained.

    GGUF files are made straight from base and adapter; no merged copy is needed.

    \b
    Examples:
      ft export runs/quickstart --to gguf --quant q8_0
      ft export runs/quickstart --quant q4_k_m,q8_0
      ft export runs/quickstart --to hf
      ft export runs/quickstart --to gguf-lora --ollama-base llama3.2:3b
    """
    from finetune.delivery import Wishes
    from finetune.delivery import export as run_export
    from finetune.runs.folder import finished_run

    wishes = Wishes(base, verify, system, ollama_template, ollama_base)
    run_export(finished_run(run), to, quant or [], wishes, console)


@app.command()
def runs(runs: RunsOption = RUNS, json_output: JsonOption = False) -> None:
    """List the runs, with their state and their loss before and after.

    \b
    Example:
      ft runs
    """
    console.json_events = json_output
    from finetune.overview import show_runs

    show_runs(runs, console)


@app.command()
def clean(
    run: RunArgument,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove the whole run, with its adapter and what was exported.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove what a finished run no longer needs: checkpoints, leftovers, and every text of the data.

    The adapter, what was exported and the numbers stay. It cannot be undone, and asks nothing.

    \b
    Examples:
      ft clean runs/quickstart
      ft clean runs/quickstart --all
    """
    console.json_events = json_output
    from finetune.cleaning import clean as run_cleaning
    from finetune.runs.folder import open_run

    run_cleaning(open_run(run), console, everything=everything)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and how to get it.

    \b
    Example:
      ft doctor
    """
    from finetune.doctor import examine

    if not examine(console):
        raise typer.Exit(1)


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors.

    \b
    Example:
      ft config schema > config.schema.json
    """
    from finetune.config.reference import json_schema

    console.data(json_schema().rstrip())


@config_app.command()
def explain(key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="For instance lora.rank.")] = None) -> None:
    """Explain a key of the config, or list them all.

    \b
    Examples:
      ft config explain
      ft config explain lora.rank
    """
    from finetune.config.reference import explain as explain_key

    console.data(explain_key(key))


def main() -> None:
    """The entry point: runs a command, and turns what goes wrong into one clear message and an exit code.

    2: the input is wrong. 1: the machine or the moment is. 75: stopped, and the same command goes on. 130: interrupted,
    and there is nothing to go on with. 70: a bug of ours.
    """
    try:
        # Without standalone mode, typer hands back an exit code instead of exiting with it.
        sys.exit(app(prog_name="ft", standalone_mode=False))
    except FinetuneError as error:
        console.error(error)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        console.data(error.format_message())
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "ft"
        console.error(FinetuneError(error.format_message(), hint=f"`{command} --help` shows how it is used"))
        sys.exit(error.exit_code)
    except Stopped as stopped:
        console.say(f"stopped ({stopped}): the same command goes on")
        sys.exit(RESUMABLE)
    except (KeyboardInterrupt, click.Abort):
        console.say("interrupted")
        sys.exit(INTERRUPTED)
    except MemoryError:
        hint = "close other programs, or give this one less to do at a time"
        console.error(FinetuneError("this machine's memory does not suffice", hint=hint))
        sys.exit(1)
    except Exception as error:
        from finetune.bugs import report

        console.error(report(error))
        sys.exit(70)


if __name__ == "__main__":
    main()
