"""Arrays: what lies on disk. Checkpoints of any layout, safetensors, what is durable, how much room there is.

    configfile  params.json, config.json → config, checked
    tensorfile  one .safetensors, read by rows
    checkpoint  any layout → tensors by name; Mistral's native names stand here
    manifest    proof of a conversion
    journal     what is durable
    room        on disks, for what is to come

Each imports only what stands above it.
"""
