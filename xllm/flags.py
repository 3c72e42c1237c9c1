"""From a command line to the config of a role, or to the reason why not.

The language is that of gflags, as the users of xLLM know it: `--flag=value`, `--flag value`,
`--bool`, `--nobool`, `--bool=true|false`, `--flagfile=FILE`; absl-py parses it, with flag values
of its own for each call, so nothing is global. Which flags there are is in `flag_table.py`.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from absl import flags as absl_flags

from xllm import __version__
from xllm.config import (
    ApiConfig,
    EngineConfig,
    EtcdConfig,
    HostConfig,
    IndexConfig,
    LogConfig,
    MasterConfig,
    RoutingConfig,
    SecurityConfig,
    TraceConfig,
    WorkerConfig,
)
from xllm.errors import ConfigError
from xllm.flag_table import (
    BOTH_CONCERNS,
    MASTER_CONCERNS,
    ROLES,
    WORKER_CONCERNS,
    Flag,
    role_flags,
)
from xllm.flag_types import SIZE
from xllm.security.flag_checks import check_security


@dataclass(frozen=True, slots=True)
class Answer:
    """The text that `--help` or `--version` asked for."""

    text: str


def parse_command_line(argv: Sequence[str]) -> MasterConfig | WorkerConfig | Answer:
    """The config that `argv`, without the program's name, asks for.

    Raises: ConfigError naming the flag, and what to write instead.
    """
    every_flag = {flag.name: flag for role in ROLES for flag in role_flags(role)}
    asked = _present_values(every_flag, argv)
    role = asked.get("role")
    for name, answer in (("version", f"xllm {__version__}"), ("help", help_text(role))):
        if name in asked and _parse_value(every_flag[name], asked[name]):
            return Answer(answer)
    if role not in ROLES:
        given = f"--role={role}" if role is not None else "--role is missing"
        raise ConfigError(f"{given}: must be --role=master or --role=worker; see xllm --help")

    flags = {flag.name: flag for flag in role_flags(role)}
    texts = _present_values(flags, argv, role=role)
    values = {name: _parse_value(flags[name], value) for name, value in texts.items()}

    def build(config: type[Any], **parts: object) -> Any:
        own = {name: value for name, value in values.items() if flags[name].config is config}
        return config(**own, **parts)

    shared = {
        "etcd": build(EtcdConfig),
        "net": build(HostConfig),
        "log": build(LogConfig),
        "trace": build(TraceConfig),
        "api": build(ApiConfig),
        "security": build(SecurityConfig),
    }
    if role == "master":
        master: MasterConfig = build(
            MasterConfig, **shared, routing=build(RoutingConfig), index=build(IndexConfig)
        )
        check_security(master)
        return master
    worker: WorkerConfig = build(WorkerConfig, **shared, engine=build(EngineConfig))
    _check_worker(worker)
    check_security(worker)
    return worker


def _check_worker(config: WorkerConfig) -> None:
    if config.enable_disagg_pd:
        raise ConfigError("--enable_disagg_pd=true: not supported yet; leave it false")
    engine = config.engine
    _check_tiers(engine)
    if engine.max_tokens_per_batch < engine.max_seqs_per_batch:
        raise ConfigError(
            f"--max_tokens_per_batch={engine.max_tokens_per_batch}: must be at least"
            f" --max_seqs_per_batch={engine.max_seqs_per_batch}, one token for each sequence"
        )
    if engine.max_tokens_per_chunk_for_prefill > engine.max_tokens_per_batch:
        raise ConfigError(
            "--max_tokens_per_chunk_for_prefill="
            f"{engine.max_tokens_per_chunk_for_prefill}: must be at most"
            f" --max_tokens_per_batch={engine.max_tokens_per_batch}"
        )


def _check_tiers(engine: EngineConfig) -> None:
    if engine.disk_cache_dir is not None and engine.disk_cache_size == 0:
        raise ConfigError(
            f"--disk_cache_dir={engine.disk_cache_dir}: say with --disk_cache_size how much of the"
            " disk it may take, such as 20GiB"
        )
    if engine.disk_cache_size and engine.disk_cache_dir is None:
        raise ConfigError(
            f"--disk_cache_size={engine.disk_cache_size}: say with --disk_cache_dir where"
        )
    if engine.host_blocks_factor and engine.host_cache_size:
        raise ConfigError(
            f"--host_blocks_factor={engine.host_blocks_factor:g} and"
            f" --host_cache_size={engine.host_cache_size} are two sizes of one tier; give one"
        )
    asks_for_tiers = engine.host_blocks_factor or engine.host_cache_size or engine.disk_cache_size
    if asks_for_tiers and not engine.enable_prefix_cache:
        raise ConfigError(
            "--enable_prefix_cache=false: host and disk keep the blocks of the prefix cache; leave"
            " it on, or the flags of host and disk out"
        )


def _parse_value(flag: Flag, value: str) -> object:
    try:
        return flag.type.parse(value)
    except ValueError as error:
        raise ConfigError(f"--{flag.name}={value}: {error}") from error


def _present_values(
    flags: Mapping[str, Flag], argv: Sequence[str], *, role: str | None = None
) -> dict[str, str]:
    """The text of each of `flags` that `argv` or a flag file has, the last one if repeated.

    Without a role, whatever is not among `flags` is passed over: the role is not known yet.
    """
    absl_values = absl_flags.FlagValues()  # type: ignore[no-untyped-call]
    absl_values.set_gnu_getopt(True)
    texts: dict[str, str] = {}
    for flag in flags.values():
        absl_flags.DEFINE_flag(_TextFlag(flag, texts), absl_values)
    try:
        rest = absl_values(["xllm", *argv], known_only=role is None)
    except absl_flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown_flag(error.flagname, role)) from error
    except absl_flags.CantOpenFlagFileError as error:
        raise ConfigError(f"--flagfile: {str(error).removeprefix('ERROR:: ')}") from error
    except (absl_flags.Error, ValueError) as error:
        raise ConfigError(f"{error}; see xllm --help") from error
    if role is not None and len(rest) > 1:
        raise ConfigError(
            f"unexpected argument {rest[1]!r}; flags are --flag=value or --flag value, booleans"
            " --flag, --noflag or --flag=true|false"
        )
    return texts


class _TextFlag(absl_flags.Flag[str]):
    """Puts its text into `texts` unparsed: our own types say better what is wrong than absl's."""

    def __init__(self, flag: Flag, texts: dict[str, str]) -> None:
        super().__init__(
            parser=absl_flags.ArgumentParser(),
            serializer=None,
            name=flag.name,
            default=None,
            help_string=flag.help,
            short_name="h" if flag.name == "help" else None,
            boolean=flag.type.is_boolean,
        )
        self._texts = texts

    def parse(self, argument: str) -> None:
        self._texts[self.name] = argument


