"""What a checkpoint says of its BatchNorm layers, without the model: inspected, and compared with another.

Nothing in a file is executed, and of what it holds only BatchNorm is looked at.
"""

from lightning_bn.functional.inspection.compare import compare_checkpoints
from lightning_bn.functional.inspection.comparison import ComparedLayer, Comparison
from lightning_bn.functional.inspection.findings import FileFinding
from lightning_bn.functional.inspection.inspect import InspectedEntry, Inspection, inspect_checkpoint
from lightning_bn.functional.inspection.layer_facts import LayerFacts

__all__ = [
    "ComparedLayer",
    "Comparison",
    "FileFinding",
    "InspectedEntry",
    "Inspection",
    "LayerFacts",
    "compare_checkpoints",
    "inspect_checkpoint",
]
