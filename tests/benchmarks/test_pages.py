"""The measurement of pages: what it makes up, and what it says where there is no browser."""

import pytest

from benchmarks import pages
from tests.helpers.browser import NoBrowser


def test_what_is_made_up_looks_like_scored_responses():
    found = pages.made_up(12)
    assert len(found) == 12 and found == pages.made_up(12)
    assert len({response.user_id for response in found}) == 3 and found[0].persona == found[4].persona
    for response in found:
        before, after = response.passes.values()
        assert [token.text for token in before] == [token.text for token in after] and len(before) > 20
        assert all(0.8 <= token.token_weight <= 5 and token.logp <= 0 for token in before)


def test_what_to_install_is_said(monkeypatch):
    def missing():
        raise NoBrowser("needs playwright: pip install playwright")

    monkeypatch.setattr(pages, "chromium", missing)
    with pytest.raises(SystemExit, match=r"benchmarks\.pages: needs playwright: pip install playwright"):
        pages.main([])


@pytest.mark.slow
def test_a_page_is_measured_and_photographed(tmp_path, capsys):
    try:
        pages.main(["--examples", "30", "--output", str(tmp_path)])
    except SystemExit as reason:
        pytest.skip(str(reason))
    out = capsys.readouterr().out
    assert out.startswith("size ") and "until the first responses are rendered" in out and "\nsearch " in out
    assert {path.stem for path in tmp_path.glob("*.png")} == {*pages.SHOTS}
