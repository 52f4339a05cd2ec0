"""One file per provider, and `compose`, which builds the paper's losses from a peer's fused cross-entropy."""
