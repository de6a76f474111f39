"""Texts on which tokenizers tend to disagree."""

PROBES = [
    "a", " ", "  ", "Hello world", " Hello world", "Hello  world   with    runs", "\n", "\n\n\n", "a\nb\r\nc\td",
    "\t\ttabs", "I'm you're THEY'LL don't 'S 'd", "1234567890", "3.14159 2,718,281 1e-9",
    "0x1F 0b101 12345678901234567890", "café naïve Ångström", "e\u0301 combining a\u0308\u0323", "Привет, мир",
    "γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界", "こんにちは世界",
    "안녕하세요 세계", "😀 😃👍🏽👨‍👩‍👧‍👦", "🇩🇪🇫🇷 flags", "def f(x):\n    return x**2  # square\n",
    "if (a && b || !c) { x += 1; }",
    '<html><body class="x">hi</body></html>', '{"key": [1, 2, {"n": null}]}', "SELECT * FROM t WHERE a='b';",
    "https://example.com/a?b=c&d=%20e", "user@example.com", "C:\\Users\\me\\file.txt", "/usr/local/bin/*.py",
    "$x^2 + y^2 = z^2$", "∑_{i=0}^{n} αβγ ≤ ∞ ≠ ±", "—–-‐ “quotes” ‘single’ …", "trailing space ", "   leading",
    "a" * 100, "ab " * 40, "MiXeD cAsE WORDS", "snake_case camelCase kebab-case", "ALLCAPS",
    "Once upon a time, there was a little girl named Lily.", 'She was very happy. "Mom," said Tim.',
    "\u00a0nbsp\u2003em\u3000ideographic", "\u200bzero\u200dwidth", "\ufeffbom", "½ ² ③ Ⅷ ٣", "ﬁ ligature ﬀ",
    "<s>special</s>", "<|im_start|>user\nhi<|im_end|>\n", "[INST] hi [/INST]", "<unk><pad>", "<0x0A> <0xFF>",
    "▁under▁score", "a\u0000b", "\x7f\x1b[31m", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒮𝒸𝓇𝒾𝓅𝓉", "한글 and 日本語 mixed with English 123",
    "x\u2028y\u2029z", "don't won't can't shouldn't've", "Dr. Smith's No. 1,000.50 (approx.)", "!!!???...,,,;;;",
    "# Heading\n\n- item 1\n- item 2\n\n```py\nprint('x')\n```\n", "\n \n  \n   x", "end\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "<|endoftext|>\n\n",
    "<|user|>\nhello<|end|>\n<|assistant|>\n", "Æther ǅ ǈ ß ẞ ı İ", "٣٤٥ ४५६ 一二三", "a1b2c3 4d5e6f", "x = 'it''s'",
]  # fmt: skip
