"""From tar shards to packed batches. A sample passes five stations; each names its modules in reading order.

shards: files with byte ranges, and the samples in them
    tar_headers     the members of a tar, checked strictly
    tar_samples     members with one key are a sample
    hub             addresses of hf:// files
    http_ranges     byte ranges of a shard on a server
    stores          byte ranges, listing and uploads of objects in a store (s3, gs, az)
    shards          names of shards, byte ranges, lists of members
    field_map       where the parts of a sample lie, and which samples are used
    sample_map      a user's own function between the files of a sample and its texts
    dialogue        conversations as public sets write them -> questions and answers
    samples         members -> a typed sample, or the reason to skip it
    writer          new shards, whole or absent

index: where each sample lies and how many tokens it has; built once, in files beside the shard
    tokenizer       text <-> ids
    layouts         a sample -> the parts of its document
    encode          parts -> ids and labels; counts for the index, documents for the rows
    token_ids       the ids of a shard's texts, as stored
    sidecar         the index files of one shard
    exclusions      samples that `data verify --exclude` took out
    processes       worker processes, and the pool that the index is built by
    index           the index of all sources
    vq_ids          VQ ids of a shard's images, as stored
    vq_use          which stored VQ ids a run uses

plan: which documents make which row of which step
    permute         random numbers that are functions of integers and names
    sequence        the endless sequence of one source
    mixture         which source comes next
    stream          the documents of all sources, in the order they are dealt
    packing         which pending documents make the next row
    plan            the rows of every step
    snapshots       states of the plan, kept in the run folder

rows: the documents of a row, read, decoded and encoded
    sample_fields   the bytes of one sample
    sample_reader   the sample of a number
    image           an image file -> pixels
    image_threads   the images of a row, in threads
    rows            the row of a RowSpec
    ledger          the skipped documents, named and limited

batches: rows laid end to end, as the model takes them
    collate         rows -> PackedBatch
    loader          the batches of each step, built by worker processes
    batch_text      tokens as text that a person can read
    batch_file      a batch as a file
"""
