"""What users dropped stays in memory, within a bound."""

import io

import pytest
from colour_model import colour_model, drawn
from PIL import Image

from tailseg.app.pictures import Seen, look
from tailseg.app.sessions import Sessions


@pytest.fixture(scope="module")
def seen() -> Seen:
    buffer = io.BytesIO()
    Image.fromarray(drawn(64, 64, [(30, 30, 9, 0)])).save(buffer, "PNG")
    (one,), _ = look(colour_model(64), [("a.png", buffer.getvalue())])
    return one


def test_pictures_are_kept_by_keys_that_differ(seen: Seen) -> None:
    sessions = Sessions()
    first, second = sessions.add([seen]), sessions.add([])
    assert first != second
    assert len(first) >= 32
    assert sessions.get(first) == (seen,)
    assert sessions.get(second) == ()
    sessions.drop(first)
    sessions.drop(None)
    assert sessions.get(first) == sessions.get("other") == sessions.get(None) == ()


def test_the_longest_unused_go_first(seen: Seen) -> None:
    assert seen.size > 64 * 64 * 3
    sessions = Sessions(most_bytes=2 * seen.size)
    first, second = sessions.add([seen]), sessions.add([seen])
    sessions.get(first)
    third = sessions.add([seen])
    assert len(sessions) == 2
    assert sessions.get(second) == ()
    assert sessions.get(first) == sessions.get(third) == (seen,)


def test_the_pictures_of_one_user_stay_however_large(seen: Seen) -> None:
    sessions = Sessions(most_bytes=1)
    assert sessions.get(sessions.add([seen])) == (seen,)
    assert len(sessions) == 1
