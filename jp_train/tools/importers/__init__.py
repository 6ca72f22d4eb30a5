"""Real-world data layouts -> WebDataset shards; `run.py` is the file to open first, then `entries.py`.

    listing (one process)       a reader lists its source as chunks of entries, in a fixed order, without opening
                                images
    samples (worker processes)  each chunk -> samples (key, fields) or skipped entries with a reason
    shards (one process)        samples in listing order -> tars, `manifest.json`, `skipped.jsonl`

What a shard holds depends on the order of the listing alone: neither the number of processes nor a kill changes its
bytes.
"""
