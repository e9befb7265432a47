"""`--json-schema`: a file with a schema, and the grammar that it becomes. Called by `gateway.local.command`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from gateway.errors import ApiError, GrammarRefused, OptionInvalid
from gateway.http.request_limits import parse_json
from gateway.http.response_format import MAX_SCHEMA_CHARS, JsonForm, in_words, wrong_with
from gateway.http.settings import RequestLimits
from gateway.text.grammar_check import GrammarChecker
from gateway.text_file import read_text_file


def read_grammar(file: Path) -> str:
    """Raises OptionInvalid that says what of the schema cannot be followed, FileUnusable."""
    content = read_text_file(str(file), 4 * MAX_SCHEMA_CHARS).text
    try:
        schema = parse_json(content.encode(), RequestLimits())
    except ApiError as error:
        reason = error.message.replace("The body", "it", 1).removesuffix(".")
        raise OptionInvalid("--json-schema", f"{file}: {reason}") from error
    if (wrong := wrong_with(schema)) is not None:
        raise OptionInvalid("--json-schema", f"{file}: it {wrong}")
    grammar = JsonForm(schema).grammar
    with closing(GrammarChecker()) as checker:
        try:
            checker.check(grammar)
        except GrammarRefused as error:
            raise OptionInvalid("--json-schema", f"{file}: {in_words(error.reason)}") from error
    return grammar
