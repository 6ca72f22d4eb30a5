"""Everything that knows a file of the run folder: who writes it beside who reads it."""
