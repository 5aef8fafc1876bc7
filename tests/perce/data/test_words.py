"""Words, and which of them are personal."""

import pytest

from perce.data.words import personal_word_spans, words_of


def test_personal_words_come_from_the_persona_and_not_from_the_conversation():
    response = "Tonight Juno and the bees, in 1987, I'm with them."
    spans = personal_word_spans(response, ("I'm with Juno since 1987.", "bees tonight"), "tonight?")
    assert [response[a:b] for a, b in spans] == ["Juno", "bees", "1987"]


def test_a_name_in_the_possessive_is_personal_and_a_contraction_is_not():
    response = "Will's hive, May's tea, and it's here: what's new, you'd say."
    spans = personal_word_spans(response, (response,), "")
    assert [response[a:b] for a, b in spans] == ["Will's", "hive", "May's", "tea"]


def test_contractions_are_as_common_as_their_words():
    response = "I don’t, can't, won’t and isn't: there's my mother’s bees, we’re here, I'll go, ain't I?"
    spans = personal_word_spans(response, (response.replace("’", "'"),), "")
    assert [response[a:b] for a, b in spans] == ["mother’s", "bees"]


@pytest.mark.parametrize(
    ("persona", "response", "personal"),
    [
        ("我养蜜蜂，住在奥斯陆。", "我今晚要去照顾蜜蜂。", ["蜜蜂"]),
        ("我喜欢养蜂", "你喜欢什么？", []),
        ("蜜蜂を飼っています。ロボットも。", "今夜は蜜蜂の世話です。ロボットです。", ["蜜蜂", "ロボ", "ボッ", "ット"]),
        ("ผมเลี้ยงผึ้ง", "คืนนี้ดูแลผึ้ง", ["ผึ้ง"]),
        ("मैं मधुमक्खियाँ पालता हूँ", "आज मधुमक्खियाँ देखूँगा", ["मधुमक्खियाँ"]),
        ("Ich war in Zu\u0308rich.", "Zürich, natürlich.", ["Zürich"]),
        ("Ich war in Zürich.", "In Zu\u0308rich!", ["Zu\u0308rich"]),
    ],
)
def test_personal_words_of_any_script(persona, response, personal):
    assert [response[a:b] for a, b in personal_word_spans(response, (persona,), "")] == personal


def test_the_words_of_a_persona_are_those_of_its_letters():
    """Upper or lower case, both kinds of apostrophes, and other alphabets give the same words."""
    for word in ("Juno's", "JUNO’S", "Zürich", "ΟΔΟΣ", "İzmir", "it's_Juno", "x2", "1987", "isn't''t"):
        text = f"{word}, and Oslo-{word}."
        assert words_of(text) == words_of(f"{text} é") - {"é"}, "ASCII alone is read by another pattern"
    assert words_of("Juno's") == words_of("JUNO’S") == {"juno's"}
