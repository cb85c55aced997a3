"""How close a language model with condensate attention stays to itself with dense attention.

``python -m condensate_ext evaluate`` runs every protocol; the functions here are its parts. They
take a transformers causal LM in eval mode, token ids ``[B, n]`` int64 on its device, and policies:
keyword arguments of :func:`condensate_ext.attention`.

A tile of queries shares one list, so in prefill a row's list can depend on later queries of its
tile. :func:`compare_decode`, one query at a time, has no such dependence; :func:`ask_needles` puts
the question into the last tile and the answer behind it, so nothing of the answer can steer a list.
"""

from condensate_ext.evaluate.calibration import load_layers
from condensate_ext.evaluate.language import (
    Fidelity,
    compare_cache,
    compare_decode,
    compare_prefill,
)
from condensate_ext.evaluate.needles import (
    Answer,
    Needle,
    ask_needles,
    hide_needles,
    make_needles,
)
from condensate_ext.evaluate.omission import Audit, audit, audited_rows
from condensate_ext.evaluate.policies import (
    CONTROL,
    Policy,
    Variant,
    covering,
    keys_per_query,
    policy,
)
from condensate_ext.evaluate.runs import greedy_tokens
from condensate_ext.evaluate.survival import compare_continuations, identical_prefix

__all__ = [
    "CONTROL",
    "Answer",
    "Audit",
    "Fidelity",
    "Needle",
    "Policy",
    "Variant",
    "ask_needles",
    "audit",
    "audited_rows",
    "compare_cache",
    "compare_continuations",
    "compare_decode",
    "compare_prefill",
    "covering",
    "greedy_tokens",
    "hide_needles",
    "identical_prefix",
    "keys_per_query",
    "load_layers",
    "make_needles",
    "policy",
]
