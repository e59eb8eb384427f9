"""``apt-trainer chat``: a conversation with a finished language model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apt_trainer.cli.analyze import DTYPES
from apt_trainer.cli.benchmark import positive
from apt_trainer.errors import UserError

HELP = "Talk to a finished language model, pruned or not. An empty line or Ctrl-D ends the conversation."
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a saved model, hub name or GGUF file")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this, and end")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--max_new_tokens", type=positive, default=512, metavar="N", help="longest answer in tokens (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (default); more draws tokens, 0.7 for example",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: as saved)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda … (default: the accelerator if there is one)")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.evaluate.generation import Conversation, load_generator
    from apt_trainer.settings import ModelSettings

    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"temperature={args.temperature} must be a number from 0.")
    settings = ModelSettings(args.path, dtype=args.dtype)
    generator = load_generator(settings, args.max_new_tokens, args.temperature, args.device)
    conversation = Conversation(generator, args.system)
    if args.prompt is not None:
        conversation.answer(args.prompt)
        return 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            return 0
        conversation.answer(text)
