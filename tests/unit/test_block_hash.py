from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from xllm.cache.block_hash import CacheRoot, hash_blocks

ROOT = CacheRoot(fingerprint="f" * 64, kv_dtype="bfloat16", block_size=4)


def test_hash_is_the_documented_formula() -> None:
    root = ROOT.hash("tenant")
    tokens = [1, 2, 3, 2**31 - 1, 5, 6, 7, 8, 9]
    first = sha256(root + b"".join(t.to_bytes(4, "little") for t in tokens[:4])).digest()[:16]
    second = sha256(first + b"".join(t.to_bytes(4, "little") for t in tokens[4:8])).digest()[:16]
    assert hash_blocks(root, tokens, 4) == [first, second]


def test_root_is_stable_across_processes_and_versions() -> None:
    """A changed value here orphans every disk cache in the field: bump LAYOUT_VERSION instead."""
    assert ROOT.hash().hex() == "2a353cfd72fc51e86431a3a8efbd242e"
    assert ROOT.hash("tenant").hex() == "183c9cfca83322d7a0cc9dd6d60af0ca"


def test_every_field_of_the_root_counts() -> None:
    roots = [
        ROOT,
        CacheRoot(fingerprint="e" * 64, kv_dtype="bfloat16", block_size=4),
        CacheRoot(fingerprint="f" * 64, kv_dtype="float32", block_size=4),
        CacheRoot(fingerprint="f" * 64, kv_dtype="bfloat16", block_size=8),
        CacheRoot(fingerprint="f" * 64, kv_dtype="bfloat16", block_size=4, adapter="a"),
    ]
    hashes = {root.hash(salt) for root in roots for salt in ("", "a", "b")}
    assert len(hashes) == len(roots) * 3


def test_fields_are_length_prefixed() -> None:
    left = CacheRoot(fingerprint="ab", kv_dtype="c", block_size=4)
    right = CacheRoot(fingerprint="a", kv_dtype="bc", block_size=4)
    assert left.hash() != right.hash()


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 7), st.data())
def test_hashing_in_two_parts_equals_hashing_at_once(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    root = ROOT.hash()
    whole = hash_blocks(root, tokens, block_size)
    assert len(whole) == len(tokens) // block_size
    cut = data.draw(st.integers(0, len(whole)))
    parent = whole[cut - 1] if cut else root
    assert whole[:cut] + hash_blocks(parent, tokens, block_size, cut * block_size) == whole
