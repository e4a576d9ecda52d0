"""The server over real sockets: steering, sharing, refusing, and going on after everything that can go wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import time
import tracemalloc
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import psutil
import pytest
import websockets
from PIL import Image

from evenflow.serve.protocol import LIMITS

from .double import Chunk, Double, colour
from .running import Running


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for the tests that only talk to it."""
    with Running(Double(), tmp_path_factory.mktemp("sessions"), replace(LIMITS, seats=8)) as running:
        yield running


def pixels(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), float)


def shows(prompt: str):
    """Whether a frame has the hue of the prompt."""
    wanted = colour(prompt) / np.linalg.norm(colour(prompt))

    def fits(_, body) -> bool:
        mean = pixels(body).mean((0, 1))
        return float(mean @ wanted / np.linalg.norm(mean)) > 0.995

    return fits


def get(address: str, **headers):
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=5)


def test_a_video_starts_and_comes_at_its_rate(server):
    async def scenario():
        async with server.client() as client:
            created = await client.begin(prompt="a red ball", seed=3)
            assert created["settings"] == {"memory": "longlive", "schedule": "chunks", "seed": 3, "pace": 1.0}
            assert len(created["session"]) == 22 and not created["resumed"]
            header, body = await client.picture(shows("red"))
            assert (header.width, header.height, header.format) == (64, 64, "webp") and pixels(body).shape == (
                64,
                64,
                3,
            )
            assert abs(header.captured - time.time()) < 5
            begin, first = time.monotonic(), header.frame
            while time.monotonic() - begin < 1.5:
                header, _ = await client.picture()
            rate = (header.frame - first) / (time.monotonic() - begin)
            assert 13 <= rate <= 18, f"{rate:.1f} frames/s of a video meant for 16"
            indices = [header.frame for header, _ in client.frames]
            assert indices == sorted(set(indices))
            stats = await client.until("stats")
            assert stats["bytes"] > 0 and stats["position"] > 0 and stats["drift"] < 0.05
            memory = await client.until("memory")
            assert {region for _, region in memory["held"]} == {"sink", "window"}
            known = {int(n) for event in client.events if event["type"] == "memory" for n in event["thumbs"]}
            assert {latent for latent, _ in memory["held"]} <= known

    asyncio.run(scenario())


def test_steering_is_seen_and_its_latency_told(server):
    async def scenario():
        async with server.client() as client:
            await client.begin(prompt="a red ball")
            await client.picture(shows("red"))
            said = await client.ask(
                "input.append", "input.appended", item={"type": "prompt", "text": "a blue sea", "how": "clear"}
            )
            assert said["item"]["text"] == "a blue sea" and said["at"] >= 3 and said["unknown"] == []
            await client.picture(shows("blue"))
            stats = await client.until("stats")
            while stats["latency"] is None:
                stats = await client.until("stats")
            assert 0 < stats["latency"] < 2.0
            blend = {"type": "blend", "weights": {"a red ball": 1, "a blue sea": 1}}
            await client.ask("input.append", "input.appended", item=blend)
            odd = {"type": "prompt", "text": "a qwertz blue sea"}
            assert (await client.ask("input.append", "input.appended", item=odd))["unknown"] == ["qwertz"]
            await client.ask("input.append", "input.appended", item=blend)
            mix = colour("red") + colour("blue")
            mix /= np.linalg.norm(mix)

            def mixed(_, body):
                mean = pixels(body).mean((0, 1))
                return mean @ mix / np.linalg.norm(mean) > 0.995

            await client.picture(mixed)

    asyncio.run(scenario())


def test_a_drawn_path_is_followed_until_erased(server):
    async def scenario():
        async with server.client() as client:
            await client.begin(prompt="a blue sea")
            await client.picture()
            points = [[0, 10, 50], [5, 11, 50]]
            said = await client.ask("input.append", "input.appended", item={"type": "track", "points": points})
            name = said["item"]["id"]
            await client.picture(lambda _, body: pixels(body)[50, 10].min() > 200)
            wrong = await client.ask("input.append", "input.appended", item={"type": "erase", "id": 77})
            assert wrong["type"] == "error" and "77" in wrong["error"]["message"]
            await client.ask("input.append", "input.appended", item={"type": "erase", "id": name})
            await client.picture(lambda _, body: pixels(body)[50, 10].min() < 100)

    asyncio.run(scenario())


