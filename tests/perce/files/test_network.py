"""Whether the Hub can be reached."""

from huggingface_hub.utils import get_session

from perce.files.network import hub_failure


def test_whether_the_hub_can_be_reached_is_asked_once_and_in_seconds(monkeypatch):
    asked = []

    def head(self, url, timeout=None, **_):
        asked.append((url, timeout))
        raise OSError("no route to host\nadvice")

    monkeypatch.setattr(type(get_session()), "head", head)
    hub_failure.cache_clear()
    assert hub_failure() == hub_failure() == "no route to host" and len(asked) == 1 and asked[0][1] <= 10
    hub_failure.cache_clear()
    monkeypatch.setattr(type(get_session()), "head", lambda *_, **__: None)
    assert hub_failure() is None
    hub_failure.cache_clear()
