"""The trained model: transformers' Janus modules composed for packed rows, their losses, weights in and out, and their
arithmetic.

`janus_pro.py` is the file to open first; the VQ tokenizer (`vq.py`) is never part of the trained module.
"""
