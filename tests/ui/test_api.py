"""The endpoints through gradio's own client and through bare HTTP: typed, in sentences, and closed to others."""

import json
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

ANN, BOB = "ann-" + "a" * 30, "bob-" + "b" * 30
PAIRS = "\n".join(
    json.dumps({"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}) for i in range(8)
)


@pytest.fixture(scope="module")
def client(tiny_app) -> Client:
    return Client(tiny_app, verbose=False)


def test_the_endpoints_are_named_and_typed(client, tiny_app):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/compare", "/score", "/check_pairs", "/submit_job", "/job_status"}
    wanted = {p["parameter_name"]: p["python_type"]["type"] for p in named["/compare"]["parameters"]}
    assert wanted == {
        "prompt": "str", "preference": "str", "max_new_tokens": "int", "temperature": "float", "seed": "int",
        "token": "str",
    }  # fmt: skip
    with urllib.request.urlopen(f"{tiny_app}/gradio_api/mcp/schema", timeout=20) as answer:
        tools = {tool["name"]: tool for tool in json.load(answer)}
    assert {name.rsplit("_bapo_", 1)[-1] for name in tools} >= {"compare", "score"} or len(tools) == 5


def test_compare_and_score(client):
    found = client.predict("hi", "P2A", 8, api_name="/compare")
    assert [policy["name"] for policy in found["policies"]] == ["base", "dpo", "bapo"]
    scored = client.predict(PAIRS, "P2A", api_name="/score")
    assert len(scored["pairs"]) == 8
    assert set(scored["drift"]) == {"dpo", "bapo"}


def test_faults_are_sentences(client):
    with pytest.raises(AppError, match="no adapter for the preference 'P9'"):
        client.predict("hi", "P9", api_name="/compare")
    report = client.predict('{"prompt": 1, "chosen": "a", "rejected": "b"}', api_name="/check_pairs")
    assert report["problems"] == [{"row": 1, "column": "prompt", "expected": "expected text, found int"}]
    with pytest.raises(AppError, match="1 rows are faulty, the first: row 1"):
        client.predict('{"prompt": "p", "chosen": "a"}', "mine", token=ANN, api_name="/submit_job")
    with pytest.raises(AppError, match="Reload it"):
        client.predict(PAIRS, "mine", token="short", api_name="/submit_job")


def test_a_job_is_its_owners_alone(client, tiny_app):
    job = client.predict(PAIRS, "mine", epochs=2.0, token=ANN, api_name="/submit_job")
    assert (job["name"], job["pairs"], job["methods"]) == ("mine", 8, ["bapo"])
    assert "question" not in json.dumps(job), "the data stays where it is"
    for token in (BOB, ""):
        with pytest.raises(AppError, match="no such job, or it is not yours|Reload it"):
            client.predict(job["id"], token=token, api_name="/job_status")

    end = time.monotonic() + 300
    while client.predict(job["id"], token=ANN, api_name="/job_status")["state"] != "finished":
        assert time.monotonic() < end
        time.sleep(1)
    assert client.predict("hi", "mine", 4, token=ANN, api_name="/compare")["policies"][1]["name"] == "bapo"
    for token in (BOB, ""):
        with pytest.raises(AppError, match="no adapter for the preference 'mine'"):
            client.predict("hi", "mine", 4, token=token, api_name="/compare")

    # The page's own events, called without the page: they are not listed, and ask for the token as well.
    with urllib.request.urlopen(f"{tiny_app}/config", timeout=20) as answer:
        config = json.load(answer)
    assert job["id"] not in json.dumps(config)
    private = [one for one in config["dependencies"] if one["api_visibility"] == "private"]
    answered = 0
    for event in private:
        data = [BOB if i == 0 else job["id"] if i == 1 else None for i in range(len(event["inputs"]))]
        request = urllib.request.Request(
            f"{tiny_app}/gradio_api/run/predict",
            json.dumps({"fn_index": event["id"], "data": data, "session_hash": "bob"}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                said = answer.read().decode()
                answered += 1
        except urllib.error.HTTPError as error:
            said = error.read().decode()
        assert "yes 1" not in said
        assert "question 1" not in said
        assert "8 pairs" not in said
    assert answered > 5, "the events were really asked"
    assert client.predict(job["id"], token=ANN, api_name="/job_status")["state"] == "finished", "nobody deleted it"


@pytest.mark.parametrize("path", ["/etc/passwd", "jobs.sqlite", "browser-secret"])
def test_files_of_the_server_are_not_served(tiny_app, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{tiny_app}/gradio_api/file={path}", timeout=20)
    assert refused.value.code in (403, 404)
