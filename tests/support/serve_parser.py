"""The parser of ``vllm serve`` with our flags in it."""

from functools import cache

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from triattention_vllm.plugin import register


@cache
def serve_parser() -> FlexibleArgumentParser:
    """As vLLM's own main builds it, of one subcommand; made once."""
    register()
    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser
