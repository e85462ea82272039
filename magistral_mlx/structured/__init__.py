"""Structured output: answers and tool calls constrained by a grammar. Never imports mlx.

Needs the extra `structured`.

    grammar      which ids may come next (llguidance)
    constraint   applies a grammar to the answer, leaving the reasoning free
    callgrammar  tool calls as a grammar
    shape        a schema → a grammar; an answer → its value

Each imports only what stands above it.
"""
