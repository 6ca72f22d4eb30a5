"""`jp-train data simulate`: fill, ratio, epochs and reads of a whole stage."""
