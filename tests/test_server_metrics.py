"""What a server counts, as Prometheus reads it."""

import json

from prometheus_client.parser import text_string_to_metric_families
from server_raw import raw, request, serving

from openelm_mlx.server.counts import Histogram, Metrics, path_kind
from openelm_mlx.server.names import served_model
from openelm_mlx.server.parts import Usage
from openelm_mlx.server.registry import Registry
from openelm_mlx.server.settings import ServerSettings
from openelm_mlx.server.site import make_site


def values(text):
    """(name, labels) -> value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_and_tokens_are_counted_and_the_text_is_prometheus_s():
    settings = ServerSettings(models=(served_model("demo-openelm"),))
    body = {"model": "demo-openelm", "prompt": "A banjo is", "max_tokens": 3, "temperature": 0}
    with serving(make_site(settings, Registry(settings)), settings) as port:
        for _ in range(2):
            answer = raw(port, request("/v1/completions", json.dumps(body).encode()))
            assert answer.status == 200, answer
        usage = json.loads(answer.body)["usage"]
        assert raw(port, request("/v1/models/nobody")).status == 404
        assert raw(port, request("/" + "x" * 50)).status == 404
        answer = raw(port, request("/metrics"))
    assert answer.headers["content-type"].startswith("text/plain")
    found = values(answer.body.decode())

    def value(name, **labels):
        return found[name, tuple(sorted(labels.items()))]

    assert value("openelm_mlx_requests_total", method="POST", path="/v1/completions", status="200") == 2
    assert value("openelm_mlx_requests_total", method="GET", path="/v1/models", status="404") == 1
    assert value("openelm_mlx_requests_total", method="GET", path="other", status="404") == 1
    assert value("openelm_mlx_tokens_total", model="demo-openelm", kind="completion") == 6
    assert value("openelm_mlx_tokens_total", model="demo-openelm", kind="prompt") == 2 * usage["prompt_tokens"]
    assert value("openelm_mlx_tokens_total", model="demo-openelm", kind="cached") == usage["prompt_tokens"] - 1
    assert value("openelm_mlx_request_seconds_count", path="/v1/completions") == 2
    assert value("openelm_mlx_first_token_seconds_count", model="demo-openelm") == 2
    assert value("openelm_mlx_model_loaded", model="demo-openelm") == 1
    assert value("openelm_mlx_requests_running", model="demo-openelm") == 0
    assert value("openelm_mlx_memory_bytes", kind="used") > 0


def test_nobody_can_make_a_series_for_each_request():
    counted = Metrics()
    for i in range(200):
        counted.request_done(f"METHOD{i}", f"/{i}", 404, 0.1)
    assert len(counted._requests) == len(counted._durations) == 1
    assert [path_kind(each) for each in ("/", "/v1/models/a/b", "/v1/modelsx", "/v1/responses/x/cancel")] == [
        "/", "/v1/models", "other", "/v1/responses",
    ]  # fmt: skip


def test_a_histogram_s_buckets_count_all_below():
    found = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        found.add(value)
    assert found.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert found.sum == 12.0
    counted = Metrics()
    counted.answered("m", Usage(5, 4, 3, 2), 0.2)
    assert counted._tokens["m", "cached"] == 4
