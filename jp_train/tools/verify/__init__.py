"""`jp-train data verify`: every shard, image and text once."""
