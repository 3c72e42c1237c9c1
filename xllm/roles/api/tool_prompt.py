"""Tools in the prompt of a model whose chat template has no place for them.

Such a template would drop tools, calls and results without a word. Here they are put into the
messages instead, in the words and tags that Hermes and Qwen were trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xllm.roles.api.reading.hermes import CLOSE, OPEN

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def spell_out_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages of the roles system, user and assistant alone, with nothing but text."""
    spelled = [_spell_out(message) for message in messages]
    if not tools:
        return spelled
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=listed)
    if spelled and spelled[0]["role"] in ("system", "developer"):
        first = {**spelled[0], "content": f"{spelled[0]['content']}\n\n{introduction}"}
        return [first, *spelled[1:]]
    return [{"role": "system", "content": introduction}, *spelled]


def _spell_out(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls", ())
    parts = [message["content"]] if message["content"] else []
    parts += [
        f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls
    ]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(parts)}
