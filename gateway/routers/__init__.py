"""Several routers as one: which gets a request, and what becomes of it when that one dies."""
