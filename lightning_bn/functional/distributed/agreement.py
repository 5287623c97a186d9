"""Facts that all processes of a run have to share, before they do something together."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.distributed.waiting import waiting
from lightning_bn.functional.statistics.channels import ChannelLayout

Facts = Mapping[str, Hashable]
_NEEDED = "All ranks need the same model, selection, settings and frozen layers."


class DisagreementError(RuntimeError):
    """Processes that were to do the same thing would have done different ones; none of them did anything."""


def layer_facts(layout: ChannelLayout) -> dict[str, Hashable]:
    """Which layers are meant and how many channels each has, as facts."""
    return {f"layer {name!r}": counted(size, "channel") for name, size in zip(layout.names, layout.sizes, strict=True)}


def tell_failure(device: torch.device, doing: str = "recalibrate") -> bool:
    """Tell the other processes, who wait in :func:`agree`, that this one failed; return whether they had not."""
    try:
        agree(None, device, doing=doing)
    except DisagreementError:
        return True
    return False


def agree(
    facts: Facts | None,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    doing: str = "recalibrate",
    needed: str = _NEEDED,
) -> None:
    """Return where all processes have the same facts in the same order, and raise on all of them otherwise.

    Costs one small all_reduce. Values that are equal have to look equal, since their text is compared.

    Args:
        facts: What has to be the same, by name; None where this process failed. If all of them did, nothing is
            told: each has an error of its own.
        device: Where the process group can communicate.
        group: Which processes; None for all.
        doing: What they are about to do, for the error.
        needed: What they need, for the error.

    Raises:
        DisagreementError: On every process, with the facts that differ and what each process has.
    """
    # In their order, in which their values lie in what is reduced.
    told = None if facts is None else [(name, repr(value)) for name, value in facts.items()]
    digest = hashlib.sha256(repr(told).encode()).digest()
    number = torch.tensor(int.from_bytes(digest[:7], "big"), dtype=torch.int64, device=device)
    bounds = torch.stack((number, -number))
    with waiting("this process"):
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = bounds.tolist()
    if largest == -smallest:
        return
    # The slow way round, to say which.
    of_ranks: list[list[tuple[str, str]] | None] = [None] * dist.get_world_size(group)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(of_ranks, told, group=group)
    raise DisagreementError(
        f"the processes would {doing} differently: {_differences(of_ranks)}. {needed} Nothing was changed."
    )


def _differences(of_ranks: Sequence[list[tuple[str, str]] | None], most: int = 5) -> str:
    """What the processes do not share, in words."""
    failed = [str(rank) for rank, facts in enumerate(of_ranks) if facts is None]
    if failed:
        return f"rank {', '.join(failed)} failed: look for its error"
    known = [dict(facts or []) for facts in of_ranks]
    names = dict.fromkeys(name for facts in known for name in facts)
    differing = [name for name in names if len({facts.get(name) for facts in known}) > 1]
    if not differing:
        return f"they have the same {quoted(list(names))} in another order"
    said = []
    for name in differing[:most]:
        values = [facts.get(name, "not there").strip("'") for facts in known]
        said.append(f"{name} ({', '.join(f'rank {rank}: {value}' for rank, value in enumerate(values))})")
    more = len(differing) - most
    return "; ".join(said) + (f"; {counted(more, 'more difference')}" if more > 0 else "")
