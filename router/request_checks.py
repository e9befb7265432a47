"""What a request must be for a model. Called by `router.engine` before it is queued."""

from __future__ import annotations

from router.errors import PromptInvalid
from router.request import GenerationRequest


def check_request(request: GenerationRequest, vocab_size: int) -> None:
    """Tokens that the vocabulary has, and something to compute. Raises PromptInvalid."""
    if not request.prompt_ids:
        raise PromptInvalid("it has no tokens")
    known = (*request.prompt_ids, *request.generated_ids)
    outside = next((token for token in known if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise PromptInvalid(f"token id {outside} is outside the vocabulary of {vocab_size}")
    named = (*request.sampling.stop_token_ids, *(token for token, _ in request.sampling.logit_bias))
    if any(not 0 <= token < vocab_size for token in named):
        raise PromptInvalid(f"a stop token or bias is outside the vocabulary of {vocab_size}")
    num_generated, max_tokens = len(request.generated_ids), request.sampling.max_tokens
    is_prompt_all = max_tokens == 0 and not num_generated
    if request.generated_efforts and len(request.generated_efforts) != num_generated:
        raise PromptInvalid(f"{len(request.generated_efforts)} efforts for {num_generated} generated tokens")
    if num_generated >= max_tokens and not is_prompt_all:
        raise PromptInvalid(f"max_tokens of {max_tokens} leaves nothing to generate after {num_generated}")
