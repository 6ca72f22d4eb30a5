"""`jp-train data explain`: what was in a step."""
