"""The user's loaders and step once more, without a trace."""
