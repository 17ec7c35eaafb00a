"""Layers and training steps beside their peers, each in a process of its own.

``benchmarks`` is the table of what is measured, ``race`` lets the processes take turns, ``results``
keeps and shows their rows.
"""
