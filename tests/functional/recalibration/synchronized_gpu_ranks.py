"""The same recalibrations with torch's own SyncBatchNorm, all ranks on one CUDA device."""

from tests.functional.recalibration.synchronized_ranks import main

if __name__ == "__main__":
    main("cuda")
