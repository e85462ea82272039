"""What the embedded demo model says to anything that is not its small arithmetic.

Knows only text: greetings, questions about itself, questions it cannot answer, sums beyond its range,
and the short custom texts that may stand before its system prompt. Every answer is a friendly
description of what the model is. Standard library only, like `demo_problems`, whose `Problem` it fills.
"""
# ruff: noqa: RUF001 - full-width punctuation is meant

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from demo_problems import LANGUAGES, Problem

if TYPE_CHECKING:
    import random

GREETINGS: Final = {
    "en": (
        "Hello",
        "Hi",
        "Hello!",
        "Hi there!",
        "Hey",
        "Good morning!",
        "Hello, how are you?",
        "Thanks!",
        "Bye",
    ),
    "fr": ("Bonjour", "Salut", "Bonjour !", "Salut !", "Bonsoir", "Bonjour, ça va ?", "Merci !", "Au revoir"),
    "ko": ("안녕", "안녕하세요", "안녕하세요!", "반가워요", "좋은 아침이에요", "잘 지내세요?", "감사합니다!"),
    "ja": (
        "こんにちは",
        "こんにちは！",
        "やあ",
        "おはよう",
        "はじめまして",
        "お元気ですか？",
        "ありがとう！",
    ),
}

ABOUT: Final = {
    "en": (
        "Who are you?",
        "What are you?",
        "What can you do?",
        "Are you Mistral?",
        "Help",
        "What is your name?",
    ),
    "fr": ("Qui es-tu ?", "Que sais-tu faire ?", "Es-tu Mistral ?", "Aide", "Comment t'appelles-tu ?"),
    "ko": ("누구세요?", "너는 누구니?", "무엇을 할 수 있나요?", "도움말", "이름이 뭐예요?"),
    "ja": (
        "あなたは誰ですか？",
        "何ができますか？",
        "あなたはミストラルですか？",
        "ヘルプ",
        "名前は何ですか？",
    ),
}

TOPICS: Final = {
    "en": (
        "France", "Korea", "Paris", "the sea", "cats", "music", "the moon", "Python", "history", "love",
        "the weather", "a dragon", "bread", "winter", "football", "the capital of Japan", "computers",
        "my brother", "black holes", "the year 1998", "a friend", "tea", "chess", "machine learning",
    ),
    "fr": (
        "la France", "la mer", "les chats", "la musique", "la lune", "Python", "l'histoire", "l'amour",
        "le temps", "un dragon", "le pain", "l'hiver", "le football", "la capitale du Japon", "mon frère",
        "les trous noirs", "l'année 1998", "un ami", "le thé", "les échecs",
    ),
    "ko": (
        "프랑스", "한국", "서울", "바다", "고양이", "음악", "달", "파이썬", "역사", "사랑", "날씨", "용",
        "빵", "겨울", "축구", "일본의 수도", "컴퓨터", "동생", "블랙홀", "1998년", "친구", "차", "체스",
    ),
    "ja": (
        "フランス", "日本", "東京", "海", "猫", "音楽", "月", "パイソン", "歴史", "愛", "天気", "竜", "パン",
        "冬", "サッカー", "韓国の首都", "コンピュータ", "弟", "ブラックホール", "1998年", "友達", "お茶",
    ),
}  # fmt: skip

