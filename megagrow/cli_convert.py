"""The command line's `megagrow convert`: a model in another layout, or in other tools' formats."""

import typer

convert_app = typer.Typer(
    help="Write a model in another layout or for other tools; no GPU, bounded memory.",
    no_args_is_help=True,
)
