"""Defaults of the operators' arguments, as csrc/torch/library.cc has them in the schemas; a test
holds the two together."""

WINDOW = 256
ANCHORS = 64
TOPK = 1728  # with window and anchors 2,048 keys

# Of decoding over a cache.
CACHE_TOPK = 704  # with window and anchors 1,024 keys
SHORTLIST = 4096
