"""Population statistics from batches (precise BN)."""
