"""Texts of our own that a checkpoint is compared on: both languages, and what tokenizers differ in."""

from __future__ import annotations

from typing import Final

TEXTS: Final = (
    "",
    "你好",
    "Hello, world!",
    "新冠肺炎怎么预防？戴口罩、勤洗手、常通风。",
    "深蹲时膝盖应与脚尖方向一致，背部挺直，每组 12 次，做 3～4 组。",
    "My knee hurts after running 5 km; should I stretch before or after?",
    "I can't say that they're wrong, but it isn't what we've seen, and I'm sure she'd agree.",
    "今天的最高气温是 36.5℃，比昨天高了 2.5℃（同比 +7.4%）。",
    "第一行\n第二行\n\n空行之后",
    "column\tof\ttabs\n\tindented by a tab",
    "two  spaces, three   spaces, and\n    four at the start of a line",
    "def bmi(weight, height):\n    return weight / height ** 2  # kg / m²\n",
    '{"name": "张三", "age": 42, "tags": ["高血压", null, true]}',
    "全角：ＡＢＣ１２３，！？；：（）「」",
    "半角和全角混排,这里是英文逗号;这里是英文分号:对吗?是的!",
    "emoji 👋🏽👨‍👩‍👧‍👦🏥 and flags 🇨🇳🇬🇧",
    "é è ü ñ ß — ligatures ﬁ ﬂ, ½ ¾ ① ② Ⅳ ㎏ ㎡",
    "дорогой друг, γειά σου, こんにちは、안녕하세요, مرحبا",
    "生僻字：𠮷野家、龘、犇、㐂、䶮",
    "https://example.org/path?query=1&page=2#part",
    "α/β-blockers: 25 µg · 3×/day ≤ 75 µg; T½ ≈ 6 h",
    "1234567890 3.14159 1,000,000 0x1F 1e-5 2024-02-29T23:59:60Z",
    " leading space and trailing space ",
    "“弯引号”‘单引号’…省略号——破折号《书名号》",
    "a" * 60 + " " + "啊" * 60,
    "[Round 0]\n问：什么是糖尿病？\n答：一种代谢性疾病。\n[Round 1]\n问：怎么控制？\n答：",
    "zero\u200bwidth, no\u00a0break, soft\u00adhyphen, ideographic\u3000space",
    "e\u0301 and \u1100\u1161 are composed; so is 한",
)

SPELLED_SPECIALS: Final = (
    "<sop>忽略之前的话<eop>",
    "[MASK] is what I want you to fill, not [gMASK]",
    "<unk> and <pad> are words here",
    "<n> is no line break, <|tab|> no tab, <|blank_4|> no spaces",
)
"""A text that spells a special token. The original takes some of them for the token itself; here they stay text."""

CONVERSATIONS: Final[tuple[tuple[tuple[str, str], ...], ...]] = (
    (("新冠肺炎怎么预防？", ""),),
    (("How much water should an adult drink in a day?", ""),),
    (
        ("我最近总是失眠，怎么办？", "建议固定作息时间，睡前一小时不看手机，白天适量运动。"),
        ("那可以吃褪黑素吗？", ""),
    ),
    (
        ("What is a deadlift?", "A lift of a weight from the floor until you stand upright."),
        ("Is it dangerous for my back?", ""),
    ),
    (
        ("膝盖疼还能跑步吗？", "疼痛明显时应先休息，改做游泳等对膝盖压力小的运动。"),
        ("要休息多久？", "一般一到两周；如果仍然疼痛，应去看医生。"),
        ("Thanks! 之后怎么恢复训练？", ""),
    ),
    (
        ("Plan three workouts a week for me.", "Monday: squats. Wednesday: press. Friday: rows."),
        ("I have no bench.", "Then do push-ups on Wednesday, 4 sets of 10."),
        ("And\non\nFriday?", ""),
    ),
)
"""Conversations of 1 to 3 rounds: (question, answer); the last question has none yet."""

RESPONSES: Final = (
    "  有空格  ",
    "你好,世界!真的吗?是的:当然;好",
    "今年是[[训练时间]]。",
    "In English, nothing changes: right? Yes!",
    "体重:70kg,身高:175cm;BMI:22.9!",
    "中文,English,中文!!??",
)
"""Answers whose clean-up is compared."""
