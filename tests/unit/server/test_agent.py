"""The agent as a whole, against an engine that imitates vLLM's manners and faults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput, S3Place
from trimtab_server.agent import engine as engine_room
from trimtab_server.agent import proxy

from .conftest import Bench, eventually, exact, write_adapter, write_base


async def test_base_and_adapters_answer_by_their_names(bench: Bench) -> None:
    swift, harbour = bench.adapter("swift", seed=1), bench.adapter("harbour", seed=2)
    bench.want(swift=swift, harbour=harbour)
    await bench.begin()
    assert await bench.models() == ["base", "swift", "harbour"]
    assert [await bench.ask(name) for name in ("base", "swift", "harbour")] == [
        exact("base", bench.base),
        exact("swift", swift),
        exact("harbour", harbour),
    ]


async def test_the_answer_bears_the_stable_name_and_a_header_the_exact_one(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    status, body, headers = await bench.post(model="swift", prompt="x")
    assert (status, body["model"]) == (200, "swift")
    assert headers["X-Trimtab-Model"] == exact("swift", swift)
    status, body, _ = await bench.post(model=exact("swift", swift), prompt="x")
    assert (status, body["model"]) == (200, "swift")


async def test_a_request_reaches_the_engine_as_it_was_sent(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    raw = '{"prompt" : "\\ud83d\\ude00 \\"model\\": é", "t":1e-05, "model":"base","seed": 12345678901234567890}'
    async with bench.session.post(f"{bench.url}/v1/completions", data=raw.encode()) as answer:
        assert answer.status == 200
    assert bench.engine.last_body == raw.replace('"base"', f'"{exact("base", bench.base)}"').encode()


async def test_a_stream_comes_event_by_event_with_the_stable_name(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    bench.engine.stream_gate.clear()
    async with bench.session.post(f"{bench.url}/v1/completions", json={"model": "swift", "stream": True}) as answer:
        first = await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)
        bench.engine.stream_gate.set()
        rest = await answer.read()
    events = [json.loads(line[6:]) for line in (first + rest).decode().split("\n\n") if line.startswith("data: {")]
    assert [each["model"] for each in events] == ["swift"] * 3
    # What looks like the member within a generated text is left alone.
    assert events[0]["choices"][0]["text"] == f'0 "model":"{exact("swift", swift)}"'
    assert rest.endswith(b"data: [DONE]\n\n")


CLOSED = (
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/sleep"),
    ("POST", "/collective_rpc"),
    ("GET", "/metrics"),
    ("GET", "/server_info"),
    ("POST", "/drain"),
    ("POST", "/v1/chat/completions/../load_lora_adapter"),
    ("POST", "//v1/load_lora_adapter"),
    ("POST", "/v1/completions/%2e%2e/load_lora_adapter"),
)


async def test_what_is_no_user_route_is_not_there(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    before = len([call for call in bench.engine.calls if call[0] != "generate"])
    for method, path in CLOSED:
        async with bench.session.request(method, f"{bench.url}{path}", json={"model": "base"}) as answer:
            assert answer.status == 404, path
            assert "error" in await answer.json()
    assert len([call for call in bench.engine.calls if call[0] != "generate"]) == before


async def test_an_unknown_model_is_told_what_is_served(bench: Bench) -> None:
    bench.want(swift=bench.adapter("swift"))
    await bench.begin()
    status, body, _ = await bench.post(model="nobody")
    assert status == 404
    assert body["error"]["code"] == "model_not_found"
    assert "base, swift" in body["error"]["message"]


NO_REQUESTS = (
    (b"", "not a JSON object"),
    (b"[]", "not a JSON object"),
    (b'{"model":"base"', "not a JSON object"),
    (b'{"model":1}', "must be a string"),
    (b'{"model":"base","model":"swift"}', "twice"),
    (b'{"model":"base"} x', "follows"),
    (b'{"model":"\xff"}', "UTF-8"),
    (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
)


async def test_a_body_that_is_no_request_is_refused_with_the_reason(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    for raw, says in NO_REQUESTS:
        async with bench.session.post(f"{bench.url}/v1/completions", data=raw) as answer:
            assert answer.status == 400, raw[:40]
            assert says in (await answer.json())["error"]["message"]


async def test_a_body_beyond_the_limit_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "BODY_LIMIT", 1000)
    bench.want()
    await bench.begin()
    status, body, _ = await bench.post(model="base", prompt="x" * 2000)
    assert status == 413
    assert "1000 bytes" in body["error"]["message"]


async def test_before_the_engine_answers_clients_are_told_to_come_back(bench: Bench) -> None:
    bench.want()
    await bench.start_agent()
    status, body, headers = await bench.post(model="base")
    assert (status, headers["Retry-After"]) == (503, "5")
    assert "Nothing is served yet" in body["error"]["message"]
    assert not await bench.ready()


async def test_the_first_readiness_waits_for_each_adapter(bench: Bench) -> None:
    bench.engine.load_gate.clear()
    bench.want(swift=bench.adapter("swift"))
    await bench.start_agent()
    await bench.engine.start()
    await eventually("the load begins", lambda: bench.engine.loads("swift"))
    assert await bench.models() == ["base"]
    assert not await bench.ready()
    bench.engine.load_gate.set()
    await bench.until_ready()
    assert await bench.models() == ["base", "swift"]


async def test_an_adapter_that_definitely_fails_does_not_hold_readiness_back(bench: Bench) -> None:
    bench.want(wide=bench.adapter("wide", rank=32), swift=bench.adapter("swift"))
    await bench.begin()
    assert await bench.models() == ["base", "swift"]
    status, body, _ = await bench.post(model="wide")
    assert status == 503
    assert "AdapterRankTooLarge" in body["error"]["message"]
    assert "maxLoraRank to 32" in body["error"]["message"]


async def test_an_engine_that_lists_but_does_not_generate_is_not_ready(bench: Bench) -> None:
    bench.engine.sick = True
    bench.want()
    await bench.start_agent()
    await bench.engine.start()
    await eventually("it is asked for a token", lambda: ("generate", bench.engine.base) in bench.engine.calls)
    assert not await bench.ready()
    bench.engine.sick = False
    await bench.until_ready()


async def test_one_added_answers_and_one_removed_is_unloaded_without_a_restart(bench: Bench) -> None:
    swift, harbour = bench.adapter("swift", seed=1), bench.adapter("harbour", seed=2)
    bench.want(swift=swift)
    await bench.begin()
    bench.want(swift=swift, harbour=harbour)
    await eventually("harbour answers", lambda: bench.answers(harbour, "harbour"), 10)
    bench.want(harbour=harbour)
    await eventually("swift is unloaded", lambda: list(bench.engine.adapters) == [exact("harbour", harbour)])
    assert await bench.ask("swift") == "404"
    assert await bench.models() == ["base", "harbour"]
    assert bench.engine.loads("harbour") == 1


async def test_a_later_broken_adapter_fails_alone(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    bench.want(swift=swift, broken=bench.adapter("broken", use_dora=True))
    await eventually("it is reported", lambda: bench.reason("broken") == "AdapterUnsupported")
    assert await bench.ready()
    assert await bench.ask("swift") == exact("swift", swift)


async def test_a_new_digest_takes_over_without_a_gap(bench: Bench) -> None:
    old = bench.adapter("swift", seed=1)
    bench.want(swift=old)
    await bench.begin()
    answers: list[str] = []
    stop = asyncio.Event()

    async def keep_asking() -> None:
        while not stop.is_set():
            answers.append(await bench.ask("swift"))

    clients = [asyncio.create_task(keep_asking()) for _ in range(3)]
    new = bench.adapter("swift", seed=2)
    bench.want(swift=new)
    await eventually("the new one answers", lambda: exact("swift", new) in answers)
    await eventually("the old one is gone", lambda: list(bench.engine.adapters) == [exact("swift", new)])
    stop.set()
    await asyncio.gather(*clients)
    first_new = answers.index(exact("swift", new))
    assert set(answers) == {exact("swift", old), exact("swift", new)}
    # Three clients may overlap at the moment of the change, no more.
    assert exact("swift", old) not in answers[first_new + 3 :]


async def test_a_stream_ends_on_the_version_that_it_began_on(bench: Bench) -> None:
    old = bench.adapter("swift", seed=1)
    bench.want(swift=old)
    await bench.begin()
    bench.engine.stream_gate.clear()
    async with bench.session.post(f"{bench.url}/v1/completions", json={"model": "swift", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        new = bench.adapter("swift", seed=2)
        bench.want(swift=new)
        await eventually("the new one answers", lambda: bench.answers(new, "swift"))
        assert exact("swift", old) in bench.engine.adapters, "unloaded under a running stream"
        bench.engine.stream_gate.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    await eventually("the old one is gone", lambda: list(bench.engine.adapters) == [exact("swift", new)])


async def test_one_removed_stays_until_its_last_stream_has_ended(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    bench.engine.stream_gate.clear()
    async with bench.session.post(f"{bench.url}/v1/completions", json={"model": "swift", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        bench.want()
        await eventually("the name is gone", lambda: _is(bench.ask("swift"), "404"))
        await asyncio.sleep(0.3)
        assert exact("swift", swift) in bench.engine.adapters, "unloaded under a running stream"
        bench.engine.stream_gate.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    await eventually("it is unloaded", lambda: not bench.engine.adapters)


async def test_going_back_to_a_version_still_in_use_keeps_it(bench: Bench) -> None:
    old, new = bench.adapter("swift", seed=1), bench.adapter("swift2", seed=2)
    bench.want(swift=old)
    await bench.begin()
    bench.engine.stream_gate.clear()
    async with bench.session.post(f"{bench.url}/v1/completions", json={"model": "swift", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        bench.want(swift=new)
        await eventually("the new one answers", lambda: bench.answers(new, "swift"))
        bench.want(swift=old)
        await eventually("the old one answers again", lambda: bench.answers(old, "swift"))
        bench.engine.stream_gate.set()
        await answer.read()
    await eventually("the new one is gone", lambda: list(bench.engine.adapters) == [exact("swift", old)])
    assert ("unload", exact("swift", old)) not in bench.engine.calls
    assert bench.engine.loads("swift") == 2


async def test_a_new_version_that_fails_leaves_the_old_one_answering_even_after_a_restart(bench: Bench) -> None:
    old = bench.adapter("swift", seed=1)
    bench.want(swift=old)
    await bench.begin()
    bench.want(swift=bench.adapter("swift", rank=64))
    await eventually("the failure is told", lambda: bench.reason("swift") == "AdapterRankTooLarge")
    told = bench.report()
    assert told is not None
    assert told.adapters[0].digest == old.digest
    await bench.engine.kill()
    await eventually("the loss is noticed", lambda: _not(bench.ready))
    await bench.engine.start()
    await bench.until_ready()
    assert await bench.ask("swift") == exact("swift", old)


async def test_a_killed_engine_comes_back_with_all_adapters(bench: Bench) -> None:
    swift, harbour = bench.adapter("swift", seed=1), bench.adapter("harbour", seed=2)
    bench.want(swift=swift, harbour=harbour)
    await bench.begin()
    await bench.engine.kill()
    await eventually("the pod is not ready", lambda: _not(bench.ready))
    await eventually("it is told", lambda: (told := bench.report()) and told.reason == Reason.ENGINE_FAILED)
    assert await bench.ask("swift") == "503"
    bench.engine.load_gate.clear()
    await bench.engine.start()
    await eventually("the loads begin", lambda: bench.engine.loads("swift") == 2)
    assert not await bench.ready(), "ready before its adapters are back"
    bench.engine.load_gate.set()
    await bench.until_ready()
    assert await bench.models() == ["base", "swift", "harbour"]


async def test_an_engine_that_restarts_between_two_looks_gets_its_adapters_back(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    bench.engine.adapters.clear()
    status, _, headers = await bench.post(model="swift")
    assert (status, headers["Retry-After"]) == (503, "5")
    await eventually("swift answers again", lambda: bench.answers(swift, "swift"))


async def test_an_engine_that_hangs_is_told_to_the_kubelet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_room, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(engine_room, "HUNG_SECONDS", 0.5)
    bench.want()
    await bench.start_agent()
    assert await bench.status("/healthz/engine") == 200, "an engine that is not there yet does not hang"
    await bench.engine.start()
    await bench.until_ready()
    bench.engine.silent = True
    await eventually("it is told", lambda: _is(bench.status("/healthz/engine"), 503))
    assert not await bench.ready()
    bench.engine.silent = False
    await bench.until_ready()
    assert await bench.status("/healthz/engine") == 200


async def test_one_silence_is_no_hang_however_late_the_agent_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_room, "HUNG_SECONDS", 0.1)
    async with aiohttp.ClientSession() as session:
        room = engine_room.Engine(session, "http://127.0.0.1:1", lambda: None)

        async def silent() -> frozenset[str]:
            raise TimeoutError

        monkeypatch.setattr(room, "_list", silent)
        await asyncio.sleep(0.2)
        await room.refresh()
        assert room.life is engine_room.Life.ABSENT
        await asyncio.sleep(0.2)
        await room.refresh()
        assert room.life is engine_room.Life.HUNG


async def test_a_client_that_goes_away_takes_its_request_with_it(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    bench.engine.stream_gate.clear()
    for wish in ("stream", "slow"):
        request = asyncio.create_task(bench.post(model="base", **{wish: True}))  # type: ignore[arg-type]
        await eventually("it runs", lambda: _running(bench) == 1)
        before = bench.engine.cancelled
        await eventually("it reached the engine", lambda wish=wish: wish.encode() in bench.engine.last_body)  # type: ignore[misc]
        request.cancel()
        await eventually("the engine lets it go", lambda before=before: bench.engine.cancelled == before + 1)  # type: ignore[misc]
        await eventually("it is no longer counted", lambda: _running(bench) == 0)


async def test_an_engine_that_dies_in_the_middle_of_a_stream_is_no_proper_end(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    bench.engine.stream_gate.clear()
    async with bench.session.post(f"{bench.url}/v1/completions", json={"model": "base", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        await bench.engine.kill()
        rest, ended = await _read_until_cut(answer)
    assert not ended, "cut off, yet ended as if it were whole"
    assert b"engine_lost" in rest
    assert b"[DONE]" not in rest


# ------------------------------------------------------------------------------------------------ bad inputs


def _missing_object(bench: Bench) -> S3Place:
    return bench.base.model_copy(update={"uri": f"s3://models/{bench.folder.name}/nothing", "digest": None})


def _missing_bucket(bench: Bench) -> S3Place:
    return bench.base.model_copy(update={"uri": "s3://nowhere/adapter", "digest": None})


def _wrong_keys(bench: Bench) -> S3Place:
    keys = bench.folder / "wrong"
    keys.mkdir()
    (keys / "AWS_ACCESS_KEY_ID").write_text("SOMEBODY")
    (keys / "AWS_SECRET_ACCESS_KEY").write_text("nonsense")
    connection = bench.base.connection.model_copy(update={"credentials_dir": str(keys)})
    return bench.adapter("bad", seed=9).model_copy(update={"connection": connection})


def _no_keys(bench: Bench) -> S3Place:
    connection = bench.base.connection.model_copy(update={"credentials_dir": str(bench.folder / "absent")})
    return bench.adapter("bad", seed=9).model_copy(update={"connection": connection})


def _wrong_digest(bench: Bench) -> S3Place:
    return bench.adapter("bad", seed=9).model_copy(update={"digest": "sha256:" + "0" * 64})


def _spoilt_file(bench: Bench) -> S3Place:
    place = bench.adapter("bad", seed=9)
    file = bench.storage.root / place.uri.removeprefix("s3://") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return place


def _pickle(bench: Bench) -> S3Place:
    folder = write_adapter(bench.folder / "bad")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return bench.storage.put(folder, f"s3://models/{bench.folder.name}/bad", bench.base)


def _other_base(bench: Bench) -> S3Place:
    other = bench.base.model_copy(update={"digest": "sha256:" + "1" * 64})
    return bench.adapter("bad", base=other, seed=9)


def _other_shape(bench: Bench) -> S3Place:
    return bench.storage.put(write_adapter(bench.folder / "bad", hidden=12), f"s3://models/{bench.folder.name}/bad")


def _no_adapter(bench: Bench) -> S3Place:
    return bench.storage.put(write_base(bench.folder / "bad"), f"s3://models/{bench.folder.name}/bad")


@pytest.mark.parametrize(
    ("make", "reason", "says"),
    [
        (_missing_object, Reason.OBJECT_MISSING, "nothing"),
        (_missing_bucket, Reason.BUCKET_MISSING, "create it"),
        (_wrong_keys, Reason.CREDENTIALS_WRONG, "Secret"),
        (_no_keys, Reason.CREDENTIALS_MISSING, "AWS_ACCESS_KEY_ID"),
        (_wrong_digest, Reason.DIGEST_MISMATCH, "0000"),
        (_spoilt_file, Reason.DIGEST_MISMATCH, "adapter_model.safetensors"),
        (_pickle, Reason.UNSAFE_FORMAT, "pickle"),
        (_other_base, Reason.BASE_MISMATCH, "1111"),
        (_other_shape, Reason.BASE_MISMATCH, "another base"),
        (_no_adapter, Reason.MODEL_INVALID, "adapter_config.json"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
async def test_bad_adapters_are_told_by_reason_and_hold_nothing_back(
    bench: Bench, make: Callable[[Bench], S3Place], reason: Reason, says: str
) -> None:
    good = bench.adapter("good")
    bench.want(bad=make(bench), good=good)
    await bench.begin()
    assert await bench.models() == ["base", "good"]
    await eventually("the reason is told", lambda: bench.reason("bad") == reason.value, 20)
    assert says in bench.message("bad")
    assert "adapters[bad]" in bench.message("bad")
    assert bench.engine.loads("bad") == 0


async def test_correcting_the_cause_is_enough(bench: Bench) -> None:
    place = bench.adapter("swift")
    bench.storage.remove(place)
    bench.want(swift=place)
    await bench.begin()
    await eventually("it is told", lambda: bench.reason("swift") == "ObjectMissing")
    assert bench.adapter("swift") == place
    await eventually("it answers", lambda: bench.answers(place, "swift"))


async def test_a_storage_that_is_down_for_a_while_delays_and_breaks_nothing(bench: Bench) -> None:
    swift, harbour = bench.adapter("swift", seed=1), bench.adapter("harbour", seed=2)
    bench.want(swift=swift)
    await bench.begin()
    bench.storage.stop()
    bench.want(swift=swift, harbour=harbour)
    await eventually("it is told", lambda: bench.reason("harbour") == "StorageUnreachable", 20)
    assert await bench.ready()
    assert await bench.ask("swift") == exact("swift", swift)
    bench.storage.start()
    await eventually("it answers", lambda: bench.answers(harbour, "harbour"))


async def test_an_adapter_that_the_engine_refuses_is_told_and_tried_again(bench: Bench) -> None:
    bench.engine.refuse.add("swift")
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    await eventually("it is told", lambda: bench.reason("swift") == "AdapterUnsupported")
    assert "MergeJob" in bench.message("swift")
    bench.engine.refuse.clear()
    await eventually("it answers", lambda: bench.answers(swift, "swift"))


async def test_a_base_that_is_not_there_is_told_and_awaited(bench: Bench) -> None:
    bench.storage.remove(bench.base)
    bench.want()
    await bench.start_agent()
    await eventually("it is told", lambda: (told := bench.report()) and told.reason == Reason.OBJECT_MISSING)
    bench.storage.put(bench.folder / "base", bench.base.uri)
    await bench.engine.start()
    await bench.until_ready()


async def test_adapters_on_a_volume_and_folders_without_a_manifest_are_served(bench: Bench) -> None:
    on_volume = ModelInput(
        field="adapters[volume].from", reference="volume://claim", path=str(write_adapter(bench.folder / "volume"))
    )
    bare = write_adapter(bench.folder / "bare", seed=3)
    foreign = bench.storage.put_bare(bare, f"s3://models/{bench.folder.name}/bare")
    bench.want(volume=on_volume, foreign=foreign)
    await bench.begin()
    assert await bench.models() == ["base", "volume", "foreign"]


async def test_an_adapter_named_as_the_base_is_refused(bench: Bench) -> None:
    bench.want(base=bench.adapter("other"))
    await bench.begin()
    assert await bench.ask("base") == exact("base", bench.base)
    await eventually("it is told", lambda: bench.reason("base") == "SpecInvalid")


async def test_a_configuration_that_does_not_parse_is_passed_over(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    (bench.folder / "desired.json").write_text('{"model":')
    await eventually("it is told", lambda: (told := bench.report()) and "does not parse" in told.message)
    assert await bench.ask("swift") == exact("swift", swift)


# ------------------------------------------------------------------------------------------------ lives of the agent


async def test_an_agent_that_starts_again_disturbs_nothing(bench: Bench) -> None:
    swift, harbour = bench.adapter("swift", seed=1), bench.adapter("harbour", seed=2)
    bench.want(swift=swift, harbour=harbour)
    await bench.begin()
    await bench.kill_agent()
    bench.want(swift=swift)
    await bench.start_agent()
    await bench.until_ready()
    assert await bench.ask("swift") == exact("swift", swift)
    assert bench.engine.loads("swift") == 1, "what the engine has is not loaded again"
    await eventually("what nobody wants is swept", lambda: list(bench.engine.adapters) == [exact("swift", swift)])


async def test_the_base_of_a_pod_never_changes(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    first = bench.base
    bench.base = bench.storage.put(
        write_base(bench.folder / "base", layers=3), f"s3://models/{bench.folder.name}/base2"
    )
    bench.want(swift=swift)
    await bench.kill_agent()
    await bench.start_agent()
    await bench.until_ready()
    assert await bench.ask("base") == exact("base", first)
    assert await bench.ask("swift") == exact("swift", swift)


async def test_draining_lets_streams_end_and_sends_no_more_clients(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    bench.engine.stream_gate.clear()
    async with bench.session.post(f"{bench.url}/v1/completions", json={"model": "base", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        drained = asyncio.create_task(_drain(bench))
        await eventually("it is not ready", lambda: _not(bench.ready))
        # Requests that are on their way are served, and their connection is closed behind them.
        status, _, headers = await bench.post(model="base")
        assert (status, headers["Connection"]) == (200, "close")
        await asyncio.sleep(0.4)
        assert not drained.done()
        bench.engine.stream_gate.set()
        assert (await answer.read()).endswith(b"[DONE]\n\n")
    assert await asyncio.wait_for(drained, 5) == "drained\n"


async def test_a_drain_for_an_engine_that_is_only_restarted_ends_with_it(bench: Bench) -> None:
    bench.want()
    await bench.begin()
    await _drain(bench)
    assert not await bench.ready()
    await bench.engine.kill()
    await eventually("the loss is noticed", lambda: _is(bench.ask("base"), "503"))
    await bench.engine.start()
    await bench.until_ready()


async def test_the_report_says_what_is_served_and_is_withdrawn_at_the_end(bench: Bench) -> None:
    swift = bench.adapter("swift")
    bench.want(swift=swift)
    await bench.begin()
    told = await eventually("it serves", lambda: (told := bench.report()) and told.reason == "Serving" and told)
    assert (told.pod_uid, told.model_ready, told.model_digest) == ("uid-0", True, bench.base.digest)
    assert [(each.name, each.digest, each.reason.value) for each in told.adapters] == [
        ("swift", swift.digest, "Loaded")
    ]
    await bench.stop_agent()
    assert bench.report() is None


async def test_metrics_are_ours_and_then_the_engines(bench: Bench) -> None:
    bench.want(swift=bench.adapter("swift"))
    await bench.begin()
    await bench.ask("swift")
    async with bench.session.get(f"http://127.0.0.1:{bench.settings.metrics_port}/metrics") as answer:
        text = await answer.text()
    assert 'trimtab_agent_adapters{reason="Loaded"} 1.0' in text
    assert "trimtab_agent_ready 1.0" in text
    assert text.rstrip().endswith("vllm:num_requests_running 0.0")


# ------------------------------------------------------------------------------------------------ small change


async def _not(question: Callable[[], Any]) -> bool:
    return not await question()


async def _is(question: Any, wanted: object) -> bool:
    return bool(await question == wanted)


def _running(bench: Bench) -> int:
    assert bench.agent is not None
    assert bench.agent.state is not None
    return bench.agent.state.table.running


async def _read_until_cut(answer: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """What came, and whether it came to a proper end."""
    rest = b""
    try:
        while chunk := await answer.content.readany():
            rest += chunk
    except aiohttp.ClientPayloadError:
        return rest, False
    return rest, True


async def _drain(bench: Bench) -> str:
    async with bench.session.post(f"http://127.0.0.1:{bench.settings.drain_port}/drain") as answer:
        return await answer.text()
