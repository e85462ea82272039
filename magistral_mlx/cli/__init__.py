"""`magistral-mlx`: what each command does with the library.

    common         what commands share
    convert        convert, verify, info
    plan           what fits into memory
    bench          tokens per second
    doctor         does this machine compute correctly?
    serve          the local server
    launchd        a launchd agent's property list, loaded and removed
    service        the server as a launchd agent
    reply_options  what a reply is asked for
    repl           the interactive chat
    ask            ask, chat
    app            all commands, and how errors are shown

Each imports only what stands above it.
"""
