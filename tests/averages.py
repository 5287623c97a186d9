"""Lightning's callbacks that average weights; where its version has none, a test that makes one is skipped."""

from typing import TYPE_CHECKING, Any

import pytest
import pytorch_lightning as pl

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import EMAWeightAveraging, WeightAveraging
else:

    class _Absent(pl.Callback):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pytest.skip(f"pytorch-lightning {pl.__version__} has no WeightAveraging")

    WeightAveraging = getattr(pl.callbacks, "WeightAveraging", _Absent)
    EMAWeightAveraging = getattr(pl.callbacks, "EMAWeightAveraging", _Absent)

__all__ = ["EMAWeightAveraging", "WeightAveraging"]