def test_too_many_paths_are_refused(server):
    async def scenario():
        async with server.client() as client:
            await client.begin()
            for _ in range(LIMITS.tracks):
                said = await client.ask("input.append", "input.appended", item={"type": "track", "points": [[0, 1, 1]]})
                assert said["type"] == "input.appended"
            said = await client.ask("input.append", "input.appended", item={"type": "track", "points": [[0, 1, 1]]})
            assert said["error"]["code"] == "full"

    asyncio.run(scenario())


def test_pause_stops_the_frames_and_start_goes_on(server):
    async def scenario():
        async with server.client() as client:
            await client.begin()
            await client.picture()
            await client.ask("response.cancel", "response.cancelled")
            await asyncio.sleep(1.0)  # what was made before is still shown
            while True:
                try:
                    async with asyncio.timeout(0.3):
                        await client.hear()
                except TimeoutError:
                    break
            last = client.frames[-1][0].frame
            assert await client.ask("response.create", "response.started")
            header, _ = await client.picture()
            assert last < header.frame <= last + 3

    asyncio.run(scenario())


def test_another_memory_begins_anew_and_a_wrong_one_changes_nothing(server):
    async def scenario():
        async with server.client() as client:
            await client.begin(prompt="a red ball")
            await client.picture()
            updated = await client.ask(
                "session.update", "session.updated", memory="self-forcing(window=9)", schedule="rolling", pace=2.0
            )
            assert updated["settings"] == {
                "memory": "self-forcing(window=9)",
                "schedule": "rolling",
                "seed": 0,
                "pace": 2.0,
            }
            assert updated["history"]["entries"][-1]["item"]["type"] == "settings"
            refused = await client.ask("session.update", "session.updated", memory="streaming-llm")
            assert refused["error"]["code"] == "refused" and "no frames" in refused["error"]["message"]
            updated = await client.ask("session.update", "session.updated", pace=1.0)
            assert updated["settings"]["memory"] == "self-forcing(window=9)"
            await client.picture(shows("red"))

    asyncio.run(scenario())


def test_a_wrong_memory_takes_no_seat(server):
    async def scenario():
        before = len(server.room.sessions)
        async with server.client() as client:
            for _ in range(3):
                said = await client.ask("session.create", "session.created", memory="nonsense")
                assert said["type"] == "error" and "longlive" in said["error"]["message"]
                while server.room.leaving:
                    await asyncio.sleep(0.005)
            assert len(server.room.sessions) == before
            assert (await client.begin())["type"] == "session.created"

    asyncio.run(scenario())


