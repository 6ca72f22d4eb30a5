"""Complete runs to learn from: `python -m examples.smoke`, `python -m examples.showcase`."""
