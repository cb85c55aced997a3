"""A small random Llama and a tokenizer of one token a character, as a folder of Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import torch

_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # 96, then the token that begins a text
VOCABULARY = len(_CHARACTERS) + 1
BEGIN = VOCABULARY - 1


def make_model(layers: int = 2, head_dim: int = 16):
    """Weights large enough that attention matters to the logits."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        initializer_range=0.3,
        attn_implementation="sdpa",
        bos_token_id=BEGIN,
        eos_token_id=BEGIN,
    )
    return transformers.LlamaForCausalLM(config).eval()


def make_tokenizer():
    """Puts one special token before a text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: number for number, character in enumerate(_CHARACTERS)}
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({**vocabulary, "<s>": BEGIN}, unk_token="?")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def make_text(lines: int, seed: int = 0) -> str:
    """Random lines of 8 to 20 characters."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(lines):
        length = int(torch.randint(8, 21, (1,), generator=generator))
        codes = torch.randint(33, 127, (length,), generator=generator).tolist()
        made.append("".join(map(chr, codes)) + "\n")
    return "".join(made)


def save(folder: Path, documents: list[str]) -> tuple[Path, Path]:
    """Writes the model's folder and the text; returns both paths."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("\0".join(documents), encoding="utf-8")
    return folder / "model", text
