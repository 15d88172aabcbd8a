"""`python -m megagrow` is the command line; the launchers start it so."""

from megagrow.cli.app import main

main()
