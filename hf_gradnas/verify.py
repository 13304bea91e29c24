"""``python -m hf_gradnas.verify``: runs the command and defines nothing."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
