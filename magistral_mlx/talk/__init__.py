"""Replies as they grow, and conversations. `magistral_mlx.chat` puts these and the decoder together.

    worker        the thread that owns the arrays
    step          one step there, and what it took
    guard         does it fit into memory?
    options       what one reply is asked for
    reply         one reply, whole or as it grows
    preparation   options → what a reply's ids will say, and how they are drawn
    notebook      a stream in Jupyter
    stream        one reply as it is written
    continuous    replies that take their steps together
    answers       what several replies agree on
    talkfile      text and tensors under a seal
    saving        a conversation as text and tensors, and back
    conversation  messages that grow
    wrapping      lines as wide as a terminal
    display       a stream in a terminal

Each imports only what stands above it.
"""
