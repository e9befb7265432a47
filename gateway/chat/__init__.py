"""`sage-moe chat`: a conversation in a terminal, with a service or a store."""
