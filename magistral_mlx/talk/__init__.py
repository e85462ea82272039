"""Replies as they are generated, and conversations. `magistral_mlx.chat` connects these with the decoder.

    worker        the thread that owns the arrays
    step          one step there, and its cost
    guard         whether a load or a reply fits into memory
    options       the options of one reply
    reply         one reply, complete or in progress
    preparation   options → a reply's builder, and the decoder's request
    notebook      a stream shown in Jupyter
    stream        one reply as an iterator of events
    continuous    continuous batching
    answers       the most common answer of several replies
    talkfile      text and tensors in one file, with a checksum
    saving        a conversation as text and tensors, and back
    conversation  message history, and the KV cache kept for it
    wrapping      word wrapping of streamed text
    display       a stream shown in a terminal

Each imports only what stands above it.
"""
