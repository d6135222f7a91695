"""Stop strings: the text passed on does not depend on how it was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4c.errors import InputError
from v4c.runtime.stopping import StopStrings

TEXTS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What precedes the stop string that is complete first, the longest of those; read letter by letter."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 12)))
def test_the_cut_makes_no_difference(text: str, stops: list[str], cuts: list[int]) -> None:
    watch, places = StopStrings(stops), [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    passed = [watch.push(text[start:end]) for start, end in pairwise(places)]
    ahead, found = expected(text, stops)
    shown = "".join(passed)
    assert ahead.startswith(shown), "what was shown is never taken back"
    assert (shown + watch.flush(), watch.found) == (ahead, found)


@given(text=TEXTS, stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    watch = StopStrings(stops)
    shown = watch.push(text)
    if watch.found is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_follows_a_stop_string() -> None:
    watch = StopStrings("end")
    assert (watch.push("the en"), watch.push("d of"), watch.push(" it"), watch.flush()) == ("the ", "", "", "")
    assert watch.found == "end"


@pytest.mark.parametrize("wrong", [[""], ["a", 3], [None]])
def test_a_stop_string_has_letters(wrong: list[str]) -> None:
    with pytest.raises(InputError, match="stop: expected strings that are not empty, found"):
        StopStrings(wrong)
