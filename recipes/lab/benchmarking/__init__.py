"""Layers and training steps beside their peers, each in a process of its own.

``benchmarks`` is the table of what is measured, ``race`` lets the processes of ``worker`` take
turns, ``results`` keeps their rows, and ``tables`` and ``chart`` show them.
"""
