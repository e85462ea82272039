"""The local server: an OpenAI-style interface over HTTP to one loaded model.

    wire      what requests may hold, as the interface is published
    slots     who may run now, who waits, who is sent away
    failures  errors in the one shape that clients know
    requests  a request → messages, options, prompts of the library
    voices    who says what: reasoning apart, tagged, or verbatim
    replies   the library's events and replies → what clients read
    metrics   what happened, in Prometheus' text
    service   the model behind it all: streams that share what was read
    safety    who may ask at all, and with how much
    web       the page and its policy
    app       the routes
    host      a socket, uvicorn, and an end without loose ends

Each imports only what stands above it. Needs the extra `server`; only the command `serve`
imports this folder.
"""
