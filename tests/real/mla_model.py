"""Writes a small random DeepSeek-shaped model (MLA attention): python mla_model.py TOKENIZER_DIR OUT_DIR

vLLM on CPU loads it without an error, and answers wrongly as soon as it attends to KV that it did not compute.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM


def main() -> None:
    tokenizer, out = Path(sys.argv[1]), Path(sys.argv[2])
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    torch.manual_seed(7)
    config = DeepseekV2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        # What vLLM's MLA kernels take: a latent of 512 and 64 rotary dimensions.
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        # No experts: every layer is dense.
        first_k_dense_replace=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, out / name)


if __name__ == "__main__":
    main()
