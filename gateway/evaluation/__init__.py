"""`sage-moe eval`: perplexity of texts, its cost in reads, tables and pictures."""
