"""`magistral-mlx`: what each command does with the library.

    common   what commands share
    convert  convert, verify, info
    plan     what fits
    bench    tokens per second
    doctor   is this machine right?
    serve    the local server
    launchd  such an agent's property list, loaded and removed
    service  the server as an agent of a Mac
    repl     the lines a user types
    app      ask, chat, models; all commands

Each imports only what stands above it.
"""
