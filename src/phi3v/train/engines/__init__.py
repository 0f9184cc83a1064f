"""How several processes share a training step: every one a replica, or each holding a part of the state."""
