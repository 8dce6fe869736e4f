"""The language of a response: found in prose, not guessed at in formulas."""

import pytest

from potstill.core.errors import RecipeError
from potstill.select.language import LanguageDetector

TEXTS = {
    "en": "First we add the two numbers, then we multiply the sum by four and write the result down.",
    "de": "Zuerst addieren wir die beiden Zahlen, dann multiplizieren wir die Summe mit vier.",
    "fr": "D'abord, nous additionnons les deux nombres, puis nous multiplions la somme par quatre.",
    "es": "Primero sumamos los dos números, luego multiplicamos la suma por cuatro y la anotamos.",
    "ru": "Сначала мы складываем два числа, затем умножаем сумму на четыре и записываем результат.",
    "zh": "首先我们把这两个数字相加，然后把总和乘以四，最后写下结果。再检查一遍所有步骤，就得到正确的答案。",
    "ja": "まず二つの数を足してから、その合計に四を掛けて、結果を書き留めます。その後でもう一度確認します。",
    "ar": "أولا نجمع العددين ثم نضرب المجموع في أربعة ونكتب النتيجة في النهاية كما هو مطلوب.",
    "hi": "पहले हम दोनों संख्याओं को जोड़ते हैं, फिर योग को चार से गुणा करते हैं और परिणाम लिखते हैं।",
}
FORMULA = (
    "\\[ x^2 + \\frac{a}{b} \\] so $y = \\text{sin}(z)$ and `print(result)`\n"
    "```python\nfor word in words:\n    print(word)\n```\n"
)


@pytest.fixture(scope="module")
def english() -> LanguageDetector:
    return LanguageDetector(["en"])


class TestForeign:
    @pytest.mark.parametrize("language", TEXTS)
    def test_prose_in_a_wanted_language_stays(self, language: str) -> None:
        assert (
            LanguageDetector([language], [one for one in TEXTS if one != language]).foreign(TEXTS[language])
            is None
        )

    @pytest.mark.parametrize("language", [one for one in TEXTS if one != "en"])
    def test_prose_in_another_is_named(self, english: LanguageDetector, language: str) -> None:
        found = english.foreign(TEXTS[language])
        assert found is not None
        assert found[0] == language
        assert found[1] > 0.5

    def test_several_languages_may_be_wanted(self) -> None:
        detector = LanguageDetector(["en", "ru"])
        assert detector.foreign(TEXTS["en"]) is None
        assert detector.foreign(TEXTS["ru"]) is None
        assert detector.foreign(TEXTS["de"]) is not None

    def test_two_detectors_keep_their_languages_apart(self) -> None:
        german = LanguageDetector(["de"], ["fr"])
        LanguageDetector(["en"], ["ru"])
        found = german.foreign(TEXTS["fr"])
        assert found is not None
        assert found[0] == "fr"

    @pytest.mark.parametrize(
        "text", ["", "42", "x = 1", FORMULA, "https://example.org/ganz/langer/weg/zum/ziel " * 4]
    )
    def test_what_holds_no_prose_is_not_judged(self, english: LanguageDetector, text: str) -> None:
        assert english.foreign(text) is None

    def test_formulas_and_code_do_not_hide_the_language(self, english: LanguageDetector) -> None:
        assert english.foreign(FORMULA * 3 + TEXTS["de"]) is not None
        assert english.foreign(FORMULA * 3 + TEXTS["en"]) is None

    @pytest.mark.parametrize("place", ["start", "middle", "end"])
    def test_a_change_of_language_within_a_long_text_is_seen(
        self, english: LanguageDetector, place: str
    ) -> None:
        half, part = (TEXTS["en"] + " ") * 60, (TEXTS["zh"] + " ") * 60
        texts = {"start": part + half + half, "middle": half + part + half, "end": half + half + part}
        found = english.foreign(texts[place])
        assert found is not None
        assert found[0] == "zh"
        assert english.foreign(half * 3) is None

    @pytest.mark.parametrize(
        "text", ["\\[" * 30_000, "`" * 60_001, "$ " * 30_000, "```" * 20_000, "<a" * 30_000]
    )
    def test_no_text_is_slow(self, english: LanguageDetector, text: str) -> None:
        english.foreign(text)


class TestCodes:
    @pytest.mark.parametrize(("code", "meant"), [("eng", "en"), ("russian", "ru"), ("EN", None)])
    def test_an_unknown_code_is_refused_with_the_known_ones(self, code: str, meant: str | None) -> None:
        with pytest.raises(RecipeError, match=f"does not know '{code}'") as caught:
            LanguageDetector(["en", code])
        assert "de, " in str(caught.value)
        assert meant is None or f"perhaps '{meant}'" in str(caught.value)
