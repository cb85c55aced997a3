"""Windowed, anchored and top-k-selected attention for long contexts.

>>> import torch, condensate_ext
>>> q, k, v = (torch.randn(1, 8, 4096, 128) for _ in range(3))
>>> out = condensate_ext.attention(q, k, v, window=256, anchors=64, topk=1728)

Importing the package needs no GPU. Should the compiled operators be missing, the import still
works, calling any of them says what is missing, and ``python -m condensate_ext doctor`` shows more.
"""

from importlib.metadata import version as _version

from condensate_ext import _loader
from condensate_ext.audit import OmittedMassAudit, audit_omitted_mass
from condensate_ext.diagnostics import ErrorWord, last_plan, read_error_word
from condensate_ext.kvcache import (
    KVSummaries,
    attention_with_kvcache,
    select_tokens_with_kvcache,
    token_sparse_attention_with_kvcache,
)
from condensate_ext.ops import (
    attention,
    attention_forward,
    block_sparse_attention,
    block_summaries,
    select_blocks,
)
from condensate_ext.states import merge_states, omitted_mass

__version__ = _version("condensate_ext")

if _loader.LOAD_ERROR is None:
    from condensate_ext import _arguments, _autocast, _autograd, _fake

    _arguments.register()
    _fake.register()
    _autograd.register()
    _autocast.register()

__all__ = [
    "ErrorWord",
    "KVSummaries",
    "OmittedMassAudit",
    "__version__",
    "attention",
    "attention_forward",
    "attention_with_kvcache",
    "audit_omitted_mass",
    "block_sparse_attention",
    "block_summaries",
    "last_plan",
    "merge_states",
    "omitted_mass",
    "read_error_word",
    "select_blocks",
    "select_tokens_with_kvcache",
    "token_sparse_attention_with_kvcache",
]
