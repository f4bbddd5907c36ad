"""Remote models, against servers on loopback: one that fails on demand, and a real engine."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from triptych.build import check
from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.runner import evaluate
from triptych.models.api import ApiModel
from triptych.models.api_price import Price, image_tokens
from triptych.types import ImageRef, Sample, TriptychError, assistant, user

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
PRICE = {"model": "eyes-1", "input": 10.0, "output": 30.0, "as_of": "2026-01-01"}


def reply(text: str | None, **more: Any) -> tuple[int, dict, dict]:
    """A successful answer; `more` may hold a refusal or finish_reason."""
    finish = more.pop("finish_reason", "stop")
    choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 2}
    return 200, {}, {"model": "eyes-1-0101", "choices": [choice], "usage": usage}


def failure(status: int, code: str = "", **headers: str) -> tuple[int, dict, dict]:
    return status, headers, {"error": {"message": f"failed with {status}", "code": code}}


def sees(body: dict) -> tuple[int, dict, dict]:
    """An honest model: names the colour of the first picture's middle."""
    parts = body["messages"][-1]["content"]
    url = next(p["image_url"]["url"] for p in parts if p["type"] == "image_url")
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
    pixel = picture.getpixel((8, 8))
    return reply(next(name for name, value in COLORS.items() if value == pixel))


class Server:
    """Answers by `behave(body)`; counts the requests and how many ran at a time."""

    def __init__(self) -> None:
        self.behave: Callable[[dict], tuple[int, dict, dict]] = sees
        self.bodies: list[dict] = []
        self.keys: set[str | None] = set()
        self.most = self.now = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.keys.add(self.headers["Authorization"])
                status, headers, content = outer.behave(body)
                with lock:
                    outer.now -= 1
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has given up waiting

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", made.url)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    yield made
    made.http.shutdown()
    made.http.server_close()


def api(**more: Any) -> ApiModel:
    return ApiModel("eyes-1", **{"pause": 0.01, "timeout": 5.0, "retries": 2, **more})


def samples(count: int = 6, question: str = "what color?") -> list[Sample]:
    made = []
    for i in range(count):
        name = list(COLORS)[i % 3]
        picture = Image.new("RGB", (16, 16), COLORS[name])
        picture.putpixel((0, 0), (i, 0, 7))
        ref = ImageRef.from_picture(picture, f"{i}.png")
        turns = [user(question, 1), assistant(name)]
        made.append(Sample(turns, [ref], name, list(COLORS), id=f"q{i}", cluster=f"{i}"))
    return made


def by_turns(*answers: Any) -> Callable[[dict], Any]:
    """One answer a request, the last for all that follow; True is the honest one."""
    left, lock = list(answers), threading.Lock()

    def behave(body: dict) -> Any:
        with lock:
            answer = left.pop(0) if len(left) > 1 else left[0]
        return sees(body) if answer is True else answer

    return behave


# --- requests -----------------------------------------------------------------------------------


def test_a_request_carries_prompt_image_and_options(server):
    model = api(detail="low", options={"temperature": 0}, limit_field="max_completion_tokens")
    outcome = model.respond(samples(1), 5)[0]
    assert (outcome.raw, outcome.extra["status"]) == ("red", "ok")
    assert (outcome.extra["served_model"], outcome.extra["tokens_in"]) == ("eyes-1-0101", 100)
    body = server.bodies[0]
    assert (body["model"], body["max_completion_tokens"], body["temperature"]) == ("eyes-1", 5, 0)
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what color?"} and len(body["messages"]) == 1
    assert image["image_url"]["detail"] == "low" and server.keys == {"Bearer secret"}
    assert model.generated_tokens == 2 and model.costs["tokens_in"] == 100


def test_requests_run_together_up_to_the_limit(server):
    def slow(body: dict) -> Any:
        time.sleep(0.1)
        return sees(body)

    server.behave = slow
    answers = api(concurrency=3).generate(samples(9), max_new_tokens=4)
    assert answers == [s.target for s in samples(9)], "in the order of the samples"
    assert server.most == 3


def test_what_passes_is_tried_again_and_what_does_not_is_an_outcome(server):
    busy = failure(429, **{"Retry_After": "0"})
    server.behave = by_turns(failure(503), busy, True)
    model = api(concurrency=1)
    assert model.generate(samples(1), max_new_tokens=4) == ["red"]
    assert model.costs["requests"] == 3 and model.costs["retries"] == 2
    server.behave = by_turns(failure(400), True)
    first, second = model.respond(samples(3)[1:], 4)
    assert first.extra["status"] == "error" and "400" in first.extra["reason"]
    assert "q1" in first.extra["reason"] and second.extra["status"] == "ok"
    assert model.costs["requests"] == 5, "a bad request is not sent twice"


