"""What a user touches: the command line, the OpenAI-compatible HTTP service, and the Serve deployments."""
