"""Tries every causal language model of transformers that can be built small.

    python tools/compatibility.py [--only NAME ...] [--write docs/compatibility.md]

Each is made from its configuration with random weights and few layers, runs a prompt of two rows,
then several steps over its cache, densely and with a budget that covers the context: the logits
have to be the same. What is refused has to be refused by name and reason.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from condensate_ext.transformers import computes, disable, enable
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

PROMPT, STEPS, VOCABULARY = 160, 4, 128
SECONDS = 120  # for one model
LIMIT = 2e-3  # of the largest logit; what is wrong is wrong by far more

# Of the fields that a configuration has, those that make its model small.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64,
    "embedding_size": 64, "word_embed_proj_dim": 64, "hidden_dim": 64,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64, "d_ff": 64,
    "decoder_ffn_dim": 64, "shared_intermediate_size": 64, "intermediate_size_mlp": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "attention_head_size": 16,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512,
    "sliding_window": 48, "attention_chunk_size": 64, "local_attention_window": 48,
    "window_size": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "zero_expert_num": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "qk_head_dim": 32, "v_head_dim": 16, "rotary_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_kv_shared_layers": 0, "kv_channels": 16, "lru_width": 64, "is_decoder": True,
    "per_layer_config": None, "activation_sparsity_pattern": None, "attn_layer_period": 2,
    "attn_layer_offset": 1, "attn_layer_indices": [1], "mamba_expand": 2, "dim_model": 64,
}  # fmt: skip
DEFAULTS_OF_NONE = {"sliding_window", "pad_token_id", "bos_token_id", "q_lora_rank"}


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str
    """identical, refused, not through the interface, not built, WRONG or an error"""
    detail: str = ""


def small_config(name: str) -> Any:
    """The default configuration of a model type, with the fields of ``SMALL``."""
    kind = transformers.AutoConfig.for_model(name)
    given = kind.to_dict()
    text = kind.get_text_config()
    if text is not kind:
        return type(text)(**_shrunk(text.to_dict()))
    return type(kind)(**_shrunk(given))


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "transformers_version")}
    small = {k: SMALL.get(k, v) for k, v in fields.items()}
    small |= {name: None for name in DEFAULTS_OF_NONE if name in fields and fields[name] is None}
    if "kv_lora_rank" in fields:  # latent attention: keys and values are expanded for every head
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    depth = 2
    for name in ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types"):
        kinds = fields.get(name)
        if isinstance(kinds, list) and kinds:
            chosen = list(dict.fromkeys(kinds))
            chosen += chosen[:1] * (2 - len(chosen))
            small[name] = chosen
            depth = max(depth, len(chosen))
    for name in ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types"):
        if isinstance(small.get(name), list):
            small[name] = (small[name] * depth)[:depth]
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in small:
            small[name] = depth
    return small


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and of steps over its cache."""
    out = model(input_ids=ids[:, :PROMPT], use_cache=True)
    scores, cache = [out.logits], out.get("cache", out.get("past_key_values"))
    if cache is None:
        raise RuntimeError("this model returns no cache")
    keyword = "cache" if "cache" in out else "past_key_values"
    for step in range(PROMPT, ids.shape[1], 2):
        out = model(input_ids=ids[:, step : step + 2], use_cache=True, **{keyword: cache})
        scores.append(out.logits)
    return torch.cat(scores, 1)


@contextlib.contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    """Counts what reaches this package's operators."""
    names = ("attention", "attention_forward", "attention_with_kvcache")
    originals = {name: getattr(computes, name) for name in names}

    def spy(name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return called

    for name in names:
        setattr(computes, name, spy(name))
    try:
        yield
    finally:
        for name in names:
            setattr(computes, name, originals[name])


def _timeout(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def try_model(name: str) -> Result:
    torch.manual_seed(0)
    try:
        config = small_config(name)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.randint(3, VOCABULARY, (2, PROMPT + 2 * STEPS))
        dense = run(model, ids)
    except Exception as error:
        return Result(name, "not built", f"{type(error).__name__}: {error}".split("\n")[0][:120])
    calls: Counter[str] = Counter()
    try:
        enable(model, topk=256)
        with counted(calls):
            ours = run(model, ids)
    except NotImplementedError as error:
        return Result(name, "refused", str(error).split("\n")[0])
    except RuntimeError as error:
        if "AttentionInterface" in str(error):
            return Result(name, "not through the interface")
        return Result(name, "error", f"{type(error).__name__}: {error}".split("\n")[0][:160])
    except Exception as error:
        return Result(name, "error", f"{type(error).__name__}: {error}".split("\n")[0][:160])
    finally:
        disable(model)
    if not calls:
        return Result(name, "not through the interface", "no layer called attention")
    worst = float((ours - dense).abs().max() / dense.abs().max())
    if not worst < LIMIT:
        return Result(name, "WRONG", f"logits differ by {worst:.2g} of the largest")
    return Result(name, "identical", ", ".join(f"{calls[c]} {c}" for c in sorted(calls)))


def try_all(names: list[str]) -> Iterator[Result]:
    signal.signal(signal.SIGALRM, _timeout)
    for name in names:
        signal.alarm(SECONDS)
        try:
            yield try_model(name)
        except TimeoutError as error:
            yield Result(name, "error", str(error))
        finally:
            signal.alarm(0)


def table(results: list[Result]) -> str:
    """The page."""
    count = Counter(result.outcome for result in results)
    lines = [
        "# Compatibility",
        "",
        f"Made by `python tools/compatibility.py --write docs/compatibility.md` with transformers "
        f"{transformers.__version__}: every causal language model of `AutoModelForCausalLM`, built "
        "small with random weights. A prompt and steps over its cache, with a budget that covers "
        "the context, have to give the dense model's logits.",
        "",
        ", ".join(f"{number} {outcome}" for outcome, number in count.most_common()) + ".",
        "",
        "| model type | outcome | |",
        "| --- | --- | --- |",
    ]
    for result in results:
        detail = "" if result.outcome == "identical" else result.detail.replace("|", "\\|")
        lines.append(f"| {result.name} | {result.outcome} | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    results = []
    for result in try_all(arguments.only or sorted(NAMES)):
        print(f"{result.name:32} {result.outcome:12} {result.detail}", flush=True)
        results.append(result)
    if arguments.write:
        arguments.write.write_text(table(results), encoding="utf-8")
    wrong = [result for result in results if result.outcome in ("WRONG", "error")]
    print(Counter(result.outcome for result in results))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