def test_a_pause_that_the_server_asks_for_is_kept(server):
    server.behave = by_turns(failure(429, **{"Retry_After": "1"}), True)
    start = time.monotonic()
    assert api().generate(samples(1), max_new_tokens=4) == ["red"]
    assert time.monotonic() - start >= 1


def test_time_outs_and_garbage_are_counted_not_skipped(server, tmp_path):
    def behave(body: dict) -> Any:
        answer = sees(body)
        if answer[2]["choices"][0]["message"]["content"] == "green":
            time.sleep(0.6)
        if answer[2]["choices"][0]["message"]["content"] == "blue":
            return 200, {}, b"<html>"
        return answer

    server.behave = behave
    toy = {"toy": AnswerBenchmark(samples(6))}
    model = api(timeout=0.3, retries=1)
    entry = evaluate(model, toy, tmp_path, blind="none", progress=False)["metrics"]["toy/accuracy"]
    assert (entry["n"], entry["value"]) == (6, pytest.approx(1 / 3, abs=1e-6))
    rates = {k: entry[k] for k in ("timeouts", "errors", "refusals", "unparsed")}
    expected = {"timeouts": 1 / 3, "errors": 1 / 3, "refusals": 0.0, "unparsed": 2 / 3}
    assert rates == pytest.approx(expected, abs=1e-6)
    costs = json.loads((tmp_path / "timing.json").read_text())["benchmarks"]["toy"]
    assert costs["requests"] == 10 and costs["retries"] == 4 and costs["questions"] == 6


@pytest.mark.parametrize(
    "answer",
    [
        reply(None, refusal="I will not."),
        reply("", finish_reason="content_filter"),
        reply("I'm sorry, but I can't assist with that."),
        failure(400, "content_policy_violation"),
    ],
)
def test_refusals_are_outcomes(server, answer):
    server.behave = by_turns(answer)
    toy = {"toy": AnswerBenchmark(samples(3))}
    entry = evaluate(api(), toy, None, blind="none", progress=False)["metrics"]["toy/accuracy"]
    assert (entry["refusals"], entry["unparsed"], entry["value"], entry["n"]) == (1.0, 1.0, 0.0, 3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (failure(401), "refuses the key.*OPENAI_API_KEY"),
        (failure(404), "knows no model.id=eyes-1"),
        (failure(429, "insufficient_quota"), "quota of this key"),
        (failure(500), "none of 6 requests .* failed with: 500"),
    ],
)
def test_what_no_new_try_can_mend_stops_at_once(server, answer, words):
    server.behave = by_turns(answer)
    with pytest.raises(TriptychError, match=words):
        api(retries=0).respond(samples(), 4)


# --- cache, cost and resume ---------------------------------------------------------------------


def test_answers_are_cached_by_model_prompt_and_image(server):
    first = api()
    first.generate(samples(), max_new_tokens=4)
    again = api()
    assert again.generate(samples(), max_new_tokens=4) == [s.target for s in samples()]
    assert len(server.bodies) == 6 and again.costs["cached"] == 6 and again.costs["requests"] == 0
    for other in (
        lambda: ApiModel("eyes-2", pause=0.01).generate(samples(1), max_new_tokens=4),
        lambda: api().generate(samples(1), max_new_tokens=5),
        lambda: api(options={"seed": 1}).generate(samples(1), max_new_tokens=4),
        lambda: api().generate(samples(1, "which color?"), max_new_tokens=4),
        lambda: api().generate(samples(8)[7:], max_new_tokens=4),
        lambda: api(cache=False).generate(samples(1), max_new_tokens=4),
    ):
        before = len(server.bodies)
        other()
        assert len(server.bodies) == before + 1


def test_failures_are_not_cached(server):
    server.behave = by_turns(failure(400), True)
    assert api().respond(samples(1), 4)[0].extra["status"] == "error"
    assert api().generate(samples(1), max_new_tokens=4) == ["red"]


def test_the_cap_stops_and_the_same_command_goes_on(server, tmp_path):
    toy = {"toy": AnswerBenchmark(samples(12))}

    def run(budget: float) -> dict:
        model = api(price=PRICE, budget=budget, concurrency=2, batch_size=3)
        return evaluate(model, toy, tmp_path, blind="none", progress=False)

    # an answer costs 100 x 10 + 2 x 30 = 1,060 millionths, held back is what it could at most
    with pytest.raises(TriptychError, match="model.budget=0.01 USD is used up"):
        run(0.01)
    paid = len(server.bodies)
    assert 3 <= paid <= 9
    assert run(1.0)["metrics"]["toy/accuracy"]["value"] == 1.0
    assert len(server.bodies) == 12, "nothing is paid twice"
    usd = json.loads((tmp_path / "timing.json").read_text())["benchmarks"]["toy"]["usd"]
    assert 0 < usd <= 12 * 1060e-6 + 1e-9


