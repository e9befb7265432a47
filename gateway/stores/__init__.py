"""Commands about checkpoints and stores: `extract`, `inspect`, `compare` and `store`."""
