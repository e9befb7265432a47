"""The OpenAI-compatible HTTP service: from a request to a job, from its events to an answer."""
