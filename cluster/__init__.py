"""Places expert groups on Ray actors, keeps them alive, and sets what Ray's defaults get wrong."""
