"""Names are exchanged and nothing else: in requests by position, in answers wherever the chunks are cut."""

from __future__ import annotations

import json

import pytest

from trimtab_server.agent.rewriting import Renamer, read_body

EXACT, STABLE = "swift@0123456789ab", "swift"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ('{"model":"swift"}', '{"model":"swift@0123456789ab"}'),
        (' {\n"a" : [1, {"model":"x"}] ,\t"model" : "swift" , "z":null}\r\n', None),
        ('{"prompt":"\\"model\\":\\"swift\\"","model":"swift","n":1e-05}', None),
        ('{"messages":[{"model":"swift"}],"model":"swift"}', None),
        ('{"prompt":"\\ud800","model":"swift"}', None),
        ('{"mod\\u0065l":"swift"}', '{"mod\\u0065l":"swift@0123456789ab"}'),
    ],
)
def test_only_the_one_value_is_spliced(raw: str, wanted: str | None) -> None:
    body = read_body(raw.encode())
    assert body.model == "swift"
    after = body.naming(EXACT).decode()
    if wanted is not None:
        assert after == wanted
    assert len(after) == len(raw) + len(EXACT) - len("swift")
    assert json.loads(after) == {**json.loads(raw), "model": EXACT}


def test_a_body_without_model_stays_as_it_is() -> None:
    raw = b'{ "prompt": "x" }'
    body = read_body(raw)
    assert body.model is None
    assert body.naming(EXACT) == raw


ANSWER = (
    b'data: {"id":"c","model":"swift@0123456789ab","choices":[{"text":"\\"model\\":\\"swift@0123456789ab\\""}]}\n\n'
    b'data: {"id":"c","model": "swift@0123456789ab","usage":{"model":"other"}}\n\ndata: [DONE]\n\n'
)
RENAMED = (
    b'data: {"id":"c","model":"swift","choices":[{"text":"\\"model\\":\\"swift@0123456789ab\\""}]}\n\n'
    b'data: {"id":"c","model": "swift","usage":{"model":"other"}}\n\ndata: [DONE]\n\n'
)


def test_an_answer_is_renamed_wherever_it_is_cut() -> None:
    for cut in range(len(ANSWER) + 1):
        renamer = Renamer(EXACT, STABLE)
        assert renamer.feed(ANSWER[:cut]) + renamer.feed(ANSWER[cut:]) + renamer.end() == RENAMED, cut


def test_an_answer_is_renamed_in_single_bytes_and_holds_little_back() -> None:
    renamer = Renamer(EXACT, STABLE)
    out = b""
    for position in range(len(ANSWER)):
        out += renamer.feed(ANSWER[position : position + 1])
        assert len(renamer._held) < len('"model": "swift@0123456789ab"')
    assert out + renamer.end() == RENAMED


def test_whole_events_are_never_held_back() -> None:
    renamer = Renamer(EXACT, STABLE)
    for event in (ANSWER[: ANSWER.index(b"\n\n") + 2], b'data: {"x":"\\"mod"}\n\n'):
        renamer.feed(event)
        assert renamer.end() == b""
