from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.stop_matcher import StopMatcher


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Shown character by character; the first stop string to be complete ends it."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


SHORT = st.text(alphabet="ab", min_size=1, max_size=4)


@given(st.lists(st.text(alphabet="ab", max_size=5), max_size=8), st.lists(SHORT, max_size=3))
@settings(max_examples=300)
def test_stop_matcher_agrees_with_a_naive_search(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    seen = ""
    for chunk in chunks:
        text, stopped = matcher.push(chunk)
        shown += text
        seen += chunk
        if stopped:
            break
        # Held back is exactly what may still begin a stop string, and not more.
        longest = max(
            (k for stop in stops for k in range(1, len(stop)) if seen.endswith(stop[:k])), default=0
        )
        assert len(seen) - len(shown) == longest
    else:
        shown += matcher.flush()
    assert (shown, matcher.stopped is not None) == naive_stop("".join(chunks), stops)


def test_stop_matcher_names_the_longest_of_those_complete_at_once() -> None:
    matcher = StopMatcher(["b", "ab"])
    assert matcher.push("xab") == ("x", True)
    assert matcher.stopped == "ab"
