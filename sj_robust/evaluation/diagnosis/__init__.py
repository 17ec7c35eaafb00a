"""Signs that gradients, not the network, withstand attacks."""
