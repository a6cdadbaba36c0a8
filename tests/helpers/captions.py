"""Captions in several scripts, the same in every process."""

import numpy as np

WORDS = """
    a the red green cat dog house runs Straße Müßiggang größer кошка собака дом бежит 犬が走る 猫 家 赤い家と緑の犬
    สุนัขวิ่ง แมว बिल्ली कुत्ता घर القط كلب e\u0301te\u0301 \uff26\uff55ll \ufb01sh naïve 2,5 don't x² 🐈 👩\u200d🚀
"""


def captions(count: int = 600) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS.split(), size=random.integers(2, 9))) for _ in range(count)]
