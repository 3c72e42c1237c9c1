"""API keys, the operators' key, limits per key, salts: what each lets through."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.errors import ConfigError, RateLimited, Unauthorized
from xllm.reload import Reload
from xllm.security.api_keys import ApiKeys, limits_by_name, parse_api_keys
from xllm.security.files import MAX_FILE_BYTES, read_private_file
from xllm.security.operator_key import OperatorKey
from xllm.security.rate_limit import Bucket, RateLimiter, RateLimits
from xllm.security.secret import ClusterSecret

ALICE = "sk-alice-0123456789"
BOB = "sk-bob-01234567890"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def make_keys(path: Path, text: str, limits: RateLimits | None = None) -> ApiKeys:
    return ApiKeys(write(path, text), limits or RateLimits(), Clock())


def test_a_key_is_known_by_its_name(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", f"# ours\n\nalice:{ALICE}\nbob:{BOB} tokens_per_minute=5\n")
    assert keys.authenticate(f"Bearer {ALICE}").name == "alice"
    bob = keys.authenticate(f"bearer  {BOB} ")
    assert (bob.name, bob.limits) == ("bob", RateLimits(0, 5))


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer{ALICE}"],
)
def test_without_a_key_there_is_no_code(tmp_path: Path, header: str | None) -> None:
    keys = make_keys(tmp_path / "keys", f"alice:{ALICE}")
    with pytest.raises(Unauthorized, match="didn't provide") as caught:
        keys.authenticate(header)
    assert caught.value.code is None


@pytest.mark.parametrize(
    "key",
    [ALICE[:-1], ALICE + "x", ALICE.upper(), f"alice:{ALICE}", "x", "\udcff" * 20, f"{ALICE} x"],
)
def test_a_wrong_key_is_named_as_such_and_not_shown(tmp_path: Path, key: str) -> None:
    keys = make_keys(tmp_path / "keys", f"alice:{ALICE}")
    with pytest.raises(Unauthorized, match="Incorrect") as caught:
        keys.authenticate(f"Bearer {key}")
    assert caught.value.code == "invalid_api_key"
    assert key not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no key in it"),
        ("# none", "no key in it"),
        (ALICE, "line 1: expected NAME:KEY"),
        (f"a b:{ALICE}", "line 1: expected NAME:KEY"),
        (f"../x:{ALICE}", "line 1: expected NAME:KEY"),
        ("alice:short", "line 1: a key must have"),
        ("alice:" + "ä" * 20, "line 1: a key must have"),
        (f"alice:{ALICE}\nbob:{ALICE}", "line 2: the same key as on line 1"),
        (f"alice:{ALICE} tokens_per_minute=-1", "line 1: after the key"),
        (f"alice:{ALICE} {ALICE}", "line 1: after the key"),
        (f"{ALICE}:alice", "line 1: a key must have"),
    ],
)
def test_a_wrong_line_is_named_without_its_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_keys(tmp_path / "keys", text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--api_keys_file={tmp_path / 'keys'}: ")
    assert ALICE not in str(caught.value)


def test_two_keys_of_one_name_share_limits_that_one_line_states() -> None:
    text = f"alice:{ALICE} requests_per_minute=3\nalice:{BOB} tokens_per_minute=9"
    limits = limits_by_name(parse_api_keys(text), RateLimits(1, 1))
    assert limits == {"alice": RateLimits(3, 9)}
    with pytest.raises(ConfigError, match="two limits of requests_per_minute"):
        limits_by_name(
            parse_api_keys(text.replace("tokens_per_minute=9", "requests_per_minute=4")),
            RateLimits(),
        )


def test_a_reload_changes_keys_and_keeps_what_was_used(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = make_keys(path, f"alice:{ALICE}\nbob:{BOB}", RateLimits(requests=1))
    alice = keys.authenticate(f"Bearer {ALICE}")
    alice.take_request(0.0)
    write(path, f"alice:{ALICE}-new")
    keys.reload()
    assert keys.authenticate(f"Bearer {ALICE}-new") is alice
    for gone in (ALICE, BOB):
        with pytest.raises(Unauthorized):
            keys.authenticate(f"Bearer {gone}")


def test_a_reload_of_a_broken_file_keeps_the_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    keys = make_keys(path, f"alice:{ALICE}")
    operator = OperatorKey(write(tmp_path / "operator", "an operator's key"))
    reload = Reload()
    reload.add("api_keys", keys.reload)
    reload.add("operator_key", operator.reload)
    write(path, "alice:")
    write(tmp_path / "operator", "another operator's key")
    reload.run()
    assert "reload_failed what=api_keys kept=previous" in caplog.text
    assert keys.authenticate(f"Bearer {ALICE}").name == "alice"
    assert operator.is_in("Bearer another operator's key"), "one broken file stops no other"


def test_the_operators_key(tmp_path: Path) -> None:
    key = OperatorKey(write(tmp_path / "key", "0123456789abcdef\n"))
    assert key.is_in("Bearer 0123456789abcdef")
    for header in (None, "", "Bearer ", "Bearer 0123456789abcdeF", "Basic 0123456789abcdef"):
        assert not key.is_in(header)
    for text in ("short", "0123456789abcdef\n0123456789abcdef"):
        with pytest.raises(ConfigError, match="--operator_key_file="):
            OperatorKey(write(tmp_path / "key", text))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_touch_is_warned_about(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    write(path, "text")
    assert read_private_file(str(path), "flag") == "text"
    assert caplog.text == ""
    path.chmod(mode)
    assert read_private_file(str(path), "flag") == "text"
    assert f"file_is_not_private flag=flag path={path} mode={mode:o}" in caplog.text


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    for name in ("missing", "binary", "large", "."):
        with pytest.raises(ConfigError, match="--flag="):
            read_private_file(str(tmp_path / name), "flag")


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_the_rate() -> None:
    bucket = Bucket(60, 0.0)
    assert bucket.wait_s(60, 0.0) == 0
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(30, 10.0) == pytest.approx(20.0)
    assert bucket.wait_s(1000, 10.0) == pytest.approx(50.0), "a full bucket, not for ever"


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 200)), max_size=60))
def test_over_any_time_the_rate_holds(asked: list[tuple[float, int]]) -> None:
    bucket, now, taken, largest = Bucket(100, 0.0), 0.0, 0, 0
    for delay_s, amount in asked:
        now += delay_s
        if bucket.wait_s(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
            largest = max(largest, amount)
        assert taken <= 100 + 100 * now / 60 + max(0, largest - 100) + 1e-6


def test_what_was_refused_costs_nothing() -> None:
    limiter = RateLimiter("alice", RateLimits(requests=2, tokens=100), 0.0)
    limiter.take_request(0.0)
    with pytest.raises(RateLimited):
        limiter.check_prompt(101 + 1, 0.0) or limiter.take_tokens(60, 0.0) or limiter.check_prompt(
            60, 0.0
        )
    limiter.check_prompt(40, 0.0)


def test_output_leaves_a_debt_that_the_next_request_waits_for() -> None:
    limiter = RateLimiter("alice", RateLimits(tokens=60), 0.0)
    limiter.take_tokens(90, 0.0)
    with pytest.raises(RateLimited) as caught:
        limiter.take_request(0.0)
    assert (caught.value.kind, caught.value.retry_after_s) == ("tokens", 31)
    limiter.take_request(31.0)


def test_salts_differ_by_key_and_by_request() -> None:
    secret, other = ClusterSecret("s" * 32), ClusterSecret("t" * 32)
    pairs = [("a", ""), ("a", "b"), ("ab", ""), ("b", ""), ("", "ab"), ("a", "\udcff")]
    salts = [kind.salt(*pair) for kind in (secret, other, ClusterSecret("")) for pair in pairs]
    assert len(set(salts)) == len(salts)
    assert all(len(salt) == 64 for salt in salts)
    again = ClusterSecret("s" * 32)
    assert [again.salt(*pair) for pair in pairs] == salts[: len(pairs)], "as on every master"


@given(st.text(), st.text(), st.text(), st.text())
def test_no_request_can_name_the_salt_of_another_key(
    name: str, salt: str, other_name: str, other_salt: str
) -> None:
    secret = ClusterSecret("s" * 32)
    same = (name, salt) == (other_name, other_salt)
    assert (secret.salt(name, salt) == secret.salt(other_name, other_salt)) == same


def test_logs_name_no_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "keys"
    keys = make_keys(path, f"alice:{ALICE}")
    path.chmod(0o644)
    reload = Reload()
    reload.add("api_keys", keys.reload)
    reload.run()
    assert "reloaded what=api_keys" in caplog.text
    assert ALICE not in caplog.text
