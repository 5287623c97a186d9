"""What a checkpoint says of its BatchNorm layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.inspection.averages import averages_alone, of_averages
from lightning_bn.functional.inspection.entries import DEEPEST, Entry, Role, bare, deeper_than_searched, entries_in
from lightning_bn.functional.inspection.findings import FileFinding, findings_of, listed
from lightning_bn.functional.inspection.layer_facts import LayerFacts, layer_facts
from lightning_bn.functional.inspection.recalibrated_layers import callbacks_of, recalibrated_layers
from lightning_bn.functional.inspection.remedies import Recalibrating, keys_of, recalibrating
from lightning_bn.functional.layers.patterns import Patterns, SelectionError, as_patterns
from lightning_bn.functional.statistics.opened_files import OpenedFile, open_checkpoint, shown


@dataclass(frozen=True)
class InspectedEntry:
    """One set of BatchNorm layers in a file.

    Attributes:
        key: Of its state dict in the file, outer keys first with dots between, and the prefix of a copy inside a model;
            empty for the file itself.
        role: ``"model"``; ``"averaged"``, weights that are an average of others; ``"in training"``, those they are an
            average of; ``"task"``, statistics of one task.
        layers: What each layer says.
        not_listed: Why tensors that look like a layer's are none, by name.
        recalibrated: Layers whose statistics a recalibration wrote, as the file records, by name; with its batches and
            the samples in them, None where the file does not say.
        command: Of a shell, that recalibrates the set; empty where none does.
    """

    key: str
    role: Role
    layers: tuple[LayerFacts, ...]
    not_listed: Mapping[str, str]
    recalibrated: Mapping[str, tuple[int | None, int | None]]
    command: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says of its BatchNorm layers.

    Attributes:
        path: What was named.
        files: What was read.
        kind: Of the files, in words.
        size: Of all files that were read, in bytes.
        about: What a checkpoint of Lightning says of itself: epoch, step and version; empty for others.
        entries: Every set of BatchNorm layers, the model's own first.
        findings: Faults first.
        callbacks: States of callbacks in a checkpoint of Lightning, as they are saved.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    size: int
    about: Mapping[str, str | int]
    entries: tuple[InspectedEntry, ...]
    findings: tuple[FileFinding, ...]
    callbacks: Mapping[str, Any]

    @property
    def faults(self) -> tuple[FileFinding, ...]:
        """The findings that make the file unhealthy."""
        return tuple(one for one in self.findings if one.is_fault)


def inspect_checkpoint(path: str | Path, modules: Patterns = None) -> Inspection:
    """Return what a checkpoint says of its BatchNorm layers; nothing in the file is executed.

    A layer is what has a ``running_mean`` and a ``running_var`` of one value per channel: a file does not say of which
    kind a layer is, and an InstanceNorm with running statistics looks the same. Memory needed is some ten times what
    those layers take in the file, of which 64 MiB are read at most; see
    :func:`~lightning_bn.functional.statistics.opened_files.open_checkpoint` for what else is read.

    Args:
        path: A file of torch.save or of safetensors, the index of a sharded checkpoint, or a folder that holds one.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`, on the names in the file; None for all.

    Raises:
        ValueError: If it is no checkpoint, is cut off, says of itself what cannot be, or has no BatchNorm layer.
        SelectionError: If a pattern means no layer.
        OSError: If it cannot be read.
        ModuleNotFoundError: If the library of its format is not installed.
        pickle.UnpicklingError: If it holds more than tensors and plain values.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(model.state_dict(), f"{folder}/model.pt")
        ...     found = inspect_checkpoint(f"{folder}/model.pt")
        >>> found.faults[0].kind, found.faults[0].layers
        ('never updated', ('1',))
    """
    file = open_checkpoint(path)
    entries = [one for one in _selected(entries_in(file.content), modules) if one.layers or one.broken or one.foreign]
    if not any(one.layers or one.broken for one in entries):
        raise ValueError(_nothing(file, entries))
    inspected, findings, keys = [], [], keys_of(entries)
    for entry in entries:
        recalibrated = recalibrated_layers(entry, file)
        counters_tell = {*entry.layers} - {*recalibrated} if entry.role != "averaged" else ()
        facts = [
            one if one.name in counters_tell else replace(one, initial_left=None, lost_counter=False)
            for one in layer_facts(_with_affine(entry, entries[0]), file.size)
        ]
        way = recalibrating(entry, keys, file)
        others = {**entry.broken, **entry.foreign}
        inspected.append(InspectedEntry(entry.key, entry.role, tuple(facts), others, recalibrated, way.command))
        findings += [*_broken(entry, way), *findings_of(entry.key, facts, entry.role, way, recalibrated)]
        if len(recalibrated) < len(entry.layers):
            findings += of_averages(entry, entries, way)
    findings += averages_alone(entries, keys, file)
    findings.sort(key=lambda one: not one.is_fault)
    return Inspection(
        path=file.path,
        files=file.files,
        kind=file.kind,
        size=file.size,
        about=_about(file.content),
        entries=tuple(inspected),
        findings=tuple(findings),
        callbacks=callbacks_of(file.content),
    )


def _selected(entries: Sequence[Entry], modules: Patterns) -> list[Entry]:
    if modules is None:
        return list(entries)
    known = [name for one in entries for name in (*one.layers, *one.broken, *one.foreign)]
    patterns = as_patterns(modules, "modules")
    for pattern in patterns:
        if not any(map(pattern.matches, known)):
            raise SelectionError(
                f"modules: {pattern.text!r} matches no BatchNorm layer of the file, which has {quoted(known)}."
            )

    def chosen(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in parts.items() if any(pattern.matches(name) for pattern in patterns)}

    return [
        replace(one, layers=chosen(one.layers), broken=chosen(one.broken), foreign=chosen(one.foreign))
        for one in entries
    ]


def _nothing(file: OpenedFile, entries: Sequence[Entry]) -> str:
    foreign = [f"{name} {why}" for one in entries for name, why in one.foreign.items()]
    if foreign:
        return f"{file.path.name} has no BatchNorm layer: {shown(foreign[0])}."
    deeper = deeper_than_searched(file.content)
    if deeper:
        return (
            f"{file.path.name} has BatchNorm layers only deeper than the {DEEPEST} keys one inside the other "
            f"that are searched: under {shown(deeper)!r}. Save what is there in a file of its own, and name that."
        )
    keys = [shown(key, 40) for key in file.content]
    inside = f" Its keys: {quoted(keys)}." if keys and not file.metadata and "safetensors" not in file.kind else ""
    return (
        f"{file.path.name} has no BatchNorm layer: no name in it ends with running_mean or running_var.{inside} Models "
        f"with LayerNorm or GroupNorm keep no running statistics."
    )


def _with_affine(entry: Entry, first: Entry) -> dict[str, dict[str, Any]]:
    """The layers, with the model's own weights where a set has none: tasks share them."""
    if entry.role != "task":
        return {name: dict(parts) for name, parts in entry.layers.items()}
    own = bare(first)
    found = {}
    for short, name in bare(entry).items():
        parts, shared = dict(entry.layers[name]), first.layers.get(own.get(short, ""), {})
        affine = {key: shared[key] for key in ("weight", "bias") if key in shared}
        fits = all(one.shape == parts["running_mean"].shape for one in affine.values())
        found[name] = {**parts, **(affine if fits else {})}
    return found


def _broken(entry: Entry, way: Recalibrating) -> list[FileFinding]:
    found = []
    if entry.broken:
        why = "; ".join(f"{listed([name])} {why}" for name, why in [*entry.broken.items()][:4])
        layers = counted(len(entry.broken), "layer")
        what = f"The tensors of {layers} are not those of a whole BatchNorm: {why}."
        remedy, command = "Go back to the file that this one was made from.", ""
        if all(" without " in one for one in entry.broken.values()):
            remedy += " Without it, recalibrate: running statistics that a file lacks are added."
            remedy, command = f"{remedy} {way.instead}".rstrip(), way.command
        found.append(FileFinding("broken", True, entry.key, tuple(entry.broken), what, remedy, command))
    if entry.foreign:
        why = "; ".join(f"{listed([name])} {why}" for name, why in [*entry.foreign.items()][:4])
        what = f"Of another kind than BatchNorm, and not listed: {why}."
        found.append(FileFinding("other kind", False, entry.key, tuple(entry.foreign), what, "Nothing is to be done."))
    return found


def _about(content: Mapping[Any, Any]) -> dict[str, str | int]:
    known = ("epoch", "global_step", "pytorch-lightning_version")
    found = {key: content[key] for key in known if isinstance(content.get(key), str | int)}
    return {key: shown(value, 40) if isinstance(value, str) else value for key, value in found.items()}
