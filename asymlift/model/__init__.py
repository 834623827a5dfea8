"""From pixel tokens to velocities: the converted model, its reference branch, what trains."""