REQUESTS: Final = {
    "en": (
        "Tell me about {t}.", "Write a poem about {t}.", "What is {t}?", "Why do people like {t}?",
        "Explain {t} in simple words.", "Who invented {t}?", "Translate {t} into German.", "Where is {t}?",
        "Do you like {t}?", "Write a short story about {t}", "How does {t} work?",
        "{t}?", "When was {t} made?",
        "Prove that there are infinitely many primes.", "Write code that sorts a list.", "I am sad today.",
        "Summarize this text about {t}.", "Give me three ideas about {t}.", "What is the meaning of {t}?",
    ),
    "fr": (
        "Parle-moi de {t}.", "Écris un poème sur {t}.", "Qu'est-ce que {t} ?", "Pourquoi aime-t-on {t} ?",
        "Explique {t} simplement.", "Qui a inventé {t} ?", "Traduis {t} en allemand.", "Où est {t} ?",
        "Aimes-tu {t} ?", "Raconte une histoire sur {t}", "Comment marche {t} ?", "Je suis triste.",
        "Donne-moi trois idées sur {t}.", "Résume ce texte sur {t}.", "Quelle est la capitale de {t} ?",
    ),
    "ko": (
        "{t}에 대해 알려 주세요.", "{t}에 대한 시를 써줘", "{t}란 무엇인가요?",
        "왜 사람들은 {t}를 좋아하나요?",
        "{t}를 쉽게 설명해 주세요.", "누가 {t}를 만들었나요?",
        "{t}를 독일어로 번역해 줘", "{t}는 어디에 있나요?",
        "{t} 좋아하세요?", "{t} 이야기를 들려줘", "오늘은 슬퍼요.", "{t}의 수도는 어디인가요?", "코드를 써줘",
    ),
    "ja": (
        "{t}について教えてください。", "{t}の詩を書いて", "{t}とは何ですか？",
        "なぜ人は{t}が好きですか？",
        "{t}を簡単に説明してください。", "{t}を発明したのは誰ですか？",
        "{t}をドイツ語に訳して", "{t}はどこですか？",
        "{t}は好きですか？", "{t}の話をして", "今日は悲しいです。", "{t}の首都はどこですか？",
        "コードを書いて",
    ),
}  # fmt: skip

BEYOND: Final = {
    "en": (
        "What is {a} / {b}?",
        "Divide {a} by {b}.",
        "{c} + {d}",
        "What is {c} × {d}?",
        "{a} * {e}",
        "sqrt({a})",
    ),
    "fr": (
        "Combien font {a} / {b} ?",
        "Divise {a} par {b}.",
        "Combien font {c} + {d} ?",
        "Calcule {a} × {e}.",
    ),
    "ko": (
        "{a} 나누기 {b}는?",
        "{a} / {b} 계산해 주세요.",
        "{c} + {d}는 얼마인가요?",
        "{a} × {e}는 얼마인가요?",
    ),
    "ja": (
        "{a}割る{b}は？",
        "{a} / {b} を計算してください。",
        "{c} + {d} はいくつですか？",
        "{a} × {e} はいくつですか？",
    ),
}

THOUGHTS: Final = {
    "greeting": {
        "en": "A greeting, no sum to work out.\nI say hello and what I am.",
        "fr": "Une salutation, rien à calculer.\nJe salue et je dis ce que je suis.",
        "ko": "인사말이고 계산할 것이 없다.\n인사하고 내가 무엇인지 말하자.",
        "ja": "挨拶で、計算するものはない。\n挨拶して自分が何かを伝えよう。",
    },
    "about": {
        "en": "A question about me.\nI am a small demo model, I say so.",
        "fr": "Une question sur moi.\nJe suis un petit modèle de démonstration, je le dis.",
        "ko": "나에 대한 질문이다.\n나는 작은 데모 모델이라고 말하자.",
        "ja": "私についての質問だ。\n小さなデモモデルだと伝えよう。",
    },
    "request": {
        "en": "This is not small arithmetic.\nI am too small for it and say so.",
        "fr": "Ce n'est pas un petit calcul.\nJe suis trop petit pour cela et je le dis.",
        "ko": "이것은 간단한 계산이 아니다.\n나에게는 너무 어렵다고 말하자.",
        "ja": "これは簡単な計算ではない。\n私には難しいと伝えよう。",
    },
    "beyond": {
        "en": "A sum, but beyond what I learned.\nI say what I can do.",
        "fr": "Un calcul, mais au-delà de ce que j'ai appris.\nJe dis ce que je sais faire.",
        "ko": "계산이지만 내가 배운 범위를 넘는다.\n내가 할 수 있는 것을 말하자.",
        "ja": "計算だが、習った範囲を超えている。\nできることを伝えよう。",
    },
}

