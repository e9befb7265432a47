"""Calls of tools as models write them, and the grammar of answers with calls. Pure.

The syntax is that of the Hermes models, which Qwen's have: `<tool_call>`, a line with a JSON object of name and
arguments, `</tool_call>`. Called by `gateway.http.jobs`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from gateway.http.response_format import JsonForm, with_options
from gateway.http.tool_fields import Tool, ToolChoice

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_TOGETHER = 16
"""Calls in one answer that is to have some."""


def has_grammar(tools: Sequence[Tool], choice: ToolChoice) -> bool:
    """Whether it is not left to the model what it writes."""
    return choice.mode == "required" or (choice.mode == "auto" and any(tool.is_strict for tool in tools))


def tool_grammar(tools: Sequence[Tool], choice: ToolChoice, *, is_parallel: bool) -> str | None:
    """As text for `llguidance`; None where the model may write what it likes.

    With "auto" and a strict function the model decides whether text comes before a call, and not what the call may be.
    """
    if not has_grammar(tools, choice):
        return None
    chosen = [tool for tool in tools if choice.name in (None, tool.name)]
    most = MOST_TOGETHER if is_parallel and choice.name is None else 1
    if choice.mode == "required":
        more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
        start = [f"start: call{more}", f'call: "{OPEN}" body']
    else:
        start = [
            f"start: (begun body){{0,{most}}} TEXT" if most > 1 else "start: begun body | TEXT",
            f'begun[lazy]: TEXT "{OPEN}"',
            r"TEXT: /(.|\n)*/",
        ]
    bodies = " | ".join(f"body_{number}" for number in range(len(chosen)))
    lines = [*start, f'body: "\\n" ({bodies}) "\\n{CLOSE}"']
    for number, tool in enumerate(chosen):
        schema = json.dumps(with_options(tool.parameters, tool.is_strict))
        begin = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        lines += [f'body_{number}: {begin} arguments_{number} "}}"', f"arguments_{number}: %json {schema}"]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}]})


def schema_grammars(tools: Sequence[Tool]) -> dict[str, str]:
    """Of each function's arguments alone, to find the one whose schema cannot be followed."""
    return {tool.name: JsonForm(tool.parameters, tool.is_strict).grammar for tool in tools}
