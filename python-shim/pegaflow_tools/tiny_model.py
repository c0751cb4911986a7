"""Writes the model `builtin:tiny`: a small random Qwen3 with tokenizer and chat template.

    python tiny_model.py OUT_DIR

The same bytes on every run, without network. Needs torch, safetensors and tokenizers, which every
vLLM brings; transformers is not imported, so its version cannot change the result.

The weights are random but not careless: the spread (0.1) and the untied output matrix make greedy
output varied and sensitive to every prompt token, so wrong KV shows. Special tokens have a zero row
in the output matrix: the model practically never ends a reply by itself.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20240607
SPREAD = 0.1
VOCAB = 2048
SPECIAL = ["<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
PAD, END = 0, 1

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": END,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": SPREAD,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "model_type": "qwen3",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ENGLISH = """
The quick brown fox jumps over the lazy dog. What is the capital of France, and why do people ask
about it so often? A language model reads a prompt, keeps what it has computed about every token, and
then writes one token after another. The first part is called prefill, the second part decode. They
want different things from the machine: prefill wants to compute, decode wants to move memory. Please
write a short story about a small engine that carried water up the hill. Once upon a time there was an
old miller who had three sons. How does a computer work? Explain it to me like I am five years old. Hello,
world! Good morning; good evening; thank you very much. You are a helpful assistant. Count from one
to ten: one, two, three, four, five, six, seven, eight, nine, ten. In the beginning there was nothing
but a long list of numbers 0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 100 1000. def main(): return True
if not None else False. import sys; print("hello"). The answer is not what you would expect, but it is
what I can give. Some people say that this should have been their work, and that they would have done
it better than we did, because there is always something which could be made more simple.
"""


def corpus():
    """English words first, then made-up words from a fixed generator, enough for every merge."""
    yield from [ENGLISH] * 50
    onsets = "b c d f g h l m n p r s t v w br ch dr fl gr pl sh st th tr".split()
    vowels = "a e i o u ai ea ee oo ou".split()
    codas = ["", "l", "n", "r", "s", "t", "ck", "ng", "nd", "st"]
    state = SEED

    def pick(items):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return items[(state >> 33) % len(items)]

    def syllable():
        return pick(onsets) + pick(vowels) + pick(codas)

    for _ in range(400):
        yield " ".join(syllable() + pick(["", syllable()]) for _ in range(20))


def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(corpus(), trainer)
    if made.get_vocab_size() != VOCAB:
        raise SystemExit(f"the tokenizer has {made.get_vocab_size()} tokens instead of {VOCAB}")
    return made


def weights():
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float32)
        return (values * SPREAD).to(torch.bfloat16)

    def ones(size):
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, inner, head = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (CONFIG[k] * head for k in ("num_attention_heads", "num_key_value_heads"))
    tensors = {"model.embed_tokens.weight": random(VOCAB, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": random(queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": random(keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": random(keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": random(hidden, queries),
            f"{prefix}.self_attn.q_norm.weight": ones(head),
            f"{prefix}.self_attn.k_norm.weight": ones(head),
            f"{prefix}.post_attention_layernorm.weight": ones(hidden),
            f"{prefix}.mlp.gate_proj.weight": random(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": random(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": random(hidden, inner),
        }
    tensors["model.norm.weight"] = ones(hidden)
    output = random(VOCAB, hidden)
    output[: len(SPECIAL)] = 0
    tensors["lm_head.weight"] = output
    return tensors


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", {"eos_token_id": END, "pad_token_id": PAD})
    write_json(
        out / "tokenizer_config.json",
        {
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[END],
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": SPECIAL[PAD],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer().save(str(out / "tokenizer.json"))
    save_file(weights(), out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
