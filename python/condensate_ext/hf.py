"""The old name of :mod:`condensate_ext.transformers`."""

from condensate_ext.transformers import condensed_attention, replaced_attention

__all__ = ["condensed_attention", "replaced_attention"]
