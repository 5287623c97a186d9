"""Mistakes that a model shows before anything is trained, each with why it hurts and the line that mends it.

One file for each subject; :data:`RULES` lists all rules.
"""

from lightning_bn.functional.doctor.all_rules import diagnose
from lightning_bn.functional.doctor.finding import Finding

__all__ = ["Finding", "diagnose"]
