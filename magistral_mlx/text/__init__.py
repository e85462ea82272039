"""Text: messages → token ids, token ids → typed events. Never imports mlx.

    thinking      <think>…</think> in streamed text
    tools         tool definitions and calls from the caller, validated
    prompt        messages, checked; the model cards' prompts
    toolcalls     control tokens and text → calls
    detokenizer   ids → text, incrementally
    tokenizer     messages → ids (mistral_common)
    hf_tokenizer  tekken.json → tokenizer.json
    sidecars      the files beside converted weights
    transcript    ids → typed events
    loops         detection of endless repetition
    closing       when to close the reasoning early

Each imports only what stands above it.
"""