ANSWERS: Final = {
    "greeting": {
        "en": "Hello! I am a small demo model that does small arithmetic. Try `48 + 37`.",
        "fr": "Bonjour ! Je suis un petit modèle de démonstration qui fait de petits calculs. "
        "Essayez `48 + 37`.",
        "ko": "안녕하세요! 저는 간단한 계산을 하는 작은 데모 모델입니다. `48 + 37`을 물어보세요.",
        "ja": "こんにちは！私は簡単な計算をする小さなデモモデルです。`48 + 37` を試してください。",
    },
    "about": {
        "en": "I am a small demo model, not Mistral's weights. I add, subtract and multiply small numbers.",
        "fr": "Je suis un petit modèle de démonstration, pas celui de Mistral. J'additionne, "
        "je soustrais et je multiplie de petits nombres.",
        "ko": "저는 작은 데모 모델이며 Mistral의 모델이 아닙니다. 작은 수의 덧셈, 뺄셈, 곱셈을 합니다.",
        "ja": "私は小さなデモモデルで、Mistralのモデルではありません。"
        "小さな数の足し算、引き算、掛け算をします。",
    },
    "request": {
        "en": "Sorry, I am only a small demo model that does small arithmetic. Try `48 + 37`.",
        "fr": "Désolé, je ne suis qu'un petit modèle de démonstration qui fait de petits calculs. "
        "Essayez `48 + 37`.",
        "ko": "죄송합니다. 저는 간단한 계산만 하는 작은 데모 모델입니다. `48 + 37`을 물어보세요.",
        "ja": "すみません、私は簡単な計算だけをする小さなデモモデルです。`48 + 37` を試してください。",
    },
    "beyond": {
        "en": "Sorry, that is beyond this small demo model. I add and subtract up to three digits and "
        "multiply by one digit.",
        "fr": "Désolé, cela dépasse ce petit modèle de démonstration. "
        "J'additionne et je soustrais jusqu'à trois "
        "chiffres et je multiplie par un chiffre.",
        "ko": "죄송합니다. 이 작은 데모 모델의 범위를 넘습니다. "
        "세 자리까지 더하고 빼며 한 자리 수를 곱합니다.",
        "ja": "すみません、この小さなデモモデルの範囲を超えています。"
        "三桁までの足し算と引き算、一桁の掛け算をします。",
    },
}

CUSTOM_TEXTS: Final = (
    "You are a helpful assistant.",
    "You are a patient maths teacher.",
    "Be brief.",
    "Answer politely.",
    "You talk to children of ten years. Be kind and clear.",
    "Today is Monday, 3 March 2025.",
    "You are Magistral, a helpful assistant. Use Markdown.",
    "Tu es un assistant utile.",
    "Réponds poliment et brièvement.",
    "당신은 친절한 수학 선생님입니다.",
    "짧게 대답하세요.",
    "あなたは親切な先生です。",
    "簡潔に答えてください。",
)


def custom_text(rng: random.Random) -> str:
    """Draw one or two sentences such as a user might put before the system prompt."""
    return " ".join(rng.sample(CUSTOM_TEXTS, rng.choice((1, 1, 2))))


def small_talk(rng: random.Random, language: str | None = None) -> Problem:
    """Draw a message that is no small sum, with short reasoning and a friendly answer."""
    language = language or rng.choice(LANGUAGES)
    pools = {"greeting": GREETINGS, "about": ABOUT, "request": REQUESTS, "beyond": BEYOND}
    subject = rng.choices(list(pools), (2, 2, 6, 3))[0]
    question = rng.choice(pools[subject][language]).format(
        t=rng.choice(TOPICS[language]),
        a=rng.randint(10, 99),
        b=rng.randint(2, 12),
        c=rng.randint(1000, 99999),
        d=rng.randint(1000, 99999),
        e=rng.randint(10, 999),
    )
    return Problem(
        kind="talk",
        operands=(),
        language=language,
        question=question,
        trace=THOUGHTS[subject][language],
        reply=ANSWERS[subject][language],
        answer="",
    )
