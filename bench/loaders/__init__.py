"""What bench/data.py compares: the samples, and one module per loader."""
