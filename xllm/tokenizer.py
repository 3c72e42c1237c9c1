"""Text to tokens and back: encoding, and decoding while tokens arrive.

`Tokenizer` reads the files of a Hugging Face model folder. It works from their bytes, because a
master obtains them from its workers instead of from a disk (`protocol.TokenizerFiles`).

Decoding while tokens arrive needs the text of one token. That is a property of the token alone, a
*piece*: bytes, since a token may hold a part of a character. Pieces of consecutive tokens go
through one incremental UTF-8 decoder, so a token costs O(1) and no part of a character gets out.
The one thing that depends on the position is the space that sentencepiece puts before the first
word and takes away again: `IncrementalDecoder(at_start=True)`.

Not here: chat templates (`chat_template.py`), stop strings (`stop_matcher.py`), and which tokens
end a request (the engine).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from xllm.chat_template import ChatTemplate
from xllm.errors import ConfigError
from xllm.protocol import TokenizerFiles

_TOKENIZER_FILE = "tokenizer.json"
_OPTIONAL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request that says nothing gets: the model's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_tokenizer_files(folder: str | Path) -> TokenizerFiles:
    """Reads the tokenizer's files of a model folder.

    Raises: ConfigError if tokenizer.json is missing or a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / _TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json; save a fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    names = (_TOKENIZER_FILE, *_OPTIONAL_FILES)
    try:
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer in {folder}: {error}") from error
    return TokenizerFiles(files=files)


