"""A model's name → a directory.

    download    the files of a Hub repository, and resumable downloads of the large ones
    hub         a name → directories: the demo, a path, the Hub's cache; uploads
    last_model  remembers the name used last

Each imports only modules above it.
"""
