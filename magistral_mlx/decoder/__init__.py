"""Arrays: ids in, ids out. The decoder, its KV cache, sampling and speculation; no text, no files.

    matrix       one weight, dense or packed
    cache        keys and values of a layer: grow, trim, fork, quantize
    model        the decoder, in one screenful
    sampling     logits → id: temperature, then the nucleus, with noise keyed by (seed, position)
    logprobs     how likely an id was
    drawing      one draw, from which ids
    engine       prefill and decode
    batch        several sequences a pass, each as if it were alone
    prefix       what was read, by id
    drafts       who guesses the next ids
    pace         how many guesses pay, by the clock
    speculation  decode, several ids a pass
    prefixes     what prompts have read, kept for others
    generation   one reply behind a prefix

Each imports only what stands above it.
"""
