"""The dashboard's server: read-only, for this machine alone, and telling only what it was asked."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from pages import ERROR, TINY, made, served

from lora_lab import engine
from lora_lab.comparison import compare
from lora_lab.dashboard import server
from lora_lab.hydra_bridge import plan
from lora_lab.measuring import kept
from lora_lab.registry import WrongInput
from lora_lab.report import live as living
from lora_lab.report import page, parts
from lora_lab.report.details import run_part
from lora_lab.report.live import Live
from lora_lab.store import RunDir, Store, Tables


class Answer(NamedTuple):
    """What the server said."""

    status: int
    headers: dict[str, str]
    body: bytes


class Asked(NamedTuple):
    """A served results folder."""

    store: Store
    ids: list[str]
    port: int

    def __call__(self, path: str, method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return Answer(answer.status, dict(answer.getheaders()), body)

    def part(self, name: str) -> dict:
        answer = self(f"/data/{name}.json")
        assert answer.status == 200, answer
        return json.loads(answer.body)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    store, ids = made(tmp_path_factory.mktemp("served") / "results")
    with served(store) as port:
        yield Asked(store, ids, port)


# ---- who may ask, and how ----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_page_is_served_under_both_names_of_this_machine(ask: Asked, host: str) -> None:
    answer = ask("/", Host=f"{host}:{ask.port}")
    assert answer.status == 200
    assert answer.body.decode() == page.served()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""]
)
@pytest.mark.parametrize("path", ["/", "/data/runs.json"])
def test_a_request_under_another_name_is_refused(ask: Asked, host: str, path: str) -> None:
    answer = ask(path, Host=host.format(port=ask.port))
    assert answer.status == 403
    assert b"run_id" not in answer.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "WORSE"])
def test_every_method_but_get_and_head_is_refused(ask: Asked, method: str) -> None:
    answer = ask("/", method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_head_tells_what_get_sends_and_sends_nothing(ask: Asked) -> None:
    head, get = ask("/data/runs.json", "HEAD"), ask("/data/runs.json")
    assert head.body == b""
    assert head.headers["Content-Length"] == str(len(get.body))


@pytest.mark.parametrize("path", ["/", "/data/runs.json", "/plotly.js", "/nothing"])
def test_every_answer_carries_the_headers_that_keep_others_out(ask: Asked, path: str) -> None:
    headers = ask(path).headers
    policy = dict(p.strip().split(" ", 1) for p in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert all(word.startswith("'sha256-") for word in policy[name].split())
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Python" not in headers["Server"]
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/data/../config.json", "/data/%2e%2e/runs.json", "/runs", "/data/",
        "/data/run/000000000000.json", "/data/run/../../x.json", "/data/runs.json/", "/%00",
        "/data/claim/..%2f..%2fx.png", "/data/pair/a+b.json", "/data/pair/+.json", "/" + "a" * 5000,
        "/data/Live.json", "/data/run.json", "/data/runs/0.json", "/data/pair/0+1+2+3.json",
    ],
)  # fmt: skip
def test_a_path_that_is_none_gives_404(ask: Asked, path: str) -> None:
    assert ask(path).status == 404


def test_it_listens_on_this_machine_alone_and_a_taken_port_is_one_clear_line(ask: Asked) -> None:
    with pytest.raises(WrongInput, match=rf"port {ask.port} cannot be used .*--port 0"):
        server(ask.store, ask.port)
    with server(ask.store) as other:
        assert other.server_address[0] == "127.0.0.1"
    with pytest.raises(WrongInput, match="port 70000"):
        server(ask.store, 70000)


def test_what_has_not_changed_costs_no_bytes(ask: Asked) -> None:
    first = ask("/data/runs.json")
    again = ask("/data/runs.json", **{"If-None-Match": first.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
    assert ask("/data/runs.json", **{"If-None-Match": '"old"'}).status == 200


def test_a_connection_that_says_nonsense_or_leaves_does_no_harm(ask: Asked) -> None:
    for sent in (b"\x00\xff\r\n\r\n", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(("127.0.0.1", ask.port)) as connection:
            connection.sendall(sent)
    assert ask("/").status == 200


# ---- what it tells -----------------------------------------------------------------------------


def test_standing_lists_what_is_not_done_with_its_error(ask: Asked) -> None:
    told = ask.part("standing")
    assert told["counts"] == {"waiting": 1, "failed": 1, "done": 3}
    by_id = {row["run_id"]: row for row in told["rows"]}
    assert by_id[ask.ids[3]]["error"] == ERROR
    assert by_id[ask.ids[4]]["status"] == "waiting"


def test_the_runs_part_holds_every_field_of_the_table(ask: Asked) -> None:
    runs, told = Tables(ask.store).runs, ask.part("runs")
    assert told["count"] == len(runs) == 4
    assert set(runs.columns) <= set(told["columns"])
    scores = told["columns"]["score"]["values"]
    np.testing.assert_allclose(np.array(scores, float), runs["score"].to_numpy(float), rtol=1e-8)
    settings = told["columns"]["setting"]["values"]
    r = runs["adapter.r"].tolist()
    same = [[settings[i] == settings[j] for i in range(4)] for j in range(4)]
    assert same == [[r[i] == r[j] for i in range(4)] for j in range(4)]


def test_a_run_is_told_whole_and_thinned_only_for_the_file(ask: Asked) -> None:
    told = ask.part(f"run/{ask.ids[0]}")
    tables = Tables(ask.store, [ask.ids[0]])
    spectra = tables.spectra
    last = spectra[spectra["step"] == spectra["step"].max()]
    layer = told["layers"]["layer"][0]
    sigma = last[last["layer"] == layer].sort_values("i")["sigma"]
    np.testing.assert_allclose(told["spectra"]["sigma"][-1][0][: len(sigma)], sigma, rtol=1e-4)
    assert told["thinned"] == ""
    rank = next(m for m in told["measures"] if m["measure"] == "effective_rank")
    rows = tables.measures
    rows = rows[(rows["measure"] == "effective_rank") & (rows["step"] == rows["step"].max())]
    by_layer = rows.set_index("layer")["value"].reindex(told["layers"]["layer"])
    np.testing.assert_allclose(rank["value"], by_layer, rtol=1e-4)
    assert len(rank["null_low"]) == len(by_layer)
    many = spectra.loc[np.repeat(spectra.index, 60)].assign(i=lambda t: range(1, len(t) + 1))
    own = parts.frames_by_run(tables, [ask.ids[0]])[ask.ids[0]]
    thin = run_part(ask.ids[0], own | {"spectra": many}, thin=True)
    assert "lora-lab dashboard" in thin["thinned"]
    assert len(thin["spectra"]["i"]) <= 48


def test_two_runs_share_all_with_themselves_and_their_layers_one_by_one(ask: Asked) -> None:
    one, other = ask.ids[:2]
    pair = ask.part(f"pair/{one}+{other}")
    assert len(pair["value"]) == len(pair["layers"])
    updates = {run_id: kept(ask.store.run(run_id))[0] for run_id in (one, other)}
    compared = compare(updates, ["cosine"])
    np.testing.assert_allclose(pair["value"], compared["value"][:-1], rtol=1e-3)
    for name in ("value", "null_low", "null_high"):
        assert pair["whole"][name] == pytest.approx(compared[name].iloc[-1], rel=1e-4)
    layer = ask.part(f"pair/{one}+{one}+0")
    assert layer["phi"]["left"]["grid"] == [[1, 1], [1, 1]]
    overlap = [row for row in layer["by_k"] if row["measure"] == "subspace_overlap"]
    assert {row["value"] for row in overlap if row["value"] is not None} == {1}
    assert ask(f"/data/pair/{one}+{other}+999.json").status == 422


def test_runs_without_weights_cannot_be_compared_and_it_says_why(ask: Asked) -> None:
    answer = ask(f"/data/pair/{ask.ids[0]}+{ask.ids[3]}.json")
    assert answer.status in (404, 422)
    assert b"Traceback" not in answer.body


def test_only_what_changed_is_read_from_disk(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    live, read = Live(ask.store), []
    record, table = RunDir.record, RunDir.find_table
    monkeypatch.setattr(RunDir, "record", lambda run: (read.append(run.run_id), record(run))[1])
    monkeypatch.setattr(
        RunDir, "find_table", lambda run, name: (read.append(run.run_id), table(run, name))[1]
    )
    live.part("layers")
    assert set(read) == set(ask.ids[:4])
    read.clear()
    live.part("standing")
    live.part("layers")
    assert not set(read) & set(ask.ids[:3]), "a finished run was read again"


def test_a_run_that_ends_changes_the_version_and_appears(tmp_path: Path) -> None:
    planned, host = plan([["seed=0,1"]], [*TINY, f"host.results={tmp_path / 'results'}"])
    engine.run_here(planned[0], host)
    live = Live(Store(tmp_path / "results"))
    before = json.loads(live.part("standing") or b"")
    assert json.loads(live.part("standing") or b"")["version"] == before["version"]
    engine.run_here(planned[1], host)
    after = json.loads(live.part("standing") or b"")
    assert after["version"] != before["version"]
    assert after["counts"] == {"done": 2}
    assert json.loads(live.part("runs") or b"")["version"] == after["version"]
    assert len(json.loads(live.part("layers") or b"")["runs"]) == 2


def test_words_may_lag_while_runs_end_but_not_for_good() -> None:
    now = time.monotonic()
    assert living.Answer("old", b"", now, took=60).holds("new", lasting=True)
    assert not living.Answer("old", b"", now, took=60).holds("new", lasting=False)
    assert not living.Answer("old", b"", now - 10, took=0.1).holds("new", lasting=True)
