"""Chat templates as Hugging Face defines them: Jinja2 in a sandbox, with a few helpers.

Templates come with a model and are run by everyone who serves it, so they get the immutable
sandbox. Whitespace control, loop controls and the helpers are those of transformers'
`apply_chat_template`, which templates are written and tested against.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xllm.errors import ConfigError, InvalidRequest


class ChatTemplate:
    """A compiled template, or one of several named ones."""

    def __init__(
        self,
        source: str | Sequence[Mapping[str, str]] | None,
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`source`: a template, or `[{"name": ..., "template": ...}, ...]`; None has none.

        Raises: ConfigError if a template does not compile.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda fmt: now().strftime(fmt)
        if isinstance(source, str):
            sources = {"default": source}
        else:
            sources = {entry["name"]: entry["template"] for entry in source or ()}
        self._sources = list(sources.values())
        self._knows_developer = {name for name, text in sources.items() if "developer" in text}
        try:
            self._templates = {k: environment.from_string(v) for k, v in sources.items()}
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}") from error

    def mentions(self, text: str) -> bool:
        """Whether `text` stands in the template, or in one of several."""
        return any(text in source for source in self._sources)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt's text. With `tools` among the variables a template named tool_use wins.

        A developer is the system to templates that are older than that role.

        Raises: InvalidRequest if the template refuses the messages.
        """
        wants_tools = bool(variables.get("tools")) and "tool_use" in self._templates
        name = "tool_use" if wants_tools else "default"
        template = self._templates.get(name)
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        if name not in self._knows_developer:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        try:
            return template.render(variables, messages=messages)
        except Exception as error:  # foreign code: whatever it raises, it did not take the messages
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it only passes on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = CallBlock(self.call_method("_pass_on"), [], [], body)
        block.set_lineno(line)
        return block

    def _pass_on(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)
