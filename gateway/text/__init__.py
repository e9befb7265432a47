"""Between text and token ids: tokenizer, chat templates, and what a terminal may be shown."""
