"""Arrays: files. Checkpoints of any layout, safetensors, crash-safe writing, free disk space.

    configfile  params.json or config.json → config, checked
    tensorfile  one .safetensors file, read by blocks of rows
    checkpoint  any layout → tensors by name; holds the table of Mistral's native names
    manifest    hashes and quantization errors of a conversion
    journal     the log by which a conversion resumes
    room        free disk space

Each imports only modules above it.
"""
