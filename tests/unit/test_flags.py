from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from xllm import __version__
from xllm.config import (
    TOOL_CALL_PARSERS,
    ApiConfig,
    EngineConfig,
    EtcdConfig,
    HostConfig,
    IndexConfig,
    LogConfig,
    MasterConfig,
    RoutingConfig,
    SecurityConfig,
    StoreConfig,
    TraceConfig,
    WorkerConfig,
)
from xllm.errors import ConfigError
from xllm.flag_table import ROLES, role_flags
from xllm.flags import Answer, parse_command_line
from xllm.roles.api.reading.notations import NOTATIONS

BOTH = (EtcdConfig, HostConfig, LogConfig, TraceConfig, ApiConfig, SecurityConfig)


def _worker(*argv: str) -> WorkerConfig:
    config = parse_command_line(["--role=worker", *argv])
    assert isinstance(config, WorkerConfig)
    return config


def _master(*argv: str) -> MasterConfig:
    config = parse_command_line(["--role=master", *argv])
    assert isinstance(config, MasterConfig)
    return config


def _refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_flags_the_config_has_its_own_defaults() -> None:
    assert _worker() == WorkerConfig()
    assert _master() == MasterConfig()


@pytest.mark.parametrize(
    ("role", "configs"),
    [
        ("master", [MasterConfig, RoutingConfig, IndexConfig, *BOTH]),
        ("worker", [WorkerConfig, EngineConfig, StoreConfig, *BOTH]),
    ],
)
def test_every_field_of_a_config_has_its_flag(role: str, configs: list[type]) -> None:
    parts = {
        "etcd",
        "net",
        "log",
        "api",
        "engine",
        "routing",
        "index",
        "security",
        "store",
        "trace",
    }
    wanted = {
        (config, field.name)
        for config in configs
        for field in fields(config)
        if field.name not in parts
    }
    offered = {(flag.config, flag.name) for flag in role_flags(role) if flag.config is not None}
    assert offered == wanted


@pytest.mark.parametrize("role", ROLES)
def test_names_of_a_role_are_unique(role: str) -> None:
    names = [flag.name for flag in role_flags(role)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--enable_prefix_cache"], True),
        (["--noenable_prefix_cache"], False),
        (["--enable_prefix_cache=false"], False),
        (["--enable_prefix_cache=True"], True),
        (["--enable_prefix_cache", "--noenable_prefix_cache"], False),
    ],
)
def test_spellings_of_a_boolean(argv: list[str], expected: bool) -> None:
    assert _worker(*argv).engine.enable_prefix_cache is expected


def test_value_after_equals_sign_or_space() -> None:
    assert _worker("--port=7").port == _worker("--port", "7").port == 7
    assert parse_command_line(["--port", "7", "--role", "worker"]) == _worker("--port=7")


def test_flags_of_upstreams_page() -> None:
    config = _worker(
        *("--etcd_addr=127.0.0.1:10998", "--enable_service_routing=true"),
        *("--enable_cache_upload=true", "--enable_disagg_pd=false"),
    )
    assert config == WorkerConfig(
        etcd=EtcdConfig(etcd_addr="127.0.0.1:10998"), enable_cache_upload=True
    )
    assert _master(
        "--etcd_addr=127.0.0.1:10998", "--http_server_port", "28888", "--rpc_server_port", "28889"
    ) == MasterConfig(
        etcd=EtcdConfig(etcd_addr="127.0.0.1:10998"), http_server_port=28888, rpc_server_port=28889
    )


def test_flag_file(tmp_path: Path) -> None:
    flag_file = tmp_path / "worker.flags"
    flag_file.write_text("# a comment\n--role=worker\n--port=7\n\n--noenable_prefix_cache\n")

    config = parse_command_line([f"--flagfile={flag_file}", "--port=8"])

    assert isinstance(config, WorkerConfig)
    assert config.port == 8
    assert config.engine.enable_prefix_cache is False


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("123", 123),
        ("512M", 512 << 20),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("1.5k", 1536),
        ("1.5GB", 1_500_000_000),
        ("2T", 2 << 40),
        ("100B", 100),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert _worker(f"--max_cache_size={text}").engine.max_cache_size == size_bytes


@pytest.mark.parametrize(
    "argv",
    [
        "--max_cache_size=4Gbit",
        "--max_cache_size=-1",
        "--max_cache_size=",
        "--port=65536",
        "--port=1.5",
        "--port=\u0661",
        "--lease_ttl=0",
        "--lease_ttl=nan",
        "--lease_ttl=5s",
        "--dtype=float16",
        "--device=cuda:x",
        "--enable_prefix_cache=maybe",
        "--etcd_addr=localhost",
        "--etcd_addr=localhost:99999",
        "--etcd_addr=a:1,",
        "--etcd_addr=ftp://a:1",
        "--etcd_addr=http://a:1/path",
        "--etcd_namespace=a/b",
        "--worker_id=a/b",
        "--model_id=",
        "--model=",
        "--host=a:1",
        "--advertise_host=0.0.0.0",
        "--advertise_host=::",
        "--log_format=xml",
        "--block_size=0",
        "--max_seqs_per_batch=0",
        "--max_memory_utilization=1.1",
    ],
)
def test_a_bad_value_is_refused_with_its_flag(argv: str) -> None:
    assert _refusal("--role=worker", argv).startswith(f"{argv}: ")