def test_a_timeline_played_again_gives_the_same_frames(server):
    async def scenario():
        async with server.client() as client:
            await client.begin(prompt="a red ball", seed=5, pace=4)
            first = []
            for item in (
                {"type": "prompt", "text": "a blue sea"},
                {"type": "track", "points": [[0, 5, 5], [2, 60, 60]]},
                {"type": "blend", "weights": {"a yellow sun": 0.4, "a green field": 0.6}},
            ):
                await client.picture()
                await client.ask("input.append", "input.appended", item=item)
            await client.ask("session.update", "session.updated", memory="self-forcing")
            updated = await client.ask("session.update", "session.updated", pace=1.0)
            start = updated["frame"]
            await client.picture(lambda header, _: header.frame > start + 14)
            history = updated["history"]
            ats = [entry["at"] for entry in history["entries"]]
            assert len(ats) == 4 and ats == sorted(ats)
            # The frames themselves, from the model's side: the same entries at the same places give the same bytes.
            from evenflow.serve.protocol import Timeline
            from evenflow.serve.take import Take

            def play(timeline):
                begin = timeline.model_copy(update={"entries": []})
                take = Take(server.room.source, LIMITS, begin, timeline.entries)
                return [take.step().tobytes() for _ in range(ats[-1] // 3 + 4)], take.timeline

            timeline = Timeline.model_validate(history)
            first, noted = play(timeline)
            again, _ = play(noted)
            assert first == again and noted == timeline
            said = await client.ask("history.replay", "session.updated", history=history)
            assert said["position"] == 0 and said["playing"]
            told = []
            while len(told) < 4:
                told.append(await client.until("input.appended", 20))
            assert [{"at": event["at"], "item": event["item"]} for event in told] == history["entries"]
            await client.until("history.replayed", 20)

    asyncio.run(scenario())


def test_a_picture_can_begin_a_video(server):
    out = io.BytesIO()
    Image.new("RGB", (200, 100), (250, 250, 10)).save(out, "PNG")
    item = {"type": "image", "data": base64.b64encode(out.getvalue()).decode()}

    async def scenario():
        async with server.client() as client:
            await client.ask("session.create", "session.created", prompt="a blue sea")
            wrong = {"type": "image", "data": base64.b64encode(b"no picture at all, really").decode()}
            assert (await client.ask("input.append", "input.appended", item=wrong))["error"]["code"] == "bad_picture"
            assert (await client.ask("input.append", "input.appended", item=item))["type"] == "input.appended"
            await client.send("response.create")
            _, body = await client.picture(lambda header, _: header.frame == 0)
            assert np.abs(pixels(body).mean((0, 1)) - (250, 250, 10)).max() < 12
            late = await client.ask("input.append", "input.appended", item=item)
            assert "begins" in late["error"]["message"]

    asyncio.run(scenario())


def test_two_sessions_share_and_a_third_is_told_the_house_is_full(tmp_path):
    with Running(Double(0.02), tmp_path, replace(LIMITS, seats=2)) as server:

        async def scenario():
            async with server.client() as one, server.client() as two, server.client() as three:
                await one.begin(prompt="a red ball")
                await two.begin(prompt="a blue sea")
                await asyncio.gather(one.picture(shows("red")), two.picture(shows("blue")))
                said = await three.ask("session.create", "session.created")
                assert said["error"]["code"] == "full" and "2 seats" in said["error"]["message"]
                stats = await one.until("stats", sharers=2)
                while not stats["fps"]:
                    stats = await one.until("stats", sharers=2)
                assert stats["fps"] > 10
                begin = time.monotonic()
                firsts = [client.frames[-1][0].frame for client in (one, two)]
                await asyncio.gather(
                    *(c.picture(lambda h, _, f=f: h.frame >= f + 24) for c, f in zip((one, two), firsts, strict=True))
                )
                assert time.monotonic() - begin < 3.0
                await two.ask("session.close", "session.closed")
                while server.room.leaving:
                    await asyncio.sleep(0.01)
                assert (await three.begin())["type"] == "session.created"

        asyncio.run(scenario())


def test_a_session_without_clients_gives_way_and_comes_back(tmp_path):
    with Running(Double(), tmp_path, replace(LIMITS, seats=1)) as server:

        async def scenario():
            async with server.client() as client:
                name = (await client.begin(prompt="a red ball"))["session"]
                await client.picture(shows("red"))
                last = client.frames[-1][0].frame
            async with server.client() as other:
                while not server.room.sessions[name].left:
                    await asyncio.sleep(0.01)
                await other.begin(prompt="a blue sea")
                await other.picture(shows("blue"))
            async with server.client() as client:
                said = await client.ask("session.resume", "session.created", session=name)
                if said["type"] == "error":  # the other's end is noticed a moment later
                    await asyncio.sleep(0.3)
                    said = await client.ask("session.resume", "session.created", session=name)
                assert said["resumed"] and said["frame"] >= last and said["asked"]["text"] == "a red ball"
                await client.picture(shows("red"))

        asyncio.run(scenario())


def test_a_failing_model_is_told_and_others_go_on(server):
    async def scenario():
        async with server.client() as one, server.client() as two:
            await one.begin(prompt="a red ball")
            await two.begin(prompt="a broken thing")
            said = await two.until("error")
            assert said["error"]["code"] == "failed" and "asked to break" in said["error"]["message"]
            await one.picture()
            await two.ask("input.append", "input.appended", item={"type": "prompt", "text": "a blue sea"})
            await two.send("response.create")
            await two.picture(shows("blue"))

    asyncio.run(scenario())


def test_saving_and_a_server_that_is_started_again(tmp_path):
    async def before(server):
        async with server.client() as client:
            name = (await client.begin(prompt="a red ball", seed=9))["session"]
            await client.picture()
            await client.ask("input.append", "input.appended", item={"type": "prompt", "text": "a blue sea"})
            await client.picture(shows("blue"))
            saved = await client.ask("session.save", "session.saved")
            assert saved["bytes"] > 0
            return name, saved["frame"]

    async def after(server, name, frame):
        async with server.client() as client:
            created = await client.ask("session.resume", "session.created", session=name)
            assert created["resumed"] and created["frame"] >= frame and created["settings"]["seed"] == 9
            assert [entry["item"]["text"] for entry in created["history"]["entries"]] == ["a blue sea"]
            header, _ = await client.picture(shows("blue"))
            assert header.frame >= frame
            await client.ask("session.close", "session.closed", forget=True)
            while server.room.leaving:
                await asyncio.sleep(0.01)
            gone = await client.ask("session.resume", "session.created", session=name)
            assert gone["error"]["code"] == "not_found"

    with Running(Double(), tmp_path) as server:
        name, frame = asyncio.run(before(server))
    with Running(Double(), tmp_path) as server:
        asyncio.run(after(server, name, frame))
    assert list(tmp_path.iterdir()) == []


def test_what_is_damaged_on_disk_is_told(tmp_path):
    with Running(Double(), tmp_path) as server:

        async def scenario():
            async with server.client() as client:
                name = (await client.begin())["session"]
                await client.picture()
                await client.ask("session.save", "session.saved")
                await client.ask("session.close", "session.closed")
                while server.room.leaving:
                    await asyncio.sleep(0.01)
                path = tmp_path / f"{name}.json"
                good = path.read_text()
                for bad in (
                    "",
                    "{",
                    "[]",
                    "{}",
                    good.replace('"seed"', '"sead"'),
                    good.replace(".evenflow", ".evenflop"),
                    json.dumps({**json.loads(good), "stream": "../../etc/passwd"}),
                ):
                    path.write_text(bad)
                    said = await client.ask("session.resume", "session.created", session=name)
                    assert said["error"]["code"] == "damaged", bad
                stream = next(tmp_path.glob("*.evenflow"))
                path.write_text(good)
                stream.write_text("nothing")
                said = await client.ask("session.resume", "session.created", session=name)
                assert said["type"] == "error"
                while server.room.leaving:
                    await asyncio.sleep(0.01)
                assert not server.room.sessions

        asyncio.run(scenario())


def test_a_recording_is_a_film_of_what_was_shown(server):
    import av

    async def scenario():
        async with server.client() as client:
            created = await client.begin(prompt="a red ball")
            await client.picture()
            await client.ask("record.start", "record.started")
            assert (await client.ask("record.start", "record.started"))["type"] == "error"
            first = client.frames[-1][0].frame
            await client.picture(lambda header, _: header.frame > first + 30)
            done = await client.ask("record.stop", "record.done")
            assert created["session"] in done["url"] and done["frames"] >= 24
            assert (await client.ask("record.stop", "record.done"))["type"] == "error"
            return done

    done = asyncio.run(scenario())
    with get(server.address + done["url"]) as answer:
        assert answer.headers["content-type"] == "video/mp4" and "attachment" in answer.headers["content-disposition"]
        film = answer.read()
    assert len(film) == done["bytes"]
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (256, 256, 16)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == done["frames"] and math.isclose(done["seconds"], len(frames) / 16, abs_tol=1e-3)
    assert all(shows("red")(None, _png(frame)) for frame in frames[::8])


def _png(frame) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


# -- who may speak -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1", "http://127.0.0.1.evil.example"],
)
def test_a_page_of_another_origin_is_refused(server, origin):
    async def scenario():
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            async with server.client(origin=origin):
                pass
        assert refused.value.response.status_code == 403

    asyncio.run(scenario())
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server.address + "/v1/options", Origin=origin)
    assert refused.value.code == 403


