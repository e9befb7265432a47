"""What a chat's tools mean for its answers: who may be called, and by which grammar. Called by `gateway.http.jobs`."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import ApiError, GrammarRefused
from gateway.http.openai_types import ChatRequest
from gateway.http.response_format import NO_GRAMMAR, CheckedGrammar, in_words, keywords_of
from gateway.http.tool_fields import Tool, ToolChoice
from gateway.http.tool_grammar import CLOSE, has_grammar, schema_grammars, tool_grammar
from gateway.text.grammar_check import GrammarChecker


@dataclass(frozen=True)
class Calling:
    """The tools of one request."""

    tools: tuple[Tool, ...]
    choice: ToolChoice
    is_parallel: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of functions that may be called."""
        return tuple(tool.name for tool in self.tools if self.choice.name in (None, tool.name))

    @property
    def stops(self) -> tuple[str, ...]:
        """An answer that may have one call ends with it, by its grammar where it has one."""
        return () if self.is_parallel or has_grammar(self.tools, self.choice) else (CLOSE,)


def calling_of(request: ChatRequest) -> Calling | None:
    """None where no tools are offered."""
    if not request.offered_tools:
        return None
    choice = request.tool_choice or ToolChoice("auto")
    is_parallel = request.parallel_tool_calls is not False and choice.name is None
    return Calling(request.offered_tools, choice, is_parallel)


async def check_tools(calling: Calling, grammars: GrammarChecker, owner: str) -> CheckedGrammar:
    """Raises ApiError 400 that names the function whose schema cannot be followed, PreparationBusy."""
    text = tool_grammar(calling.tools, calling.choice, is_parallel=calling.is_parallel)
    if text is None:
        return NO_GRAMMAR
    try:
        warnings = await grammars.check_in_turn(owner, text, schema_grammars(calling.tools))
    except GrammarRefused as error:
        named = "tools" if error.part is None else f"function '{error.part}'"
        message = f"Invalid schema for {named}: {in_words(error.reason)}."
        raise ApiError(400, message, param="tools", code="invalid_json_schema") from error
    return CheckedGrammar(text, tuple(f"tools.{keyword}" for keyword in keywords_of(warnings)))
