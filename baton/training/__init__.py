"""Accelerate and TRL, for every trainer: configuration, rows, reference, adapters, memory, metrics, checkpoints.

Imported after a stage has found that there is work to do, since it takes seconds to import.
"""
