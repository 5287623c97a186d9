"""What moved, what is wrong, and since when."""
