"""`jp-train check`: what would stop a run, found before anything starts, and the resolved plan of the stage."""
