"""The command line `magistral-mlx`.

    common         shared options and helpers
    convert        convert, verify, info
    plan           what fits into memory
    bench          tokens per second
    doctor         does this machine compute correctly?
    serve          the local server
    launchd        installs and removes a launchd agent
    service        the server as a launchd agent
    reply_options  the options of a reply
    repl           the interactive chat
    ask            ask, chat
    app            the group of all commands, and how errors are shown

Each imports only modules above it.
"""