def test_its_own_page_may_speak(server):
    async def scenario():
        for origin in (server.address, f"http://localhost:{server.port}"):
            async with server.client(origin=origin) as client:
                assert (await client.ask("session.update", "x"))["error"]["code"] == "refused"

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "10.1.2.3", "a b", "user@127.0.0.1"])
def test_another_name_of_the_server_is_refused(server, host):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server.address + "/", Host=host)
    assert refused.value.code in (400, 403)


def test_every_answer_binds_the_page(server):
    for path in ("/", "/static/app.js", "/v1/options"):
        with get(server.address + path) as answer:
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in answer.headers


def test_the_page_loads_nothing_from_elsewhere(server):
    from evenflow.serve.app import STATIC

    names = sorted(path.name for path in STATIC.iterdir())
    assert {"index.html", "style.css", "app.js"} <= set(names)
    for name in names:
        text = (STATIC / name).read_text(encoding="utf-8")
        assert "://" not in text.replace("http://www.w3.org/", ""), f"{name} names another server"
        assert " style=" not in text and " onclick=" not in text, f"{name} needs what the policy forbids"
        with get(f"{server.address}/static/{name}") as answer:
            assert answer.read().decode() == text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/sessions/../../etc/passwd/recording.mp4",
        "/v1/sessions/%2e%2e%2fx/recording.mp4",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/v1/sessions/aaaaaaaaaaaaaaaaaaaaaa/recording.mp4",
    ],
)
def test_no_path_leads_out(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server.address + path)
    assert refused.value.code == 404


