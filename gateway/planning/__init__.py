"""`sage-moe plan`: whether a model fits and how fast it would be, without its weights."""
