"""Base: a pretrained model on disk.

It is found, fetched, fingerprinted, read one weight at a time, loaded, and written with deltas added.
"""
