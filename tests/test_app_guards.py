"""What the web UI refuses before a handler runs: foreign hosts and origins, internal handlers, guesses of a password."""

import argparse
import asyncio
import socket

import httpx
import pytest
from gradio_client import Client
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.studio import server
from effilora_diffusion.studio.guards import FREE_ATTEMPTS, LONGEST_DELAY, MOST_BYTES, LoginDelay, allowed_hosts

SESSIONS = 8
PROXY = "studio.example.com"


@pytest.fixture(scope="module")
def page(place, tmp_path_factory):
    args = argparse.Namespace(
        mixed_precision="no", model=str(place / "model"), outputs=tmp_path_factory.mktemp("guarded") / "outputs",
        port=None, listen=False, allowed_host=[PROXY], models=None,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "MOST_SESSIONS", SESSIONS)
        served = server.serve(args, block=False)
    yield served
    served.close()


@pytest.fixture
def http(page):
    with httpx.Client(base_url=page.local_url, timeout=600) as client:
        yield client


def own(page):
    """What a browser adds to a call of the page itself."""
    return {"Origin": page.local_url.rstrip("/")}


def index_of(page, name):
    """The number of a handler."""
    return next(index for index, fn in page.fns.items() if fn.api_name == name)


def call_of(page, name, *data, visitor="visitor"):
    return {"fn_index": index_of(page, name), "data": list(data), "session_hash": visitor}


# ----------------------------------------------------------------------------------------------------- host, origin

PATHS = [("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("OPTIONS", "/gradio_api/upload"), ("POST", "/gradio_api/upload"),
         ("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/queue/data?session_hash=x"), ("POST", "/login"),
         ("GET", "/gradio_api/heartbeat/x"), ("POST", "/gradio_api/call/generate"), ("PUT", "/anything")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS, ids=lambda value: str(value))
def test_a_name_that_only_resolves_to_this_machine_is_refused(http, page, method, path):
    port = page.server_port
    for host in (
        f"rebound.example.com:{port}",
        "127.0.0.1.example.com",
        "localhost.",
        "192.0.2.1",
        "",
        "[::1",
        "a@127.0.0.1",
    ):
        headers = {"Host": host, "Origin": f"http://{host}", "Access-Control-Request-Method": "POST"}
        answer = http.request(method, path, headers=headers)
        assert answer.status_code == 400, host
        assert "access-control-allow-origin" not in answer.headers


def test_the_server_s_own_names_and_the_given_ones_are_answered(http, page):
    for host in (f"127.0.0.1:{page.server_port}", "localhost:9999", "LOCALHOST", "[::1]:7860", PROXY, f"{PROXY}:8443"):
        assert http.get("/", headers={"Host": host}).status_code == 200, host
    client = Client(page.local_url, verbose=False)
    assert client.predict(api_name="/list_adapters") == []


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "http://127.0.0.1:1", "http://[", "x"]
)
def test_what_another_site_asks_for_is_refused_uploads_too(http, page, origin):
    headers = {"Origin": origin}
    before = set(page.upload_file_set)
    files = {"files": ("evil.safetensors", b"x")}
    assert http.post("/gradio_api/upload", headers=headers, files=files).status_code == 403
    assert set(page.upload_file_set) == before
    body = call_of(page, "suggested", "seed", "", "")
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        assert http.post(path, headers=headers, json=body).status_code == 403
    assert http.get("/config", headers=headers).status_code == 403
    assert http.post("/gradio_api/upload", headers=own(page), files=files).status_code == 200


def test_behind_a_proxy_the_origin_is_the_given_name(http, page):
    body = call_of(page, "suggested", "seed", "", "")
    for host, origin in (
        (PROXY, f"https://{PROXY}"),
        (None, f"https://{PROXY}:8443"),
        (f"{PROXY}:81", f"http://{PROXY}:81"),
    ):
        headers = {"Origin": origin, **({"Host": host} if host else {})}
        assert http.post("/gradio_api/run/predict", headers=headers, json=body).json()["data"][0]["value"] == "0; 1"


def test_the_names_are_the_loopback_s_the_given_and_this_machine_s():
    assert allowed_hosts([], False) == ["localhost", "127.0.0.1", "[::1]"]
    assert {"a.example", "*.b.example", "192.0.2.7", "[2001:db8::1]"} <= set(
        allowed_hosts(["a.example", "*.b.example", "192.0.2.7", "[2001:db8::1]"], False)
    )
    assert socket.gethostname() in allowed_hosts([], True)
    assert socket.gethostname() not in allowed_hosts([], False)
    for name in ("*", "", "https://a.example", "a.example:80", "a b", "a*.example", "::1"):
        with pytest.raises(EffiLoRAError, match="--allowed_host must be a name"):
            allowed_hosts([name], False)


# ---------------------------------------------------------------------------------------------------------- handlers


