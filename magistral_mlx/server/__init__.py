"""The local server: OpenAI's and Anthropic's HTTP APIs for one loaded model.

    wire                request bodies of OpenAI's API, validated
    anthropic_wire      request bodies of Anthropic's API, validated
    slots               admission: which requests run now, wait, or are refused
    failures            errors in the formats of OpenAI's and Anthropic's APIs
    requests            OpenAI's requests → messages, prompts and options of the library
    anthropic_requests  Anthropic's requests → OpenAI's (`wire`)
    rendering           events → text: reasoning separate, in tags, or raw
    replies             chat completions in OpenAI's format, and what all encoders share
    completion_replies  plain completions in OpenAI's format
    anthropic_replies   messages in Anthropic's format
    metrics             counters and gauges for Prometheus
    service             the model behind the routes: batched streams that reuse prefixes
    delivery            runs a job and sends its reply, whole or streamed, while the client is connected
    safety              which requests are accepted, and how large
    web                 the page and its content security policy
    app                 the routes
    connection          one client connection and its timeouts
    host                the socket, uvicorn, and graceful shutdown

Each imports only modules above it. Needs the extra `server`; only the command `serve`
imports this folder.
"""
