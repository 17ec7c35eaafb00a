"""Layers and training steps beside their peers, each in a process of its own."""