def test_the_estimate_comes_first(server, capsys):
    toy = {"toy": AnswerBenchmark(samples(4))}
    evaluate(api(price=PRICE, budget=0.1), toy, None, blind="none")
    told = capsys.readouterr().out
    # a picture of one tile: 85 + 170; the words: 8 + 11 / 3, rounded up; 16 tokens to write
    cost = 4 * ((255 + 12) * 10 + 16 * 30) / 1e6
    assert "0 of 4 answers are cached; 4 to ask, about 1,068 tokens" in told
    assert f"at most {cost:.2f} USD at the prices of 2026-01-01; model.budget=0.1" in told
    assert "no price is known" in api().forecast(samples(1), None)


def test_prices_have_a_date_and_belong_to_a_model():
    assert Price.read(PRICE, "eyes-1", 1.0).of(1e6, 1e6) == 40.0
    assert Price.read(PRICE, "eyes-2", None) is None
    with pytest.raises(TriptychError, match="needs the price of model.id=eyes-2"):
        Price.read(PRICE, "eyes-2", 1.0)
    with pytest.raises(TriptychError, match="has no date"):
        Price.read({**PRICE, "as_of": None}, "eyes-1", 1.0)
    # 2,048 x 1,024 shrinks to 1,536 x 768, which takes 3 x 2 tiles
    assert [image_tokens((2048, 1024), d) for d in ("low", "high")] == [85, 85 + 6 * 170]


def test_a_resumed_run_keeps_outcomes_and_asks_the_rest(server, tmp_path):
    toy = {"toy": AnswerBenchmark(samples(6))}
    asked = [0]

    def down(body: dict) -> Any:
        asked[0] += 1
        return sees(body) if asked[0] <= 3 else failure(401)

    server.behave = down
    with pytest.raises(TriptychError, match="refuses the key"):
        evaluate(api(concurrency=1, batch_size=3), toy, tmp_path, blind="none", progress=False)
    server.behave = sees
    evaluate(api(cache=False, batch_size=3), toy, tmp_path, blind="none", progress=False)
    assert len(server.bodies) == 4 + 3


# --- as a user meets it -------------------------------------------------------------------------


def test_without_a_key_one_sentence_says_so(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(TriptychError, match="set OPENAI_API_KEY"):
        ApiModel("eyes-1")
    cfg = OmegaConf.create({"model": {"_target_": "triptych.models.api.ApiModel", "name": "gpt4v"}})
    with pytest.raises(TriptychError, match="model=gpt4v answers from afar.*evaluate.py"):
        check(cfg)


@pytest.mark.slow
def test_the_command_stands_beside_other_runs(server, tmp_path):
    root = Path(__file__).parents[1]
    server.behave = lambda body: reply("yes")
    command = [sys.executable, str(root / "evaluate.py"), "model=gpt4v", "benchmark=[easy_vqa]"]
    command += ["benchmark.easy_vqa.train=null", "eval.limit=30", "model.pause=0.01"]
    command += [f"hydra.run.dir={tmp_path / 'api'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "at the prices of 2024-04-09" in done.stdout
    found = json.loads((tmp_path / "api" / "results.json").read_text())["metrics"]
    assert found["easy_vqa/accuracy"]["n"] == 30 and found["easy_vqa/accuracy"]["refusals"] == 0.0
    assert found["easy_vqa/accuracy"]["value"] == found["easy_vqa/accuracy"]["blind"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
    keyless = subprocess.run(
        command[:-1], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert keyless.returncode == 1 and "Traceback" not in keyless.stderr
    assert "OPENAI_API_KEY" in keyless.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_real_engine_answers_as_the_model_itself(tmp_path, monkeypatch):
    """`transformers serve` on loopback, with a random SmolVLM; needs fastapi, uvicorn, openai."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    from tiny_hosted import smolvlm

    from triptych.evaluation.model_predictor import ModelPredictor
    from triptych.models.hosted import HostedVLM

    folder = tmp_path / "smolvlm"
    smolvlm(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "serve.log", "w")  # noqa: SIM115
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command += ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    engine = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(port, engine, tmp_path / "serve.log")
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
        asked = samples(6)
        remote = ApiModel(str(folder), options={"temperature": 0}, concurrency=2, timeout=120.0)
        outcomes = remote.respond(asked, 6)
    finally:
        engine.terminate()
        engine.wait(30)
        log.close()
    assert {o.extra["status"] for o in outcomes} == {"ok"}
    assert all(o.extra["tokens_out"] >= 1 and o.extra["tokens_in"] > 4 for o in outcomes)
    local = HostedVLM(str(folder)).eval()
    expected = ModelPredictor(local, local.processor(), 4).generate(asked, max_new_tokens=6)
    assert [_plain(o.raw) for o in outcomes] == [_plain(text) for text in expected]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _wait_for(port: int, engine: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert engine.poll() is None, log.read_text()[-3000:]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the engine does not listen: {log.read_text()[-2000:]}")
