"""From tar shards to packed batches: the index, the plan that orders documents, and the workers that read them."""
