"""Joint bounds of spiking layers over time."""
