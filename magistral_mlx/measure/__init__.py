"""How fast, and is it right? Trials in processes of their own, the doctor, and the figures they give.

    figures     medians, spreads, lower bounds
    machine     this computer: chip, cores, memory, bandwidth
    trial       one measurement, in a process of its own
    bench       trials in turn
    real_layer  one layer of Magistral's size, twice
    doctor      is this machine right?

Each imports only what stands above it.
"""