def test_options_say_what_there_is_and_why_not(server):
    with get(server.address + "/v1/options") as answer:
        options = json.load(answer)
    video = options["video"]
    assert (video["fps"], video["size"], options["text"]) == (16.0, [64, 64], None)
    reasons = {choice["name"]: choice["refused"] for choice in video["memories"]}
    assert reasons["longlive"] == {} and "no frames" in reasons["streaming-llm"]["chunks"]


# -- noise and malice --------------------------------------------------------------------------------------------------


def test_malformed_messages_are_answered_and_harm_nothing(server):
    async def scenario():
        async with server.client() as client:
            await client.begin(prompt="a red ball")
            for message in (
                "",
                "nonsense",
                "[]",
                "{}",
                '{"type": 3}',
                '{"type": "session.explode"}',
                b"\x00\xff",
                '{"type": "input.append"}',
                json.dumps({"type": "input.append", "item": {"type": "prompt", "text": "x" * 3000}}),
            ):
                await client.socket.send(message)
                said = await client.until("error")
                assert said["error"]["code"] in ("bad_message", "bad_event") and said["error"]["what_to_do"]
            await client.picture(shows("red"))

    asyncio.run(scenario())


def test_a_huge_message_ends_the_connection_only(server):
    async def scenario():
        async with server.client() as other:
            await other.begin()
            async with server.client() as client:
                await client.socket.send("x" * (LIMITS.message + 1))
                with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                    while True:
                        await client.hear()
                assert closed.value.rcvd.code == 1009
            await other.picture()

    asyncio.run(scenario())


