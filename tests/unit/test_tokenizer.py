from __future__ import annotations

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import spm_tokenizer, tiny_core, tiny_tokenizer
from xllm.chat_template import ChatTemplate
from xllm.errors import ConfigError, InvalidRequest
from xllm.protocol import TokenizerFiles
from xllm.tokenizer import IncrementalDecoder, Tokenizer, read_tokenizer_files

TINY = tiny_tokenizer()
SPM = spm_tokenizer()


def feed(decoder: IncrementalDecoder, token_ids: list[int]) -> list[str]:
    return [*(decoder.push([token_id]) for token_id in token_ids), decoder.flush()]


@given(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=30), st.booleans())
def test_pieces_of_a_byte_level_tokenizer_join_to_the_whole(ids: list[int], skip: bool) -> None:
    decoder = IncrementalDecoder(TINY, at_start=True, skip_special_tokens=skip)
    assert "".join(feed(decoder, ids)) == TINY.decode(ids, skip_special_tokens=skip)


# Without byte tokens beyond ASCII: a wrong one makes `decode` give up correct ones beside it.
@given(st.lists(st.sampled_from([1, 2, *range(35, 130), *range(259, SPM.vocab_size)]), max_size=30))
def test_pieces_of_a_sentencepiece_tokenizer_join_to_the_whole(ids: list[int]) -> None:
    decoder = IncrementalDecoder(SPM, at_start=True)
    assert "".join(feed(decoder, ids)) == SPM.decode(ids)


@given(st.text(max_size=30), st.sampled_from([TINY, SPM]))
def test_text_survives_encoding_and_incremental_decoding(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer, at_start=True, skip_special_tokens=False)
    pieces = feed(decoder, ids)
    expected = text.replace("▁", " ") if tokenizer is SPM else text
    assert "".join(pieces) == expected


@given(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=30), st.data())
def test_division_of_tokens_into_pushes_does_not_matter(
    ids: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    decoder = IncrementalDecoder(TINY)
    text = decoder.push(ids[:cut]) + decoder.push(ids[cut:]) + decoder.flush()
    assert text == "".join(feed(IncrementalDecoder(TINY), ids))


@pytest.mark.parametrize("tokenizer", [TINY, SPM])
def test_a_character_is_never_divided(tokenizer: Tokenizer) -> None:
    # Neither vocabulary has these characters, so each takes several tokens.
    ids = tokenizer.encode("x🦊ö€", add_special_tokens=False)
    pieces = feed(IncrementalDecoder(tokenizer, at_start=True), ids)
    assert len(ids) > len(list(filter(None, pieces))) > 1
    assert "".join(pieces) == "x🦊ö€"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_appears_only_at_the_end() -> None:
    [first, *_] = TINY.encode("🦊")
    decoder = IncrementalDecoder(TINY)
    assert decoder.push([first]) == ""
    assert decoder.flush() == "\ufffd"


def test_a_continuation_keeps_its_leading_space() -> None:
    ids = SPM.encode("the a", add_special_tokens=False)
    assert IncrementalDecoder(SPM, at_start=True).push(ids) == "the a"
    assert IncrementalDecoder(SPM).push(ids) == " the a"


def test_special_tokens_are_left_out_unless_wanted() -> None:
    ids = TINY.encode("fox<|end|>")
    assert IncrementalDecoder(TINY).push(ids) == "fox"
    assert IncrementalDecoder(TINY, skip_special_tokens=False).push(ids) == "fox<|end|>"


def test_ids_without_a_token_have_no_text() -> None:
    assert IncrementalDecoder(TINY).push([TINY.vocab_size, 1 << 40]) == ""
    assert TINY.token_bytes(-1) == b""


def test_names_of_tokens() -> None:
    [fox, *_] = TINY.encode("the")
    [part, *_] = TINY.encode("🦊")
    assert TINY.token_name(fox) == "the"
    assert TINY.token_name(part) == "bytes:\\xf0\\x9f"
    assert TINY.token_bytes(part) == b"\xf0\x9f"
    assert TINY.token_name(1) == "<|end|>"


MESSAGES = [{"role": "user", "content": "hi <b>"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, now=lambda: datetime(2026, 1, 2)).render(MESSAGES, variables)


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n", "  hi <b>\n"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi <b>"}'),
        ("{{ ['ö'] | tojson(indent=1) }}", '[\n "ö"\n]'),
        ("{{ strftime_now('%d %b') }}", "02 Jan"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ bos_token }}{{ undefined_thing }}", "<s>"),
    ],
)
def test_templates_render_as_hugging_face_does(source: str, rendered: str) -> None:
    assert render(source, bos_token="<s>") == rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_named_templates() -> None:
    template = ChatTemplate(
        [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    )
    assert template.render([], {}) == "plain"
    assert template.render([], {"tools": [{}]}) == "tools"


def test_a_template_that_does_not_compile_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    ("source", "role"),
    [("{{ messages[0].role }}", "system"), ("{# developer #}{{ messages[0].role }}", "developer")],
)
def test_the_developer_is_the_system_to_templates_that_do_not_know_it(
    source: str, role: str
) -> None:
    assert ChatTemplate(source).render([{"role": "developer", "content": ""}], {}) == role


