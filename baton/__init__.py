"""The contract: what every stage reads, writes and promises. Imports no torch, no vLLM, no TRL."""

__version__ = "0.1.0"
