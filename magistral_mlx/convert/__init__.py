"""Arrays: a checkpoint → a quantized MLX directory, in the memory of one block of rows.

    recipe      the precision of each matrix
    plan        the layout of the output, before it is written
    job         the settings of a conversion
    quantize    one tensor, block by block
    conversion  plan + quantize + journal → verified → published by one rename

Each imports only modules above it.
"""
