"""`sage-moe batch`: a file of requests to its end, exactly once."""
