"""``python -m hf_gradnas.prune``: runs the command and defines nothing."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
