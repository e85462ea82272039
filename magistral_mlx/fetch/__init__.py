"""A model's name → a directory.

    download    what the Hub has, and resumable downloads of large files
    hub         a name → directories: the demo, a path, the Hub's cache; uploads
    last_model  the name used last, kept

Each imports only what stands above it.
"""
