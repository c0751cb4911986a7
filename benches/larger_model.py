"""Writes a larger random model than `builtin:tiny`, so that computing outweighs what a token costs besides.

    PYTHONPATH=python-shim INTERPRETER benches/larger_model.py OUT_DIR --layers 8 --hidden 512

INTERPRETER is the one that `pegaflow prepare configs/1p1d-cpu.toml` prints. Then `--set model=OUT_DIR`.
"""

import argparse
import sys

from pegaflow_tools import tiny_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of prompt and answer together")
    args = parser.parse_args()
    tiny_model.CONFIG |= {
        "hidden_size": args.hidden,
        "intermediate_size": 2 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 32,
        "num_key_value_heads": args.hidden // 128,
        "max_position_embeddings": args.longest,
    }
    # As it is called by itself.
    sys.argv = ["tiny_model.py", args.out]
    tiny_model.main()


if __name__ == "__main__":
    main()