@pytest.mark.parametrize(
    "address",
    [
        "a:1",
        "a:1,b:2",
        "http://a:1",
        "https://a.b:2379,https://c:2379",
        "[::1]:2379",
        "http://[::1]:1",
    ],
)
def test_etcd_addresses(address: str) -> None:
    assert _worker(f"--etcd_addr={address}").etcd.etcd_addr == address


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--role=worker", "--prot=1"], ["--prot", "no such flag", "--port"]),
        (["--role=worker", "--prot", "1"], ["--prot", "no such flag", "--port"]),
        (["--role=worker", "--noenable_prefx_cache"], ["--enable_prefix_cache"]),
        (["--role=worker", "--zzz"], ["--zzz", "xllm --role=worker --help"]),
        (
            ["--role=worker", "--http_server_port=1"],
            ["--http_server_port", "a flag of --role=master", "--rpc_server_port"],
        ),
        (["--role=master", "--noenable_prefix_cache"], ["a flag of --role=worker"]),
        (["--role=master", "--model=x"], ["--model", "a flag of --role=worker"]),
        (["--role=worker", "--enable_prefix_cache", "false"], ["'false'", "--flag=true|false"]),
        (["--role=worker", "--port"], ["--port"]),
        (["--role=worker", "--flagfile=/does/not/exist"], ["--flagfile", "/does/not/exist"]),
        (["--role=worker", "--enable_disagg_pd=true"], ["--enable_disagg_pd", "not supported yet"]),
        (["--role=worker", "--max_tokens_per_batch=8"], ["8", "--max_seqs_per_batch=64"]),
        (
            ["--role=worker", "--max_tokens_per_chunk_for_prefill=4096"],
            ["4096", "--max_tokens_per_batch=2048"],
        ),
        (["--role=master", "--otlp_endpoint=collector:4318"], ["collector:4318", "http://host"]),
        (["--role=master", "--tokenizer_path=/does/not/exist"], ["tokenizer.json"]),
        (["--role=router"], ["--role=router", "--role=master", "--role=worker"]),
        (["--port=1"], ["--role is missing"]),
        ([], ["--role is missing", "--help"]),
    ],
)
def test_a_refusal_says_what_to_change(argv: list[str], parts: list[str]) -> None:
    message = _refusal(*argv)
    for part in parts:
        assert part in message


def test_tokenizer_path(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert _master(f"--tokenizer_path={tmp_path}").tokenizer_path == str(tmp_path)


def test_version() -> None:
    assert parse_command_line(["--version"]) == Answer(f"xllm {__version__}")


def test_help_shows_each_flag_with_its_default() -> None:
    answer = parse_command_line(["--help"])
    assert isinstance(answer, Answer)
    for role in ROLES:
        for flag in role_flags(role):
            assert f"{flag.name}=" in answer.text or f"--[no]{flag.name}" in answer.text
    assert "Default: 16MiB." in answer.text
    assert "--lease_ttl=SECONDS" in answer.text
    assert max(map(len, answer.text.splitlines())) <= 100


def test_help_of_one_role_leaves_out_the_other() -> None:
    answer = parse_command_line(["--role=master", "-h"])
    assert isinstance(answer, Answer)
    assert "--http_server_port=PORT" in answer.text
    assert "--model=" not in answer.text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--disk_cache_dir=/tmp/x"], "--disk_cache_size"),
        (["--disk_cache_size=1GiB"], "--disk_cache_dir"),
        (["--host_cache_size=1GiB", "--host_blocks_factor=2"], "two sizes"),
        (["--host_cache_size=1GiB", "--noenable_prefix_cache"], "--enable_prefix_cache"),
        (["--eviction_policy=s3fifo"], "lru"),
        (["--disk_write_policy=never"], "write_through_selective"),
        (["--prefetch_timeout=-1"], "--prefetch_timeout"),
    ],
)
def test_tiers_that_cannot_be_are_refused(argv: list[str], said: str) -> None:
    assert said in _refusal("--role=worker", *argv)


def test_the_folder_of_the_disk_tier_may_be_in_the_home_directory() -> None:
    worker = _worker("--disk_cache_dir=~/blocks", "--disk_cache_size=1GiB")
    assert worker.engine.disk_cache_dir == str(Path.home() / "blocks")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--max_body_size=" + "9" * 400, "more than any machine"),
        ("--max_body_size=9999999T", "more than any machine"),
        ("--max_concurrent_requests=" + "9" * 5000, "--max_concurrent_requests"),
        ("--tokenizer_path=~nobody_at_all/x", "no such user"),
        ("--tokenizer_path=" + "x" * 5000, "cannot be read"),
        ("--etcd_addr=http://[", "--etcd_addr"),
    ],
)
def test_values_of_a_slipped_finger_are_refused(argv: str, said: str) -> None:
    assert said in _refusal("--role=master", argv)