def test_a_flood_is_cut_off_and_others_do_not_notice(server):
    async def scenario():
        async with server.client() as other:
            await other.begin(prompt="a red ball")
            await other.picture()
            async with server.client() as client:
                await client.begin()
                item = json.dumps({"type": "input.append", "item": {"type": "prompt", "text": "a blue sea"}})
                with pytest.raises(websockets.exceptions.ConnectionClosed):
                    for _ in range(3000):
                        await client.socket.send(item)
                    while True:
                        await client.hear()
                codes = {event["error"]["code"] for event in client.events if event["type"] == "error"}
                assert codes <= {"rate_limited", "busy"}
            frame = other.frames[-1][0].frame
            await other.picture(lambda header, _: header.frame > frame + 8, 5)

    asyncio.run(scenario())


@contextlib.contextmanager
def traced():
    """Counts what the program holds, which is not what the allocator keeps."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def test_a_client_that_reads_nothing_costs_bounded_memory_and_is_let_go(tmp_path):
    class Large(Double):
        """Frames that are large on the wire."""

        size = (480, 480)

        def open(self, **settings):
            video, noise = super().open(**settings), np.random.default_rng(0)
            small = video.step
            video.step = lambda: Chunk(noise.integers(0, 256, (len(small().frames), 480, 480, 3), np.uint8))
            return video

    with traced(), Running(Large(), tmp_path, replace(LIMITS, stalled=2.0)) as server:

        async def scenario():
            async with server.client(max_queue=1) as stuck, server.client() as other:
                await stuck.begin(pace=8)
                stuck.socket.transport.pause_reading()
                await other.begin(prompt="a red ball")
                sizes = []
                begin = time.monotonic()
                while time.monotonic() - begin < 4.0:
                    async with asyncio.timeout(5):
                        await other.picture()
                    other.frames.clear()
                    sizes.append(tracemalloc.get_traced_memory()[0])
                # Up to three chunks of 8 MB for each session, two of them as floats too while they are looked at, and
                # what is on its way; a client whose frames were kept would cost 400 MB in this time.
                assert max(sizes) < 200e6
                assert sum(session.left is not None for session in server.room.sessions.values()) == 1, (
                    "it was not let go"
                )

        asyncio.run(scenario())


def test_a_slow_client_gets_fewer_and_simpler_frames_but_the_newest(server):
    async def scenario():
        async with server.client(max_queue=1) as client:
            await client.begin(prompt="a red ball")
            header, _ = await client.picture()
            await client.send("frame.ack", frame=header.frame)
            await client.picture(lambda h, _: h.frame > header.frame + 4)
            await asyncio.sleep(2.5)  # acknowledges nothing
            held = []
            while True:
                try:
                    async with asyncio.timeout(0.2):
                        heard = await client.hear()
                except TimeoutError:
                    break
                if not isinstance(heard, dict):
                    held.append(heard[0].frame)
                if len(client.events) > 60:
                    break
            shown = client.frames[-1][0].frame
            assert shown - header.frame <= 2 * 16, "more than a second and a half was on its way"
            await client.send("frame.ack", frame=shown)
            fresh, _ = await client.picture()
            assert fresh.frame > shown + 8, "it went on where it was, not with the newest frame"

    asyncio.run(scenario())


def test_opening_and_closing_leaves_nothing(tmp_path):
    with Running(Double(), tmp_path, replace(LIMITS, seats=2, saved=5)) as server:

        async def cycle(number: int):
            async with server.client() as client:
                await client.begin(prompt=f"prompt {number}")
                if number % 4 == 0:
                    await client.picture()
                if number % 2:
                    await client.ask("session.close", "session.closed")

        async def scenario(count: int):
            for number in range(count):
                await cycle(number)

        asyncio.run(scenario(40))
        process = psutil.Process()
        before = process.memory_info().rss, process.num_threads(), process.num_fds()
        begin = time.monotonic()
        asyncio.run(scenario(200))
        print(f"{200 / (time.monotonic() - begin):.0f} cycles a second")
        after = process.memory_info().rss, process.num_threads(), process.num_fds()
        assert after[0] - before[0] < 16e6 and after[1] <= before[1] + 2 and after[2] <= before[2] + 4
        assert len(server.room.sessions) <= 2
        assert len(list(tmp_path.glob("*.json"))) <= 5
