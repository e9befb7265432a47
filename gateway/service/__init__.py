"""`sage-moe serve`: its options, what it plans for one machine or a cluster, and the Ray Serve shells."""