def test_handlers_of_the_page_have_no_name(http, page):
    private = [fn.api_name for fn in page.fns.values() if fn.api_visibility == "private"]
    assert {"draw", "begin", "remove", "write", "restart", "end"} <= set(private)
    for name in private:
        for path in (
            f"call/{name}",
            f"call/v2/{name}",
            f"run/{name}",
            f"api/{name}",
            f"run/{name}/",
            f"call/%{ord(name[0]):x}{name[1:]}",
        ):
            answer = http.post(f"/gradio_api/{path}", json={"data": [], "session_hash": "x"}, headers=own(page))
            assert answer.status_code == 404, path
    assert len(page.app.state_holder.session_data) <= SESSIONS


def test_a_number_calls_them_from_the_page_only(http, page):
    body = call_of(page, "suggested", "seed", "", "")
    listing = {"fn_index": index_of(page, "list_adapters"), "data": [], "session_hash": "program"}
    for path in (
        "/gradio_api/run/predict",
        "/gradio_api/queue/join",
        "/gradio_api/run/list_adapters",
        "/gradio_api/api/predict",
    ):
        assert http.post(path, json=body).status_code == 404, path
        assert http.post(path, json={**body, "fn_index": str(body["fn_index"])}).status_code == 404, path
        assert http.post(path, json={**body, "fn_index": 10**6}, headers=own(page)).status_code == 404, path
        assert http.post(path, json=listing).status_code == 200, path
    assert http.post("/gradio_api/run/predict", json={"data": []}, headers=own(page)).status_code == 404
    assert http.post("/gradio_api/run/predict", json=body, headers=own(page)).json()["data"][0]["value"] == "0; 1"


def test_calls_have_a_length(http, page):
    body = call_of(page, "suggested", "seed", "", "x" * MOST_BYTES)
    for path in ("/gradio_api/run/predict", "/gradio_api/queue/join"):
        assert http.post(path, json=body, headers=own(page)).status_code == 413
        assert http.post(path, content=b"[" * 10**5, headers=own(page)).status_code in (400, 422)


def test_only_so_many_visitors_are_kept_in_memory(http, page):
    for visitor in [*[f"v{number}" for number in range(3 * SESSIONS)], "v5", f"v{3 * SESSIONS - 2}"]:
        body = call_of(page, "suggested", "seed", "", "", visitor=visitor)
        assert http.post("/gradio_api/run/predict", json=body, headers=own(page)).json()["data"][0]["value"] == "0; 1"
    kept = list(page.app.state_holder.session_data)
    assert len(kept) == SESSIONS
    assert kept[-2:] == ["v5", f"v{3 * SESSIONS - 2}"]  # the idle ones went


# ------------------------------------------------------------------------------------------------------------- login


class Logins:
    """A server that knows one password, behind :class:`LoginDelay` with a clock of its own."""

    def __init__(self):
        self.now, self.asked = 100.0, 0
        answer = Starlette(
            routes=[Route("/login", self.login, methods=["POST"]), Route("/login/", self.login, methods=["POST"])]
        )
        self.app = LoginDelay(answer, clock=lambda: self.now)

    async def login(self, request):
        self.asked += 1
        return PlainTextResponse("", 200 if await request.body() == b"right" else 400)

    def try_one(self, password="wrong", address="192.0.2.1", path="/login"):
        async def post():
            transport = httpx.ASGITransport(self.app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.post(path, content=password)

        return asyncio.run(post())


def test_guesses_of_a_password_get_slower_and_slower():
    logins, delays = Logins(), []
    while len(delays) < 14:
        answer = logins.try_one(path="/login/" if len(delays) % 2 else "/login")
        if answer.status_code == 429:
            delays.append(int(answer.headers["Retry-After"]))
            logins.now += delays[-1]
    assert delays[:5] == [1, 2, 4, 8, 16]
    assert max(delays) == delays[-1] == LONGEST_DELAY
    assert logins.asked == FREE_ATTEMPTS + 13
    asked = logins.asked
    assert logins.try_one("right").status_code == 200
    assert logins.try_one("wrong").status_code == 400  # whoever has got in begins anew
    assert logins.asked == asked + 2


def test_one_address_waits_for_its_own_attempts():
    logins = Logins()
    for _ in range(FREE_ATTEMPTS):
        assert logins.try_one(address="2001:db8::1").status_code == 400
    assert logins.try_one("right", address="2001:db8::1").status_code == 429
    assert logins.try_one("right", address="2001:db8::2").status_code == 429  # the same network
    assert logins.try_one("right", address="2001:db8:0:1::1").status_code == 200
    assert logins.try_one("right", address="192.0.2.1").status_code == 200
    logins.now += 3 * LONGEST_DELAY
    assert logins.try_one(address="2001:db8::1").status_code == 400  # forgotten
    assert logins.try_one("right", address="2001:db8::1").status_code == 200


def test_attempts_that_come_at_once_are_all_counted():
    logins = Logins()

    async def storm():
        transport = httpx.ASGITransport(logins.app, client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await asyncio.gather(*(client.post("/login", content="wrong") for _ in range(50)))

    codes = [answer.status_code for answer in asyncio.run(storm())]
    assert (codes.count(400), codes.count(429)) == (FREE_ATTEMPTS, 50 - FREE_ATTEMPTS)
