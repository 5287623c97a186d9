"""Lines that mend a mistake: of Python, and of the YAML that a LightningCLI reads."""

from __future__ import annotations

import json
from collections.abc import Collection

from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.layers.patterns import shortest_paths

IN_CONSTRUCTION = "# where the model is made:"


def freeze_lines(examination: Examination, names: Collection[str]) -> str:
    """Return the lines that freeze layers, with Lightning and without."""
    paths = examination.paths(names)
    return lines(
        f"Trainer(callbacks=[BatchNormFreezer({paths})])",
        "# or without Lightning:",
        f"freeze_batch_norm(model, {paths})",
    )


def freeze_yaml(examination: Examination, names: Collection[str]) -> str:
    """Return what freezes layers in a YAML file."""
    return callback_yaml("BatchNormFreezer", modules=shortest_paths(names, examination.layers))


def set_attribute(names: Collection[str], attribute: str, value: object) -> str:
    """Return the lines that set an attribute of modules.

    Example:
        >>> print(set_attribute(["bn"], "momentum", 0.1))
        for name in ['bn']:
            model.get_submodule(name).momentum = 0.1
    """
    return lines(f"for name in {[*names]!r}:", f"    model.get_submodule(name).{attribute} = {value!r}")


def callback_yaml(name: str, **arguments: object) -> str:
    """Return a callback of this package as a YAML file has it.

    Example:
        >>> print(callback_yaml("PreciseBatchNorm", modules=["net", "head.bn"], containers_in_eval=True))
        trainer:
          callbacks:
            - class_path: lightning_bn.PreciseBatchNorm
              init_args:
                modules:
                  - "net"
                  - "head.bn"
                containers_in_eval: true
    """
    above = ["trainer:", "  callbacks:", f"    - class_path: lightning_bn.{name}"]
    of_class = ["      init_args:"] * bool(arguments)
    for key, value in arguments.items():
        if isinstance(value, list):
            of_class += [f"        {key}:", *(f"          - {json.dumps(one)}" for one in value)]
        else:
            of_class.append(f"        {key}: {json.dumps(value)}")
    return lines(*above, *of_class)


def lines(*given: str) -> str:
    """Return lines as one text."""
    return "\n".join(given)
