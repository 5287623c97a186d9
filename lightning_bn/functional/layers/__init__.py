"""Which BatchNorm layers are meant, under which names, and in which state each of them is.

The one grammar of selection, what a layer's next forward does, who froze it, and the one way to put other tensors or
attributes in a layer's place for a while.
"""

from lightning_bn.functional.layers.behavior import LayerBehavior, describe
from lightning_bn.functional.layers.exchange import ExchangeError
from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.layers.selection import batch_norm_layers, tracked_layers
from lightning_bn.functional.layers.status import LayerStatus, is_frozen, layer_status
from lightning_bn.functional.layers.update_pause import without_updates

__all__ = ["ExchangeError", "LayerBehavior", "LayerStatus", "SelectionError", "batch_norm_layers", "describe"]
__all__ += ["is_frozen", "layer_status", "tracked_layers", "without_updates"]
