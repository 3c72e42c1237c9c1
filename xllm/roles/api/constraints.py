"""What a request may say of its answer's form: `response_format`, and vLLM's fields for the same.

At most one of them counts, since an answer has one form.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from xllm.errors import InvalidRequest
from xllm.roles.api import grammars
from xllm.roles.api.base_model import ApiModel


class JsonSchemaFormat(ApiModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="Any object, if left out."
    )
    strict: bool | None = Field(None, description="Answers always follow the schema.")


class TextFormat(ApiModel):
    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    type: Literal["json_object"]


class JsonSchemaResponseFormat(ApiModel):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


def _format_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaResponseFormat, Tag("<json_schema>")],
    Discriminator(
        _format_kind,
        custom_error_type="format_type",
        custom_error_message="type must be text, json_object or json_schema",
    ),
]


def _schema_kind(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<object>"


JsonSchema = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[dict[str, Any], Tag("<object>")],
    Discriminator(_schema_kind),
]
Choices = Annotated[list[str], Field(min_length=1, max_length=grammars.MAX_CHOICES, fail_fast=True)]


class StructuredOutputs(ApiModel):
    """vLLM's object of the same name: one of these."""

    json_: JsonSchema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = Field(None, description="Refused.")


class Constraints(ApiModel):
    """The fields of a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = Field(None, description="In Lark's or in GBNF's notation.")

    def answer_grammar(self) -> str | None:
        """What the answer is held to; None: nothing.

        Raises: InvalidRequest for more than one form, or a form that does not work.
        """
        wanted = self._wanted()
        if not wanted:
            return None
        if len(wanted) > 1:
            first, second = list(wanted)[:2]
            raise InvalidRequest(f"{second} and {first} exclude each other", param=second)
        [(param, (kind, value))] = wanted.items()
        if kind == "json":
            return grammars.json_grammar(value, param=param)
        if kind == "regex":
            return grammars.regex_grammar(value, param=param)
        if kind == "choice":
            return grammars.choice_grammar(value, param=param)
        return grammars.text_grammar(value, param=param)

    def _wanted(self) -> dict[str, tuple[str, Any]]:
        """By parameter: the kind of form, and its value."""
        wanted: dict[str, tuple[str, Any]] = {}
        form = self.response_format
        if isinstance(form, JsonObjectFormat):
            wanted["response_format"] = ("json", grammars.ANY_OBJECT)
        elif isinstance(form, JsonSchemaResponseFormat):
            schema = form.json_schema.schema_
            param = "response_format.json_schema.schema"
            wanted[param] = ("json", grammars.ANY_OBJECT if schema is None else schema)
        given: list[tuple[str, str, Any]] = [
            ("guided_json", "json", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]
        if (outputs := self.structured_outputs) is not None:
            if outputs.structural_tag is not None:
                param = "structured_outputs.structural_tag"
                raise InvalidRequest(f"{param} is not supported", param=param)
            given += [
                ("structured_outputs.json", "json", outputs.json_),
                ("structured_outputs.regex", "regex", outputs.regex),
                ("structured_outputs.choice", "choice", outputs.choice),
                ("structured_outputs.grammar", "grammar", outputs.grammar),
                (
                    "structured_outputs.json_object",
                    "json",
                    grammars.ANY_OBJECT if outputs.json_object else None,
                ),
            ]
        wanted |= {param: (kind, value) for param, kind, value in given if value is not None}
        return wanted

    @property
    def wants_form(self) -> bool:
        return bool(self._wanted())
