"""Benchmarks and self-checks.

    figures     statistics: medians, spreads, lower bounds
    machine     this computer: chip, cores, memory, bandwidth
    trial       one measurement, in a process of its own
    bench       a whole benchmark: trials of both engines in turn
    real_layer  one layer of Magistral's size, and its reference implementation
    doctor      does this machine compute correctly?

Each imports only what stands above it.
"""
