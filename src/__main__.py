"""`python -m modelharbor` is the command line."""

from modelharbor.cli import main

main()