def test_how_answers_are_read() -> None:
    assert tuple(NOTATIONS) == TOOL_CALL_PARSERS
    flags = ("--tool_call_parser=llama3_json", "--reasoning_parser=deepseek-r1")
    api = _master(*flags, "--cors_allow_origins=https://a.example,http://b:3000").api
    assert (api.tool_call_parser, api.reasoning_parser) == ("llama3_json", "deepseek-r1")
    assert api.cors_allow_origins == "https://a.example,http://b:3000"
    assert _master("--cors_allow_origins=*").api.cors_allow_origins == "*"
    for value in ("a.example", "https://a.example/x", "https://a,,", ""):
        assert "--cors_allow_origins" in _refusal("--role=master", f"--cors_allow_origins={value}")
    assert "hermes" in _refusal("--role=master", "--tool_call_parser=xml")


def test_a_folder_of_nobody_is_refused() -> None:
    argv = ("--disk_cache_dir=~nobody_at_all/x", "--disk_cache_size=1G")
    assert "no such user" in _refusal("--role=worker", *argv)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--operator_host=0.0.0.0"], ["--operator_host=0.0.0.0", "--operator_key_file"]),
        (["--tls_cert=c"], ["--tls_cert and --tls_key"]),
        (["--tls_key=k"], ["--tls_cert and --tls_key"]),
        (["--tls_cert=c", "--tls_key=k"], ["--tls_cert", "--tls_ca"]),
        (["--tls_ca=a"], ["--tls_ca", "--tls_cert and --tls_key"]),
        (["--etcd_ca=a"], ["--etcd_ca", "--etcd_addr"]),
        (["--etcd_user=u"], ["--etcd_user", "--etcd_addr"]),
        (["--etcd_cert=a", "--etcd_addr=h:1"], ["--etcd_cert and --etcd_key"]),
        (["--etcd_ca=a", "--etcd_addr=http://h:1"], ["http://h:1", "without TLS"]),
        (["--etcd_password_file=f"], ["--etcd_password_file", "--etcd_user"]),
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_flags_of_security_that_would_not_do_what_they_seem_to(
    role: str, argv: list[str], parts: list[str]
) -> None:
    message = _refusal(f"--role={role}", *argv)
    for part in parts:
        assert part in message


def test_keys_belong_to_who_has_the_public_api() -> None:
    keys = "--api_keys_file=keys"
    assert "masters" in _refusal("--role=worker", keys)
    assert _master(keys).api.api_keys_file == "keys"
    alone = _worker("--enable_service_routing=false", keys, "--tls_cert=c", "--tls_key=k")
    assert alone.security.tls_ca is None
    for flag in ("--share_cache_across_keys", "--tokens_per_minute=5", "--requests_per_minute=5"):
        assert "--api_keys_file" in _refusal("--role=master", flag)
        assert _master(keys, flag)
    assert _master("--operator_host=::1").security.operator_host == "::1"


STORE = ("--enable_kvcache_store", "--store_master_server_address=10.0.0.1:50051")


def test_the_shared_store() -> None:
    assert _worker().store == StoreConfig()
    rest = ("--store_protocol=rdma", "--store_metadata_server=etcd://10.0.0.1:2379")
    more = ("--store_local_hostname=10.0.0.2", "--store_segment_size=4GiB", "--store_replica_num=2")
    assert _worker(*STORE, *rest, *more).store == StoreConfig(
        enable_kvcache_store=True,
        store_protocol="rdma",
        store_master_server_address="10.0.0.1:50051",
        store_metadata_server="etcd://10.0.0.1:2379",
        store_local_hostname="10.0.0.2",
        store_segment_size=4 << 30,
        store_replica_num=2,
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--enable_kvcache_store"], "--store_master_server_address"),
        (STORE[1:], "add --enable_kvcache_store"),
        (["--store_segment_size=1GiB"], "add --enable_kvcache_store"),
        ([STORE[0], "--store_master_server_address=10.0.0.1"], "host:port"),
        ([STORE[0], "--store_master_server_address=10.0.0.1:x"], "host:port"),
        ([*STORE, "--store_protocol=udp"], "tcp"),
        ([*STORE, "--store_metadata_server=zookeeper"], "P2PHANDSHAKE"),
        ([*STORE, "--store_replica_num=0"], "--store_replica_num"),
        ([*STORE, "--noenable_prefix_cache"], "--enable_prefix_cache"),
    ],
)
def test_stores_that_cannot_be_are_refused(argv: list[str], said: str) -> None:
    assert said in _refusal("--role=worker", *argv)
