"""``python -m lightning_bn`` does what ``lightning-bn`` does."""

import sys

from lightning_bn._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
