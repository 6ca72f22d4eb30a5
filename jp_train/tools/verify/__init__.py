"""`jp-train data verify`: every shard, picture and text once."""
