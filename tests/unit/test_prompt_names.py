from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.protocol import GenerateRequest, SamplingParams
from xllm.roles.prompt_names import MAX_KEPT, PromptNames

ROOT = CacheRoot(fingerprint="f", kv_dtype="bfloat16", block_size=4)


def request(
    number: int = 0, output_ids: list[int] | None = None, salt: str = ""
) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"r{number}",
        model_id="m",
        prompt_ids=list(range(10)),
        output_ids=output_ids or [],
        sampling=SamplingParams(),
        salt=salt,
    )


def expected(of: GenerateRequest, root: CacheRoot = ROOT) -> list[bytes]:
    return list(hash_blocks(root.hash(of.salt), of.prompt_ids + of.output_ids, root.block_size))


def test_names_are_the_same_prepared_or_not() -> None:
    names = PromptNames()
    for output_ids in ([], [1], [1, 2, 3, 4, 5, 6, 7]):
        for salt in ("", "tenant"):
            asked = request(output_ids=output_ids, salt=salt)
            assert names.of(asked, ROOT) == expected(asked)
            names.prepare(asked, ROOT)
            assert names.of(asked, ROOT) == expected(asked)


def test_another_model_gets_names_of_its_own() -> None:
    names = PromptNames()
    names.prepare(request(), ROOT)
    other = CacheRoot(fingerprint="g", kv_dtype="bfloat16", block_size=4)
    assert names.of(request(), other) == expected(request(), other)


def test_what_is_prepared_is_not_made_again() -> None:
    names = PromptNames()
    names.prepare(request(), ROOT)
    assert names.of(request(), ROOT) is names.of(request(), ROOT)


def test_only_so_many_are_kept() -> None:
    names = PromptNames()
    for number in range(MAX_KEPT + 5):
        names.prepare(request(number), ROOT)
    assert names.of(request(0), ROOT) is not names.of(request(0), ROOT)
    newest = request(MAX_KEPT + 4)
    assert names.of(newest, ROOT) is names.of(newest, ROOT)
