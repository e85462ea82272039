"""Benchmarks and self-checks: trials in processes of their own, the doctor, and their statistics.

    figures     medians, spreads, lower bounds
    machine     this computer: chip, cores, memory, bandwidth
    trial       one measurement, in its own process
    bench       trials in turn
    real_layer  one layer of Magistral's size, twice
    doctor      does this machine compute correctly?

Each imports only what stands above it.
"""
