"""Print the digest of a base model's weights, which `lora.base_digest` names in a job file."""

import argparse
from pathlib import Path

from crossfl.storage.weight_files import weights_digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl digest`."""
    parser.add_argument("model", type=Path, help="Hugging Face model directory")


def main(args: argparse.Namespace) -> None:
    """Print it."""
    print(weights_digest(args.model))
