"""Words: answers and tool calls constrained by a grammar. Never imports mlx; needs the extra `structured`.

    grammar      which ids may come next (llguidance)
    constraint   a grammar for the answer alone
    callgrammar  forced tool calls
    shape        a schema → a grammar; an answer → its value

Each imports only what stands above it.
"""
