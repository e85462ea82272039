"""Token ids in, token ids out: decoder, KV cache, sampling and speculation; no text, no files.

    matrix       one weight matrix, dense or quantized
    cache        KV cache of a layer: grow, trim, fork, quantize
    model        the decoder, in one screenful
    sampling     logits → id: temperature, then the nucleus, with noise keyed by (seed, position)
    logprobs     log-probabilities of sampled ids
    drawing      one sampling step: mask, penalty, scores
    engine       prefill and decode
    batch        several sequences per pass, each with the ids it would have alone
    prefix       KV caches with the ids they hold, for prefix reuse
    drafts       draft tokens: prompt look-up or a draft model
    pace         how many drafts pay off, by measured time
    speculation  speculative decoding: several ids per pass
    prefixes     a pool of prefixes of earlier prompts
    generation   one reply: prefill behind a prefix, then decode

Each imports only what stands above it.
"""
