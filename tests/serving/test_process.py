"""`modular-experts serve` in a process of its own: streams, clients that leave, the end, and the page in a browser."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from testbed import served
from testbed.documents import ROOT

from modular_experts.__main__ import main
from modular_experts.library.opening import ADAPTER_FILE

LONG = {"model": "lora", "prompt": "upper", "max_tokens": 200, "stream": True}


class Started:
    """A server on loopback, whose process is a copy of this one."""

    def __init__(self, library: Path, *words: str) -> None:
        self.process = served.Copy("serve", str(library), "--port", "0", *words)
        lines = [self.process.stdout.readline() for _ in range(2)]
        found = re.fullmatch(r"answers at (http://127\.0\.0\.1:\d+)/v1; Ctrl-C ends it\n", lines[1])
        assert found, [*lines, self.process.stderr.read()]
        self.first, self.address = lines[0], found[1]
        self.client = httpx.Client(base_url=self.address, timeout=60)

    def answering(self) -> float:
        return float(re.search(r"^modular_experts_answering (.*)$", self.client.get("/metrics").text, re.M)[1])

    def until(self, answering: int) -> None:
        deadline = time.monotonic() + 30
        while self.answering() != answering:
            assert time.monotonic() < deadline, "the requests do not end"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def library(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = served.make_library(tiny_llama_dir, tmp_path_factory.mktemp("served") / "library")
    served.write(tiny_llama_dir, place / "dates", "lora", 9)
    return place


@pytest.fixture(scope="module")
def server(library) -> Iterator[Started]:
    """A server for all tests, of which the last one ends it."""
    started = Started(library)
    yield started
    started.client.close()


def test_verify_finds_each_expert_in_the_running_server_and_one_that_is_another(
    library, server, tiny_llama_dir, task_files, tmp_path, capsys
) -> None:
    asked = ["--server", server.address, "--tasks", str(task_files["upper"])]
    assert main(["verify", str(library), *asked]) == 0
    assert "8 experts asked for, and each acts" in capsys.readouterr().out
    shutil.copytree(library, tmp_path / "library")
    shutil.rmtree(tmp_path / "library" / "lora")
    served.write(tiny_llama_dir, tmp_path / "library" / "lora", "lora", 77)
    assert main(["verify", str(tmp_path / "library" / "lora"), *asked]) == 1
    told = capsys.readouterr()
    assert re.search(r"^lora is nothing of this library", told.out, re.M)
    assert "of 1 expert these do not act: lora" in told.err


def test_verify_passes_over_experts_that_the_server_does_not_list_unless_one_is_named(
    library, server, tiny_llama_dir, task_files, tmp_path, capsys
) -> None:
    asked = ["--server", server.address, "--tasks", str(task_files["upper"])]
    shutil.copytree(library / "lora", tmp_path / "library" / "lora")
    served.write(tiny_llama_dir, tmp_path / "library" / "new", "lora", 78)
    assert main(["verify", str(tmp_path / "library"), *asked]) == 0
    out = capsys.readouterr().out
    assert "new is not served" in out
    assert "1 expert asked for, and each acts" in out
    assert main(["verify", str(tmp_path / "library" / "new"), *asked]) == 1


def test_verify_says_that_no_server_is_there(library, capsys) -> None:
    assert main(["verify", str(library), "--server", "http://127.0.0.1:9"]) == 1
    assert "no server of OpenAI's protocol answers at http://127.0.0.1:9/v1/models" in capsys.readouterr().err


def test_it_refuses_to_start_with_a_sentence(library, run, monkeypatch, tmp_path, caplog) -> None:
    front, no_route = ["--in-front-of", "http://127.0.0.1:1"], "'auto' names no model here: the library has no route"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, sentence in (
            ([tmp_path / "nothing"], "nothing is not a library: there is no such directory"),
            ([library, "--port", port], f"nothing can listen at 127.0.0.1:{port} "),
            ([library, "--port", "70000"], "--port 70000 is outside 0 to 65535"),
            ([library, "--auto", "loar"], "there is no model 'loar'; did you mean lora?"),
            ([library, "--rows", "0"], "must be at least 1"),
            ([library, *front], f"{no_route} that chooses by the prompt; make one"),
            ([library, "--expert_bytes", "much"], "'much' is not a size"),
            ([tmp_path], "has no experts"),
        ):
            code, out, err = run("serve", *words)
            assert code in (1, 2), words
            assert out == "", words
            assert sentence in err, words
            assert err.count("\n") == 1
    # A broken adapter does not keep it from starting.
    shutil.copytree(library / "dates", tmp_path / "dates")
    (tmp_path / "a-broken").mkdir()
    (tmp_path / "a-broken" / ADAPTER_FILE).write_text("{}")
    _, _, err = run("serve", tmp_path, "--port", "0", *front)
    assert "a-broken is skipped" in caplog.text
    assert no_route in err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, and pip install playwright")
def test_the_page_asks_and_shows_who_answered(server, library, tiny_llama_dir) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for dark in (False, True):
            page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark" if dark else "light")
            problems = []
            page.on("console", lambda message, found=problems: found.append(message.text))
            page.on("pageerror", lambda error, found=problems: found.append(str(error)))
            page.goto(server.address)
            page.wait_for_selector("#model option[value=lora]", state="attached")
            page.select_option("#model", "lora")
            page.fill("#prompt", "upper")
            page.keyboard.press("Enter")
            page.wait_for_selector(".by b")
            page.wait_for_function("document.querySelector('#send').textContent === 'Ask'")
            assert page.text_content(".by b") == "lora"
            expected = served.generated(tiny_llama_dir, library, "upper", "lora", 200)
            assert page.text_content(".answer").strip()[:150] == expected[:150]
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            assert problems == []
            page.close()
        browser.close()


def test_the_commands_of_the_guide_work(server) -> None:
    guide = (ROOT / "docs/guides/serve.md").read_text(encoding="utf-8")
    program = re.search(r'^```python title="ask.py"\n(.*?)^```$', guide, re.M | re.S)[1]
    words = [sys.executable, "-c", program.replace("http://127.0.0.1:8000", server.address)]
    asked = subprocess.run(words, capture_output=True, text=True, check=True)
    assert asked.stdout.startswith("['base', 'answers', 'dates', ")
    assert asked.stdout.endswith(" dates\n")
    body = re.search(r"-d '(.*)'$", guide, re.M)[1]
    answer = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    # This library has no route.
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].startswith("'auto' names no model here: the library has no route")


def test_it_streams_frees_the_place_of_whoever_leaves_and_finishes_what_it_began(server, library, tiny_llama_dir):
    reason = "the library has no route that chooses by the prompt; make one of its experts with route"
    assert server.first == f"{tiny_llama_dir} with 8 models of {library}; auto is not there: {reason}\n"
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    parts = [part.choices[0].text for part in client.completions.create(**LONG | {"max_tokens": 12})]
    assert len(parts) > 5
    assert "".join(parts).strip() == served.generated(tiny_llama_dir, library, "upper", "lora")
    # Whoever leaves a stream, or an answer in one piece.
    with client.completions.create(**LONG) as stream:
        next(iter(stream))
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=LONG | {"stream": False}, timeout=0.05)
    server.until(0)
    # Bytes that are no request close their connection alone.
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00" * 50 + b"\r\n\r\n")
        assert b"400" in raw.recv(1000)
    # A signal lets answers end, and refuses new ones.
    with server.client.stream("POST", "/v1/completions", json=LONG) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        events = [line.removeprefix("data: ") for line in [first, *lines] if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    client.close()
    assert server.process.wait(30) == -signal.SIGTERM
    assert server.process.log == ""


def test_two_interrupts_end_it_at_once_and_it_logs_prompts_if_it_shall(library) -> None:
    started = Started(library, "--log_prompts")
    with started.client.stream("POST", "/v1/completions", json=LONG) as stream:
        next(stream.iter_lines())
        for _ in range(2):
            started.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        # A shell's background job ignores the signal at its end, so the code may be 0.
        started.process.wait(20)
    started.client.close()
    assert re.search(r"^cmpl-\w+ asks lora: upper$", started.process.log, re.M)
    assert re.search(r"^cmpl-\w+ is answered: .", started.process.log, re.M)
