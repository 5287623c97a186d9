"""The command line: ``python cli.py fit --config config.yaml``. Everything it does is in the YAML file."""

from pytorch_lightning import Callback
from pytorch_lightning.cli import ArgsType, LightningCLI

from data import DigitPictures
from model import TwoTasks


def main(args: ArgsType = None, callbacks: list[Callback] | None = None) -> LightningCLI:
    """Runs what ``args`` say, or else the command line, with ``callbacks`` beside those of the YAML file."""
    return LightningCLI(TwoTasks, DigitPictures, args=args, trainer_defaults={"callbacks": callbacks or []})


if __name__ == "__main__":
    main()
