"""Valid tekken.json files: small ones for speed, and the full vocabulary that mistral_common ships.

`full_tekken` reproduces the published ids of the Mistral Small 3.1 family: the first 130072 pieces of
tekken_240718.json after 1000 control ids, which is what a real v7, v11 or v13 file holds.
"""

import base64
import json
from functools import cache
from pathlib import Path

VERSIONS = ("v7", "v11", "v13")
CONTROLS = 1000
_NAMED = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    *(f"<SPECIAL_{rank}>" for rank in range(20, 32)),
    *("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
_N_NAMED = {"v7": 20, "v11": 34, "v13": 36}
# Pieces that merge across the edges of both tags, as in the real vocabulary.
_MERGES = (
    *("th", "in", "ink", "<th", "think", "</", ".</", ")</", ">\n", ">\n\n", "\n\n", ">The", " The"),
    *("한", "STOP"),
)


def tiny_tekken(directory: Path, version: str) -> Path:
    """A tekken.json of 256 bytes and a few merges, after 1000 control ids."""
    pieces = [bytes([byte]) for byte in range(256)] + [text.encode() for text in _MERGES]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    return _write(directory, version, vocab, _shipped()["config"]["pattern"])


def full_tekken(directory: Path, version: str) -> Path:
    """A tekken.json with the real 131072 ids; opening it takes one to two seconds."""
    shipped = _shipped()
    return _write(directory, version, shipped["vocab"][: 131072 - CONTROLS], shipped["config"]["pattern"])


def published_tekken(directory: Path, version: str) -> Path:
    """The same ids in a file as long as published ones: 150000 pieces, of which the first 130072 count."""
    shipped = _shipped()
    file = _write(directory, version, shipped["vocab"], shipped["config"]["pattern"])
    content = json.loads(file.read_text(encoding="utf-8"))
    content["config"]["default_vocab_size"] = 131072
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return file


@cache
def _shipped() -> dict:
    import mistral_common  # noqa: PLC0415 -- a second to import

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _write(directory: Path, version: str, vocab: list[dict], pattern: str) -> Path:
    config = {
        "pattern": pattern,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + CONTROLS,
        "default_num_special_tokens": CONTROLS,
        "version": version,
    }
    named = [
        {"rank": rank, "token_str": name, "is_control": True}
        for rank, name in enumerate(_NAMED[: _N_NAMED[version]])
    ]
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": named}), encoding="utf-8")
    return file


LANGUAGES = {
    "English": "What is 48 + 37? Carry the one: it's 85.",
    "French": "Combien font 48 + 37 ? L’été où j’ai compté, ça faisait déjà 85.",
    "German": "Wie viel ist 48 + 37? Größer als 80, nämlich fünfundachtzig – überprüfe es.",
    "Greek": "Πόσο κάνει 48 + 37; Το άθροισμα είναι 85, όπως δείχνει ο υπολογισμός.",
    "Hindi": "48 + 37 कितना होता है? इकाई का अंक ५ है, इसलिए उत्तर ८५ है।",
    "Indonesian": "Berapakah 48 + 37? Simpan satu, lalu jumlahkan puluhannya: 85.",
    "Italian": "Quanto fa 48 + 37? Perché c’è il riporto, la somma è 85.",
    "Japanese": "48たす37はいくつですか。繰り上がりに注意すると、答えは「85」です。",
    "Korean": "48 더하기 37은 얼마인가요? 받아올림을 하면 답은 85입니다. 꿟뛝뷁",
    "Malay": "Berapakah jumlah 48 + 37? Bawa satu ke tempat puluh, jawapannya 85.",
    "Nepali": "४८ + ३७ कति हुन्छ? हातलागी एक जोड्दा उत्तर ८५ आउँछ।",
    "Polish": "Ile to jest 48 + 37? Źdźbło uwagi: przeniesienie daje osiemdziesiąt pięć.",
    "Portuguese": "Quanto é 48 + 37? A adição não é difícil: são 85, já com o vai-um.",
    "Romanian": "Cât fac 48 + 37? Ținând cont de transport, suma este 85, așa că gata.",
    "Russian": "Сколько будет 48 + 37? Единицу держим в уме, ответ — 85. Ещё объяснить?",
    "Serbian": "Колико је 48 + 37? Памтимо један, па је збир 85. Љубав, њива, џеп; čćšđž.",
    "Spanish": "¿Cuánto es 48 + 37? El año pasado aprendí la suma: ¡son 85!",
    "Swedish": "Vad är 48 + 37? Överföringen ger åttiofem, alltså 85.",
    "Turkish": "48 + 37 kaç eder? Eldeki biri eklersek İstanbul’da da ığdır’da da sonuç 85.",
    "Ukrainian": "Скільки буде 48 + 37? Ґрунтовно порахуймо: їх сума дорівнює 85, є відповідь.",
    "Vietnamese": "48 + 37 bằng bao nhiêu? Nhớ một sang hàng chục, được kết quả là tám mươi lăm.",
    "Arabic": "كم يساوي ٤٨ + ٣٧؟ نحمل واحدًا إلى خانة العشرات، فيكون الجوابُ ٨٥.",
    "Bengali": "৪৮ + ৩৭ কত হয়? হাতে এক রেখে যোগ করলে উত্তর হয় ৮৫।",
    "Chinese": "48加37等于多少？个位进一，所以答案是八十五。龘靐齉",
    "Farsi": "۴۸ + ۳۷ چند می‌شود؟ یک را به دهگان می‌بریم، پس پاسخ ۸۵ است.",
}
"""A sentence in each language of the model card, with letters particular to it."""
