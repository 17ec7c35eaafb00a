"""Bounds of spiking layers that hold together over time: one definition (``reference``), a compiled
kernel, one entry point.
"""
