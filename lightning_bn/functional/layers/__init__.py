"""Which BatchNorm layers are meant, under which names, and in which state each of them is."""
