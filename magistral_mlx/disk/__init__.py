"""Arrays: what lies on disk. Checkpoints of any layout, safetensors, what is durable, how much room there is.

    configfile  params.json, config.json → config, checked
    tensorfile  one .safetensors, read by rows
    checkpoint  any layout → tensors by name; Mistral's native names stand here
    manifest    hashes and errors of a conversion
    journal     the log by which a conversion resumes
    room        free disk space

Each imports only what stands above it.
"""
