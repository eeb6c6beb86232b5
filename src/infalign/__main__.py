"""`python -m infalign`."""

from infalign.cli.main import main

main()
