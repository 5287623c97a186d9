"""What processes agree on, and who waits for whom."""
