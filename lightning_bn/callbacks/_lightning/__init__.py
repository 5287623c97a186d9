"""The only place that knows Lightning's private or version-bound parts, and both its namespaces."""
