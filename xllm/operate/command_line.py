"""`xllm top|cluster|cache|drain`: arguments to calls of an operator port, answers to text.

0   it was done, by all workers that were meant
1   it was not done, or not by all, or nobody answers
2   what was asked for cannot be: one line on stderr says why
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from xllm.errors import ConfigError
from xllm.operate.operator_client import NoAnswer, OperatorClient
from xllm.operate.tables import answers_view, cluster_view
from xllm.operate.top import run_top

DEFAULT_OPERATOR = "http://127.0.0.1:8889"
AFTER_DEADLINE_S = 10.0
"""A master answers a moment after the deadline that it was given."""

_MOVE_DEADLINE_S = 30.0
_DEADLINE_S = 5.0

_PIPE_WIDTH = 200

_OK, _NOT_DONE, _CANNOT_BE = 0, 1, 2


def run_command(argv: Sequence[str], console: Console | None = None) -> int:
    """Runs what `argv`, without the program's name, asks for; the exit code."""
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    # Whoever reads a pipe has no use for lines that were broken up.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = console or Console(highlight=False, width=width)
    try:
        client = OperatorClient(
            arguments.operator, arguments.operator_key_file, arguments.operator_ca
        )
        code: int = arguments.run(arguments, client, console)
        return code
    except (ConfigError, NoAnswer) as error:
        print(f"xllm: {' '.join(str(error).split())}", file=sys.stderr)
        return _CANNOT_BE if isinstance(error, ConfigError) else _NOT_DONE
    except KeyboardInterrupt:
        return _OK
    except BrokenPipeError:
        return _NOT_DONE


def _top(arguments: argparse.Namespace, client: OperatorClient, console: Console) -> int:
    if arguments.json or not console.is_terminal:
        return _cluster(arguments, client, console)
    run_top(client, console, arguments.interval)
    return _OK


def _cluster(arguments: argparse.Namespace, client: OperatorClient, console: Console) -> int:
    cluster = client.get("/admin/cluster")
    if arguments.json:
        _print_json(cluster)
    else:
        console.print(cluster_view(cluster, width=console.width))
    return _OK


def _command(path: str) -> Callable[[argparse.Namespace, OperatorClient, Console], int]:
    """Sends the arguments that the port knows under the same names."""

    def run(arguments: argparse.Namespace, client: OperatorClient, console: Console) -> int:
        body = {
            name: value
            for name in arguments.fields
            if (value := getattr(arguments, name)) is not None and value != []
        }
        if hasattr(arguments, "text"):
            body |= _prompt(arguments)
        answer = client.post(path, body, arguments.deadline + AFTER_DEADLINE_S)
        if arguments.json:
            _print_json(answer)
        else:
            console.print(answers_view(answer))
        return _OK if answer.get("complete") else _NOT_DONE

    return run


def _prompt(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises: ConfigError."""
    given = [arguments.text, arguments.file, arguments.token_ids]
    if sum(value is not None for value in given) != 1:
        raise ConfigError("give the prompt as TEXT, --file or --token_ids")
    if arguments.token_ids is not None:
        try:
            return {"token_ids": [int(token) for token in arguments.token_ids.split(",")]}
        except ValueError as error:
            raise ConfigError("--token_ids: expected numbers with commas between them") from error
    text = arguments.text
    if arguments.file is not None:
        try:
            is_stdin = arguments.file == "-"
            text = sys.stdin.read() if is_stdin else Path(arguments.file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file={arguments.file}: {error}") from error
    if not arguments.chat:
        return {"text": text}
    messages = [{"role": "user", "content": text}]
    with contextlib.suppress(ValueError):
        parsed = json.loads(text)
        if isinstance(parsed, list):
            messages = parsed
    return {"messages": messages}


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def make_parser() -> argparse.ArgumentParser:
    """Of `xllm top` and the other commands."""
    parser = argparse.ArgumentParser(
        prog="xllm", description="For operators of a cluster, by any master's operator port."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = _common()

    top = commands.add_parser("top", parents=[common], help="the cluster, again and again")
    top.add_argument("--interval", type=_seconds, default=1.0, help="seconds between two looks")
    top.set_defaults(run=_top)
    cluster = commands.add_parser("cluster", parents=[common], help="the cluster, once")
    cluster.set_defaults(run=_cluster)

    cache = commands.add_parser("cache", help="what workers have cached")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    _add_cache_actions(actions, common)

    drain = commands.add_parser("drain", parents=[common], help="have workers end, in order")
    drain.add_argument("workers", nargs="+", metavar="WORKER", help="their ids")
    drain.add_argument("--timeout", type=_seconds, help="seconds that running requests get")
    _add_deadline(drain, _DEADLINE_S)
    drain.set_defaults(run=_command("/admin/drain"), fields=("workers", "timeout", "deadline"))
    return parser


def _add_cache_actions(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    prompt = _prompt_arguments()
    shared = ("model", "cache_salt", "api_key_name", "workers", "deadline")
    for name, described, fields in (
        ("lookup", "who holds how much of a prompt", shared),
        ("pin", "keep a prompt for a time", (*shared, "ttl")),
        ("unpin", "keep it no longer", shared),
        ("move", "have one worker fetch a prompt from another", (*shared, "to", "source")),
    ):
        action = actions.add_parser(name, parents=[common, prompt], help=described)
        action.set_defaults(run=_command(f"/admin/cache/{name}"), fields=fields)
        is_move = name == "move"
        _add_deadline(action, _MOVE_DEADLINE_S if is_move else _DEADLINE_S)
        if is_move:
            action.add_argument("--to", required=True, metavar="WORKER", help="who gets it")
            action.add_argument("--source", metavar="WORKER", help="who has it")
            action.set_defaults(workers=None)
        else:
            _add_workers(action)
        if name == "pin":
            action.add_argument("--ttl", type=_seconds, default=3600.0, help="seconds")
    clear = actions.add_parser("clear", parents=[common], help="drop a tier, or all")
    clear.add_argument(
        "--tier", choices=("device", "host", "disk", "remote"), help="which; else all"
    )
    _add_workers(clear)
    _add_deadline(clear, _DEADLINE_S)
    clear.set_defaults(run=_command("/admin/cache/clear"), fields=("tier", "workers", "deadline"))


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--operator", default=DEFAULT_OPERATOR, metavar="URL", help="of a master")
    common.add_argument("--operator_key_file", metavar="FILE", help="what it wants as its key")
    common.add_argument("--operator_ca", metavar="FILE", help="who signs its certificate")
    common.add_argument("--json", action="store_true", help="the answer as it came")
    return common


def _prompt_arguments() -> argparse.ArgumentParser:
    prompt = argparse.ArgumentParser(add_help=False)
    prompt.add_argument("text", nargs="?", metavar="TEXT", help="the prompt")
    prompt.add_argument("--file", metavar="FILE", help="that has it; - for stdin")
    prompt.add_argument("--token_ids", metavar="N,N,…", help="the prompt, as tokens")
    prompt.add_argument("--chat", action="store_true", help="it is a user's message, or messages")
    prompt.add_argument("--model", help="where several are served")
    prompt.add_argument("--cache_salt", help="the request's")
    prompt.add_argument("--api_key_name", help="whose request is meant")
    return prompt


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--worker", "-w"), dest="workers", action="append", metavar="WORKER", help="only this one"
    )


def _add_deadline(parser: argparse.ArgumentParser, default_s: float) -> None:
    parser.add_argument(
        *("--deadline",), type=_seconds, default=default_s, help="seconds to wait for workers"
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value
