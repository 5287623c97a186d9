"""The only place that knows Lightning's private or version-bound parts, and both its namespaces."""

import sys

from lightning_utilities.core import rank_zero

LOG = rank_zero.log if {"pytorch_lightning", "lightning.pytorch"} & sys.modules.keys() else None
"""Where the Lightning that the user imported says things; None if none was imported before this package."""
