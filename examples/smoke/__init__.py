"""The demonstration run behind ``make smoke``: data, tokenizer, pretrained parts and judges, all made from what pip
installs.

Nothing here is needed to train a full-size model.  The modules build the same artefacts that a real run
starts from (WebDataset shards, a Hugging Face tokenizer folder, a ``JanusForConditionalGeneration`` folder)
at a size that two CPU cores can train in minutes, and judge what comes out.
"""
