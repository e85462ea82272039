"""The local server: an OpenAI-style interface over HTTP to one loaded model.

    wire       what requests may hold, as the interface is published
    requests   a request → messages, options, prompts of the library
    replies    the library's events and replies → what clients read
    slots      who may run now, who waits, who is sent away
    service    the model behind it all: streams that share what was read
    safety     who may ask at all, and with how much
    failures   errors in the one shape that clients know
    metrics    what happened, in Prometheus' text
    app        the routes
    host       a socket, uvicorn, and an end without loose ends

Needs the extra `server`; nothing else in the package imports it but the command `serve`.
"""