class Tokenizer:
    """One model's tokenizer. `encode` and `decode` run on any thread, all else on one at a time."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, Any] | None = None,
        chat_template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        """`special_tokens`: bos_token, eos_token and so on, as tokenizer_config.json names them."""
        core.no_padding()
        core.no_truncation()
        self._core = core
        self._special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        self._pieces = _Pieces(core)
        config = generation_config or {}
        self.default_sampling = _sampling_defaults(config)
        self.eos_token_ids = self._find_eos(config)
        """Tokens that end an answer, ascending; empty if the files name none."""
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        """Tokens that have a text; the model's own vocabulary may be padded beyond it."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Raises: ConfigError."""
        return cls.from_files(read_tokenizer_files(folder))

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> Tokenizer:
        """Raises: ConfigError if a file does not parse."""
        try:
            core = tokenizers.Tokenizer.from_buffer(files.files[_TOKENIZER_FILE])
        except KeyError as error:
            raise ConfigError("the model has no tokenizer.json") from error
        except Exception as error:  # the package raises bare Exception for a file it cannot parse
            raise ConfigError(f"tokenizer.json does not parse: {error}") from error
        config = _load_json(files, "tokenizer_config.json")
        special_tokens = _special_tokens(_load_json(files, "special_tokens_map.json"))
        special_tokens.update(_special_tokens(config))
        source = config.get("chat_template")
        if "chat_template.jinja" in files.files:
            try:
                source = files.files["chat_template.jinja"].decode()
            except UnicodeDecodeError as error:
                raise ConfigError(f"chat_template.jinja is not UTF-8: {error}") from error
        return cls(
            core,
            special_tokens=special_tokens,
            chat_template=ChatTemplate(source) if source else None,
            generation_config=_load_json(files, "generation_config.json"),
        )

    @property
    def added_tokens(self) -> list[tokenizers.AddedToken]:
        """Tokens that are taken out of a text before the rest of it is encoded."""
        return list(self._core.get_added_tokens_decoder().values())

    @property
    def pre_tokenizer(self) -> Any:
        """What splits a text into words, as tokenizer.json has it; None: nothing does."""
        return _as_json(self._core.pre_tokenizer)

    @property
    def normalizer(self) -> Any:
        """What changes a text before that."""
        return _as_json(self._core.normalizer)

    @cached_property
    def tokens_around(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """What `encode` puts before and after the ids of a text; None: it does something else."""
        alone = self.encode("a", add_special_tokens=False)
        whole = self.encode("a", add_special_tokens=True)
        starts = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
        if not alone or len(starts) != 1:
            return None
        [start] = starts
        return tuple(whole[:start]), tuple(whole[start + len(alone) :])

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def template_mentions(self, text: str) -> bool:
        """Whether `text` stands in the chat template."""
        return self._chat_template is not None and self._chat_template.mentions(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; the names of special tokens in it become these tokens.

        `add_special_tokens` adds what the model expects around a raw prompt (BOS); text that a
        chat template rendered has it already. Releases the GIL for most of its time.
        """
        [ids] = self.encode_all([text], add_special_tokens)
        return ids

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The same for each text; of several at a time, on all cores."""
        # The batch call is the one that releases the GIL; the fast one leaves offsets out.
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD. Any thread."""
        # The batch call is the one that releases the GIL.
        [text] = self._core.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """Renders a conversation; `add_generation_prompt=True` is up to the caller.

        Raises: InvalidRequest if there is no template or it refuses the messages.
        """
        template = self._chat_template or ChatTemplate(None)
        return template.render(messages, {**self._special_tokens, **kwargs})

    def token_id(self, token: str) -> int | None:
        """Of a token that is spelled so; None: there is none."""
        return self._core.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The piece of one token, special ones spelled out; may hold a part of a character.

        Empty for an id without a token.
        """
        return self._pieces[token_id]

    def token_name(self, token_id: int) -> str:
        """A token's text; bytes that are not UTF-8 by themselves are spelled, as OpenAI does."""
        raw = self._pieces[token_id]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _find_eos(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        ids = generation_config.get("eos_token_id")
        if ids is None:
            token = self._special_tokens.get("eos_token")
            ids = self._core.token_to_id(token) if isinstance(token, str) else None
        if ids is None:
            return ()
        return tuple(sorted(ids)) if isinstance(ids, list) else (ids,)


class IncrementalDecoder:
    """Text of one sequence of tokens as they arrive, special tokens left out.

    What it has returned, concatenated, is the sequence's text. (Where a run of sentencepiece byte
    tokens is not UTF-8, `Tokenizer.decode` gives up the whole run, this only the wrong bytes.)
    """

    __slots__ = ("_pieces", "_special_ids", "_strip_space", "_utf8")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        at_start: bool = False,
        skip_special_tokens: bool = True,
        kept_tokens: Iterable[str] = (),
    ) -> None:
        """`at_start`: the tokens begin a text, rather than continue a prompt. `kept_tokens` are
        not skipped, special or not."""
        self._pieces = tokenizer._pieces
        self._special_ids: frozenset[int] = (
            self._pieces.special_ids if skip_special_tokens else frozenset()
        )
        if kept := {tokenizer.token_id(token) for token in kept_tokens}:
            self._special_ids -= kept
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = at_start and self._pieces.starts_with_space

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; an unfinished character waits."""
        pieces, special_ids = self._pieces, self._special_ids
        return self._emit(b"".join([pieces[i] for i in token_ids if i not in special_ids]), False)

    def flush(self) -> str:
        """The end of the text: what an unfinished character left becomes U+FFFD."""
        return self._emit(b"", True)

    def _emit(self, raw: bytes, final: bool) -> str:
        text = self._utf8.decode(raw, final)
        if text and self._strip_space:
            self._strip_space = False
            text = text.removeprefix(" ")
        return text


class _Pieces(dict[int, bytes]):
    """Token id to its bytes, filled as tokens are met.

    Byte-level tokenizers spell each byte as a character of its own. Of the others the package's
    decoder is asked, with a token before it so that nothing is taken for the start of a text.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._core = core
        self.special_ids = frozenset(
            token_id for token_id, token in core.get_added_tokens_decoder().items() if token.special
        )
        decoders = _decoder_types(_as_json(core.decoder))
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in decoders else None
        self._has_byte_tokens = "ByteFallback" in decoders
        self._anchor: int | None = None
        self._anchor_text = ""
        self.starts_with_space = False
        if self._byte_of is None:
            self._find_anchor()

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = self._piece(token_id)
        return piece

    def _piece(self, token_id: int) -> bytes:
        token = self._core.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        if self._byte_of is not None:
            try:
                return bytes([self._byte_of[char] for char in token])
            except KeyError:  # an added token, spelled as it is
                return str(token).encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self._after_anchor(token_id).encode()

    def _after_anchor(self, token_id: int) -> str:
        if self._anchor is None:
            return str(self._core.decode([token_id], skip_special_tokens=False))
        text: str = self._core.decode([self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    def _find_anchor(self) -> None:
        """Any word will do; one that begins with a space shows whether a first space is dropped."""
        vocab = self._core.get_vocab(with_added_tokens=False)
        words = (token for token in vocab if token.lstrip("▁").isalnum())
        best = min(words, key=lambda token: (not token.startswith("▁"), token), default=None)
        if best is None:
            return
        self._anchor = vocab[best]
        self._anchor_text = self._core.decode([self._anchor], skip_special_tokens=False)
        follower = self._after_anchor(self._anchor)
        self.starts_with_space = follower == " " + self._anchor_text


def _as_json(component: Any) -> Any:
    """A part of the package's tokenizer. Its state is JSON, without the vocabulary."""
    return None if component is None else json.loads(component.__getstate__())


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _decoder_types(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    types = {decoder["type"]}
    for inner in decoder.get("decoders", ()):
        types |= _decoder_types(inner)
    return types


def _load_json(files: TokenizerFiles, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.files.get(name, b"{}"))
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token and the like; a token is spelled as a string or as an object with `content`."""
    tokens = {name: _content(config[name]) for name in _SPECIAL_TOKEN_NAMES if config.get(name)}
    if extra := config.get("additional_special_tokens"):
        tokens["additional_special_tokens"] = [_content(token) for token in extra]
    return tokens


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _sampling_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    names = SamplingDefaults.__dataclass_fields__
    return SamplingDefaults(**{k: v for k in names if (v := config.get(k)) is not None})
