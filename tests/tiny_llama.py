"""The one small decoder of the tests: two blocks, four heads over two key heads."""

from __future__ import annotations

from typing import Any

SIZES = {
    "hidden_size": 64,  # 4-bit layers are read in blocks of 64
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def fields(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Fields of a LlamaConfig (or one alike) for this tokenizer."""
    return {
        **SIZES,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **changes,
    }
