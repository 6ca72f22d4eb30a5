"""`jp-train data encode-images`: VQ ids of images, once, beside their shards."""
