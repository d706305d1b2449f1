"""The `gencnn` command: one subcommand per job, each living in its own module."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from .config_file import ConfigParser

STDOUT = 1
COMMANDS = {
    'visualize': ('visualize', 'draw images for nodes of a network'),
    'gallery': ('gallery', 'draw many nodes into one HTML page'),
    'nodes': ('node_lists', 'list the layers of a network'),
    'train': ('train', 'train or pre-train a network'),
    'validate': ('validate', 'measure a network on a data set'),
    'push': ('hub', 'publish a network to the Hugging Face Hub'),
    'list': ('listing', 'list the pretrained generative checkpoints'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gencnn COMMAND ...`.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        Exit status: 0, 2 for bad input or a node that fails (one line on stderr, no traceback), 130 after Ctrl-C, 141
        where nobody reads the output any more, as a shell has it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog='gencnn',
        description='Generative modelling of convolutional networks (Dai, Lu, Wu, ICLR 2015) for any timm model.',
    )
    parser.add_argument('--version', action='store_true', help='print the version')
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', parser_class=ConfigParser)
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    module = None
    known: list[str] = []
    epilog = ''
    for name, (room, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + '.')
        if name == chosen:  # only the chosen command's module is imported
            module = importlib.import_module(f'timm_gencnn.{room}')
            module.add_arguments(sub)
            known, epilog = list(sub._option_string_actions), sub.epilog or ''
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = get_close_matches(unknown[0].split('=')[0], known, n=1)
        parser.error(f'unknown argument {unknown[0]!r}' + (f', perhaps {near[0]}. ' if near else '. ') + epilog)
    if args.version:
        from . import __version__

        print(f'timm_gencnn {__version__}')
        return 0
    if module is None:
        parser.print_help()
        return 2
    try:
        module.main(args)
        sys.stdout.flush()
    except (ValueError, OSError) as e:
        if isinstance(e, BrokenPipeError) and not _is_read(STDOUT):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # else the exit would write once more
            return 141
        print(f'gencnn {chosen}: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'gencnn {chosen}: interrupted', file=sys.stderr)
        return 130
    return 0


def _is_read(pipe: int) -> bool:
    """Whether anybody can still read what is written there: other pipes, to workers and servers, break too."""
    if not hasattr(select, 'poll'):  # Windows
        return True
    watch = select.poll()
    watch.register(pipe, 0)
    return not any(event & select.POLLERR for _, event in watch.poll(0))


if __name__ == '__main__':
    sys.exit(main())
