"""The commands on files that are there: their options are said here, not by a recipe's fields."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

EXIT_CODES = "Exit codes: 0 done, 1 {one}, 2 bad input, 130 interrupted, 143 terminated."
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")

JSON = "Write one JSON object to standard output, and nothing else; nothing if the input is bad."


def apply_command(  # noqa: PLR0913, PLR0917 - Typer reads the options from the signature
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="File of hf-gradnas plan.")],
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder of the whole model, in safetensors.")
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder of the pruned model.")],
    scores: Annotated[
        Optional[str],  # noqa: UP045 - as below
        typer.Option(
            metavar="FILE",
            help="Scores that the plan was made from: for the card, and for the axes where the "
            "plan does not say them.",
        ),
    ] = None,
    repair: Annotated[
        Optional[str],  # noqa: UP045 - as below
        typer.Option(metavar="FILE", help="New weights for this plan, of prune or Repair.save."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights, such as 5GB.")
    ] = "50GB",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Type of the weights: float32, bfloat16, float16; auto is that of the files.",
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace what hf_gradnas wrote there.")
    ] = False,
    report: Annotated[bool, typer.Option(metavar="", help="Write report/ beside it.")] = True,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            metavar="",
            help="Run the original, masked, and the result on random input, and compare: layer by "
            "layer where there is no room for all weights.",
        ),
    ] = False,
) -> int:
    """Cut a checkpoint of any size to a plan, from its files to new ones: no weights in memory.

    For example: hf-gradnas apply plan.json ./llama-70b --output ./llama-40b --max-shard-size 5GB
    """
    from .apply import apply_from_arguments

    options: dict[str, Any] = {"max_shard_size": max_shard_size, "dtype": dtype}
    options |= {"overwrite": overwrite, "report": report, "scores": scores, "repair": repair}
    options["check"] = check
    raise typer.Exit(apply_from_arguments(plan, checkpoint, output, **options))


def verify_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a pruned model.")],
    device: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads it at run time, on Python 3.10 too
        typer.Option(
            "--device", metavar="DEVICE", help="Where to run. Default: as when it was saved."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            metavar="",
            help="Run code of the folder that hf_gradnas did not write.",
        ),
    ] = False,
    original: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(
            metavar="CHECKPOINT",
            help="Compare the weights with the kept rows of the original, bit by bit.",
        ),
    ] = None,
    scores: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(
            metavar="FILE", help="Scores that the plan was made from: for --original, where needed."
        ),
    ] = None,
    repair: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(metavar="FILE", help="New weights that were cut along: for --original."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help=JSON)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", metavar="", help="Print errors only.")] = False,
) -> int:
    """Prove again that a saved model is what it was: its files, and its outputs in a new process.

    For example: hf-gradnas verify ./bert-base-uncased-gradnas
    """
    from .verify import verify_from_options

    code = verify_from_options(
        folder,
        device=device,
        trust_remote_code=trust_remote_code,
        original=original,
        scores=scores,
        repair=repair,
        as_json=as_json,
        quiet=quiet,
    )
    raise typer.Exit(code)


@export_app.callback()
def _describe_export() -> None:
    """Write a model in the format of another tool."""


@export_app.command("gguf", epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.")
def export_gguf_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a model, pruned or not.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="File to write, such as model.gguf.")],
    type_: Annotated[
        str,
        typer.Option(
            "--type", metavar="TYPE", help=f"Numbers of the matrices: {', '.join(GGUF_TYPES)}."
        ),
    ] = "f16",
    pre_tokenizer: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads it at run time, on Python 3.10 too
        typer.Option(
            metavar="NAME",
            help="llama.cpp's name of how the tokenizer splits text, where it is not found.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace a GGUF file that is there.")
    ] = False,
) -> None:
    """Write a model as one GGUF file, for llama.cpp, Ollama and LM Studio; both layouts.

    For example: hf-gradnas export gguf ./llama-gradnas llama-q8_0.gguf --type q8_0
    """
    from .export import export_gguf_from_arguments

    code = export_gguf_from_arguments(
        folder, out, type=type_.lower(), pre_tokenizer=pre_tokenizer, overwrite=overwrite
    )
    raise typer.Exit(code)


def push_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a pruned model.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where to push it.")],
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="Make it private.")
    ] = False,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Message of the commit.")] = "",
    branch: Annotated[str, typer.Option(metavar="NAME", help="Made if it is not there.")] = "main",
) -> None:
    """Push a model that was pruned and saved before to the Hub, in one commit.

    For example: hf-gradnas push ./bert-base-uncased-gradnas me/bert-small
    """
    from .prune import push_from_arguments

    code = push_from_arguments(folder, repository, private=private, message=message, branch=branch)
    raise typer.Exit(code)


def add_file_commands(app: typer.Typer) -> None:
    """Add the commands of this file to a program, in the order of its help."""
    app.command(
        "apply", epilog="Exit codes: 0 done, 1 the check failed, 2 bad input, 130 interrupted."
    )(apply_command)
    app.command("verify", epilog=EXIT_CODES.format(one="verification failed"))(verify_command)
    app.add_typer(export_app, name="export")
    app.command("push", epilog=EXIT_CODES.format(one="the upload failed"))(push_command)