def _unknown_flag(name: str, role: str | None) -> str:
    other = {"master": "worker", "worker": "master"}[role or "master"]
    own_names = [flag.name for flag in role_flags(role or "master")]
    nearest = difflib.get_close_matches(name, own_names, n=1, cutoff=0.5)
    message = f"--{name}: no such flag"
    if any(name in (flag.name, f"no{flag.name}") for flag in role_flags(other)):
        message = f"--{name}: a flag of --role={other}, not of --role={role}"
    if nearest:
        return f"{message}; did you mean --{nearest[0]}?"
    return f"{message}; see xllm --role={role} --help"


def help_text(role: str | None = None) -> str:
    """Each flag with its unit, meaning and default, grouped by concern."""
    sections = [("Both roles", BOTH_CONCERNS)]
    if role != "worker":
        sections.append(("--role=master", MASTER_CONCERNS))
    if role != "master":
        sections.append(("--role=worker", WORKER_CONCERNS))
    lines = [
        f"xllm {__version__}: serves LLMs from a cluster whose KV cache is one",
        "",
        "usage: xllm --role=master|worker [--flag=value ...]",
        "       xllm top|cluster|cache|drain ...    for operators: see xllm cluster --help",
    ]
    for heading, concerns in sections:
        lines += ["", heading]
        for concern in concerns:
            lines += ["", f"  {concern.title}"]
            for flag in concern.flags:
                lines += _flag_help(flag)
    return "\n".join(lines)


def _flag_help(flag: Flag) -> list[str]:
    spelling = f"--[no]{flag.name}" if flag.type.is_boolean else f"--{flag.name}={flag.type.shape}"
    text = f"{flag.help} Default: {default_text(flag)}."
    indent = " " * 8
    lines = textwrap.wrap(
        text, 92, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return [f"    {spelling}", *lines]


def default_text(flag: Flag) -> str:
    """The default as people write it."""
    if flag.default is not None:
        return flag.default
    if flag.config is None:
        return "false"
    (default,) = (field.default for field in fields(flag.config) if field.name == flag.name)
    if isinstance(default, bool):
        return str(default).lower()
    if flag.type is SIZE and isinstance(default, int) and default and default % (1 << 20) == 0:
        return f"{default >> 20}MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)
