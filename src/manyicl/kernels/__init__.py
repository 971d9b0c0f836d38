"""Kernels of our own, compiled on first use for the processor at hand; without them torch's own are used."""
