"""The local server: OpenAI's and Anthropic's interfaces over HTTP to one loaded model.

    wire                what requests may hold, as the interface is published
    anthropic_wire      the same of Anthropic's interface
    slots               what may run now, what waits, what is refused
    failures            errors in the shapes that clients know
    requests            a request → messages, options, prompts of the library
    anthropic_requests  Anthropic's requests → those of `wire`
    rendering           reasoning apart from the answer, tagged, or the text as it was written
    replies             the library's events and replies → what clients read
    completion_replies  the same of plain completions
    anthropic_replies   the same as Anthropic's blocks
    metrics             what happened, in Prometheus' text
    service             the model behind it all: streams that share what was read
    delivery            a job answered whole or as it comes, while the client is there
    safety              which requests are let in, and how large
    web                 the page and its policy
    app                 the routes
    connection          one client's line, and how long it may keep silent
    host                a socket, uvicorn, and an end without loose ends

Each imports only what stands above it. Needs the extra `server`; only the command `serve`
imports this folder.
"""
