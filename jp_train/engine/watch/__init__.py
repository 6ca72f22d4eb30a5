"""What watches a run: stalls, unequal module sequences, stop signals."""
