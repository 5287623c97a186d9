"""Values of running statistics: copied, written back, merged, compared."""
