"""`jp-train data encode-images`: VQ ids of pictures, once, beside their shards."""
