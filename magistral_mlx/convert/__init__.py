"""Arrays: a checkpoint → a quantized MLX directory, in the memory of one block of rows.

    recipe      precision of each matrix
    plan        an output, before it is written
    job         what is to be converted
    quantize    a tensor, block by block
    conversion  plan + quantize + journal → verified → published by one rename

Each imports only what stands above it.
"""
