"""`python -m infalign`."""

import os
import sys

# Python puts the current folder first here, so that a file called like a library would take its place.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from infalign.cli.main import main

main()
