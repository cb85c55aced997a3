"""Condensate attention in Hugging Face transformers.

Importing this module lets a model be loaded with ``attn_implementation="condensate"``, which runs
the default policy; :func:`enable` sets another, :func:`condensed_attention` does so for a while.
Needs transformers 5. What cannot be computed right is refused by a ``NotImplementedError`` that
names the layer, the reason and the way out.
"""

from condensate_ext.transformers.policy import Policy
from condensate_ext.transformers.refusals import refusal_of
from condensate_ext.transformers.switch import (
    condensed_attention,
    disable,
    enable,
    register,
    replaced_attention,
)

register()

__all__ = [
    "Policy",
    "condensed_attention",
    "disable",
    "enable",
    "refusal_of",
    "replaced_attention",
]
