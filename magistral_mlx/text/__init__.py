"""Words: messages → ids, ids → typed events. Never imports mlx.

    thinking      <think>…</think> in text that comes in pieces
    tools         definitions, calls, results from outside
    prompt        messages, checked; the model cards' prompts
    toolcalls     control tokens and text → calls
    detokenizer   ids → text, character by character
    tokenizer     messages → ids (mistral_common)
    hf_tokenizer  tekken.json → tokenizer.json
    sidecars      the files beside converted weights
    transcript    ids → typed events
    loops         endless repetition, detected
    closing       when reasoning is closed early

Each imports only what stands above it.
"""