def files(**contents: object) -> TokenizerFiles:
    named = {
        "tokenizer.json": tiny_core().encode(),
        **{
            name.replace("__", "."): c if isinstance(c, bytes) else json.dumps(c).encode()
            for name, c in contents.items()
        },
    }
    return TokenizerFiles(files=named)


def test_a_template_file_wins_over_the_one_in_the_configuration() -> None:
    config = {"chat_template": "config"}
    assert Tokenizer.from_files(files(tokenizer_config__json=config)).apply_chat_template([]) == (
        "config"
    )
    both = files(tokenizer_config__json=config, chat_template__jinja=b"file")
    assert Tokenizer.from_files(both).apply_chat_template([]) == "file"


def test_special_tokens_reach_the_template() -> None:
    tokenizer = Tokenizer.from_files(
        files(
            tokenizer_config__json={
                "bos_token": {"content": "<|start|>"},
                "chat_template": "{{ bos_token }}{{ eos_token }}{{ messages | length }}{{ self_ }}",
            },
            special_tokens_map__json={"eos_token": "<|end|>"},
        )
    )
    # A client's variables may have any name, even those of our parameters.
    variables = {"self_": "!", "messages": [1, 2, 3], "self": 1}
    assert tokenizer.apply_chat_template(MESSAGES, **variables) == "<|start|><|end|>1!"


def test_generation_config_gives_eos_ids_and_sampling_defaults() -> None:
    tokenizer = Tokenizer.from_files(
        files(generation_config__json={"eos_token_id": [7, 1], "temperature": 0.6, "top_k": None})
    )
    assert tokenizer.eos_token_ids == (1, 7)
    assert tokenizer.default_sampling.temperature == 0.6
    assert tokenizer.default_sampling.top_k == 0


def test_the_tokenizers_own_eos_is_used_where_the_model_names_none() -> None:
    assert TINY.eos_token_ids == (1,)
    assert Tokenizer.from_files(files()).eos_token_ids == ()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"tokenizer.json": b"{}"}, "tokenizer.json does not parse"),
        ({}, "no tokenizer.json"),
        (
            {"tokenizer.json": tiny_core().encode(), "tokenizer_config.json": b"{"},
            "tokenizer_config.json is not JSON",
        ),
        (
            {"tokenizer.json": tiny_core().encode(), "generation_config.json": b"[]"},
            "must hold a JSON object",
        ),
        (
            {"tokenizer.json": tiny_core().encode(), "chat_template.jinja": b"\xff"},
            "chat_template.jinja is not UTF-8",
        ),
    ],
)
def test_broken_files_are_named(contents: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_files(TokenizerFiles(files=contents))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        read_tokenizer_files(str(tmp_path))


def test_without_a_template_a_chat_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        tiny_tokenizer(chat_template=None).apply_chat_template(MESSAGES)


def test_raw_prompts_get_the_models_own_special_tokens() -> None:
    config = json.loads(tiny_core())
    config["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [0], "tokens": ["<|start|>"]}},
    }
    tokenizer = Tokenizer.from_files(
        TokenizerFiles(files={"tokenizer.json": json.dumps(config).encode()})
    )
    bare = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox") == [0, *bare]
    assert bare == TINY.encode("fox")
