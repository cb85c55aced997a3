"""Queries, keys and values of one layer of a trained model; condensate_ext.captured reads them."""
