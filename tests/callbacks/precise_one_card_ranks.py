"""`precise_gpu_ranks` on a CPU."""

from tests.callbacks.precise_gpu_ranks import main

if __name__ == "__main__":
    main("cpu")
