"""The smoke run with emoji in three drawing styles and WordNet: `python -m examples.showcase`."""
