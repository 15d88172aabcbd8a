"""`megagrow report` and `megagrow watch`: runs as a page, written to files or served live."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.options import RunDirectories
from megagrow.common.tables import print_json, print_lines, table_console
from megagrow.errors import ConfigError


def report(
    runs: RunDirectories,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the page, the tables and the plots. Default: report."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="`paper`: add the results of the paper.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the report as JSON; files only with --output."),
    ] = False,
) -> None:
    """Report on one or more runs: losses, comparison at equal cost, measured speedup, samples."""
    if against not in (None, "paper"):
        raise ConfigError(f"--against {against}: not known; use `paper` or omit the option")
    from megagrow.analysis.report.document import as_document
    from megagrow.analysis.report.files import (
        PAGE,
        load_report,
        print_report,
        write_report,
    )

    content = load_report(runs, against == "paper")
    folder = output or (None if as_json else Path("report"))
    if folder is not None:
        write_report(content, folder)
    if as_json:
        print_json(as_document(content))
    else:
        print_report(content, table_console())
        print_lines(table_console(), [f"Page: {folder}/{PAGE}"])


def watch(
    runs: RunDirectories,
    host: Annotated[
        str, typer.Option(help="Address to serve; 0.0.0.0 makes the page readable by the network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to serve; 0 takes a free one.")
    ] = 8765,
) -> None:
    """Serve the report on runs as a page that follows them while they train."""
    from megagrow.analysis.report.watch import LiveReport, WatchServer

    server = WatchServer(host, port, LiveReport(runs))
    print_lines(table_console(), [f"Serving {server.url} until Ctrl-C"])
    server.serve()
