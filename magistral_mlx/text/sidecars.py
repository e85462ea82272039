"""The files of a converted directory besides its weights, as a mapping of relative paths to bytes.

Three readers need different files: magistral_mlx reads tekken.json and SYSTEM_PROMPT.txt, in `mistral/`;
mlx-lm, LM Studio and transformers read tokenizer.json, its config and the chat template, in the root; a
person reads README.md. The root holds no tekken.json: beside a tokenizer.json it makes mlx-lm choose a
detokenizer that breaks multi-byte text.

Knows which files each reader needs, and the text of the model card. Does not know weights, config.json or
where anything is written: `convert` does.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magistral_mlx.errors import MagistralWarning

from .hf_tokenizer import Vocabulary, tokenizer_json
from .tokenizer import ORIGINAL, Tokenizer, find_text_file

_DEMO = Path(__file__).parents[1] / "demo"
_DEMO_SOURCE = (
    "a few million weights that magistral_mlx trained on small arithmetic, to have something to try itself "
    "on. It is **not** one of Mistral's models and knows nothing else"
)
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_HF_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json"),
)
_CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, mistral, reasoning]
{header}---

# {title}

- Source: {source}.
- Conversion: {recipe}, by magistral_mlx.{size}
- Licence: {licence}.

With magistral_mlx, which streams the reasoning and the answer apart:

```python
from magistral_mlx import Magistral

reply = Magistral.load("path/to/this/directory").ask("What is 48 + 37?")
print(reply.thinking, reply.answer, sep="\\n\\n")
```

With mlx-lm, on whose format LM Studio builds too:

```sh
mlx_lm.generate --model path/to/this/directory --temp 0.7 --top-p 0.95 --max-tokens 40960 \\
  --prompt "What is 48 + 37?"
```

A system prompt makes the model think. The chat template brings it along, unless a conversation has a system
message of its own: that one needs the template of the thinking process in `mistral/SYSTEM_PROMPT.txt` too,
or the model answers without reasoning.
"""


def files(source: Path, *, name: str, recipe: str, context: int, size: str = "") -> dict[str, bytes]:
    """All sidecars of a conversion.

    `source` is the directory with tekken.json and SYSTEM_PROMPT.txt, in its root or in `mistral/`; without
    a prompt, the model card's text is used, as in loading. `name` is what the user calls the source: a Hub
    name, a directory or "demo". `recipe` says how it was quantized, `context` is its longest context in
    tokens, `size` what the weights take.

    A source without tekken.json keeps the tokenizer files it has, and a `MagistralWarning` says so: mlx-lm
    can use them, while magistral_mlx needs the tekken.json.

    Raises:
        TokenizerError: tekken.json is unreadable, or of a version without Magistral's template.
    """
    demo = name == "demo" or source.resolve() == _DEMO.resolve()
    card = {"README.md": model_card(name, recipe=recipe, demo=demo, size=size).encode()}
    tekken = find_text_file(source, "tekken.json")
    return card | (_copied(source) if tekken is None else _generated(source, tekken, context))


def model_card(name: str, *, recipe: str, demo: bool, size: str = "") -> str:
    """README.md: what this is, its source and conversion, how to use it. It makes no measured claims."""
    size = f"\n- Size: {size}." if size else ""
    repo = name.partition("@")[0]
    on_hub = repo.count("/") == 1 and not repo.startswith((".", "~", "/"))
    apache = demo or "magistral-small" in name.lower()  # of other sources we do not know the licence
    header = "license: apache-2.0\n" if apache else ""
    title, source = f"{Path(repo).name} for MLX", f"`{Path(name).name}`"
    if demo:
        title, source = "The demo model of magistral_mlx", _DEMO_SOURCE
    elif on_hub:
        header += f"base_model: {repo}\n"
        source = f"[{name}](https://huggingface.co/{repo})"
    licence = "Apache-2.0" if apache else "that of the source"
    return _CARD.format(header=header, title=title, source=source, recipe=recipe, size=size, licence=licence)


def chat_template(tokenizer: Tokenizer) -> str:
    """mistral_common's own Jinja template for this version, thinking by default.

    The system prompt is built in, for conversations that have none: it is what makes the model think, and
    readers other than magistral_mlx look for it nowhere else.
    """
    from mistral_common.integrations.chat_templates import chat_templates
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    has_think_tokens = tokenizer.think_ids is not None
    return chat_templates.generate_chat_template(
        spm=False,
        tokenizer_version=TokenizerVersion(tokenizer.version),
        image_support=False,
        audio_support=False,
        thinking_support=has_think_tokens,
        plain_thinking_support=tokenizer.version == "v11" and not has_think_tokens,
        default_system_prompt=tokenizer.system_prompt,
        use_special_token_variables=False,
        model_settings_fields=None,
        reasoning_effort_values=None,
        reasoning_effort_default=None,
    )


def _generated(source: Path, tekken: Path, context: int) -> dict[str, bytes]:
    chat_files = _template_and_prompt(source)  # first: it checks tekken.json, and says what is wrong
    raw = tekken.read_bytes()
    vocabulary = Vocabulary.from_tekken(json.loads(raw))
    return chat_files | {
        "tokenizer.json": _json(tokenizer_json(vocabulary)),
        "tokenizer_config.json": _json(_tokenizer_config(vocabulary.specials, context), indent=2),
        "generation_config.json": _json(_generation_config(vocabulary.specials), indent=2),
        "mistral/tekken.json": raw,
    }


def _template_and_prompt(source: Path) -> dict[str, bytes]:
    """The chat template and the system prompt; the tokenizer they come from is large, and freed on return."""
    tokenizer = Tokenizer.from_directory(source)
    prompt = find_text_file(source, "SYSTEM_PROMPT.txt")
    return {
        "chat_template.jinja": chat_template(tokenizer).encode(),
        "mistral/SYSTEM_PROMPT.txt": prompt.read_bytes() if prompt else tokenizer.system_prompt.encode(),
    }


def _tokenizer_config(specials: Sequence[str], context: int) -> dict[str, Any]:
    return {
        **{role: text for role, text in _ROLES.items() if text in specials},
        "clean_up_tokenization_spaces": False,
        "fix_mistral_regex": False,  # the pattern is right; without this, transformers warns
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _generation_config(specials: Sequence[str]) -> dict[str, Any]:
    ids = {
        f"{role}_id": specials.index(text)
        for role, text in _ROLES.items()
        if text in specials and role != "unk_token"
    }
    return {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.95}


def _copied(source: Path) -> dict[str, bytes]:
    """The tokenizer files of a source without tekken.json, unchanged."""
    copied = {name: (source / name).read_bytes() for name in _HF_FILES if (source / name).is_file()}
    warnings.warn(
        f"Found no tekken.json in {source}: {', '.join(copied) or 'no tokenizer file'} is copied as it is. "
        "magistral_mlx needs tekken.json and SYSTEM_PROMPT.txt in the converted directory's mistral/: "
        f"copy them from the original repository (such as {ORIGINAL}).",
        MagistralWarning,
        stacklevel=3,
    )
    return copied


def _json(content: dict[str, Any], *, indent: int | None = None) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()
