"""A synchronized BatchNorm that runs on a CPU, by the contract of torch's, which needs an accelerator in train mode."""

from __future__ import annotations

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class ReferenceSyncBatchNorm(_BatchNorm):
    """Normalizes the batches of all processes of its group as one; in eval, and alone, it is a BatchNorm.

    Not derived from `nn.SyncBatchNorm`, which DDP refuses on a CPU.
    """

    #: Collectives of all layers in this process.
    collectives = 0

    def __init__(self, num_features: int, process_group: dist.ProcessGroup | None = None, **kwargs: object) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[arg-type]
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        running_mean, running_var = (self.running_mean, self.running_var) if tracked else (None, None)
        from_batch = self.training or (self.running_mean is None and self.running_var is None)
        alone = not (self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1)
        if alone:
            return F.batch_norm(input, running_mean, running_var, self.weight, self.bias, from_batch, factor, self.eps)
        values = input.transpose(0, 1).flatten(1)
        # Like torch's kernels, which sum up in float32 at least.
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        shape = (1, -1, *[1] * (input.dim() - 2))
        sums = torch.cat((values.sum(1), values.new_tensor([values.shape[1]])))
        sums = self._over_group(sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        m2 = self._over_group((values - mean[:, None]).square().sum(1))
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.mul_(1 - factor).add_(factor * mean.to(running_mean.dtype))
                running_var.mul_(1 - factor).add_(factor * (m2 / (count - 1)).to(running_var.dtype))
        scale = (m2 / count + self.eps).rsqrt()
        out = ((input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)).to(input.dtype)
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)

    def _over_group(self, tensor: Tensor) -> Tensor:
        ReferenceSyncBatchNorm.collectives += 1
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return all_reduce(tensor, group=group)


def synchronized(
    model: nn.Module, group: dist.ProcessGroup | None = None, but: tuple[str, ...] = (), device: str = "cpu"
) -> nn.Module:
    """The model with its BatchNorm layers replaced by synchronized ones, torch's own on an accelerator."""
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, _BatchNorm) or name in but:
            continue
        if layer not in made:
            on_cpu = device == "cpu"
            made[layer] = _converted(layer, group) if on_cpu else nn.SyncBatchNorm.convert_sync_batchnorm(layer, group)
        new = made[layer]
        if not name:
            return new
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    return model.to(device)


class ReferenceSync(LayerSync):
    """For `Trainer(plugins=...)`: converts and reverts when `sync_batchnorm=True` does, on a CPU.

    Args:
        but: Names of layers that stay plain.
    """

    def __init__(self, but: tuple[str, ...] = ()) -> None:
        self.but = but

    def apply(self, model: nn.Module) -> nn.Module:
        self.kinds = {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        return synchronized(model, but=self.but)

    def revert(self, model: nn.Module) -> nn.Module:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, ReferenceSyncBatchNorm):
                plain = self.kinds[name](layer.num_features, layer.eps, layer.momentum)
                plain._parameters.update(layer._parameters)
                plain._buffers.update(layer._buffers)
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, plain)
        return model


def _converted(layer: _BatchNorm, group: dist.ProcessGroup | None) -> ReferenceSyncBatchNorm:
    new = ReferenceSyncBatchNorm(
        layer.num_features,
        group,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
    )
    # The tensors themselves, as torch's conversion keeps them.
    new._parameters.update(layer._parameters)
    new._buffers.update(layer._buffers)
    new.training = layer.training
    return new
